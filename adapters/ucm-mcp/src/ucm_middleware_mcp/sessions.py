"""Sessions and their users: who opened which one, and how it is ended from outside."""

import asyncio
import logging
import secrets
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from typing import Any, Final

logger = logging.getLogger(__name__)


class Session:
    """One session of a client, of the user who opened it.

    ``name`` is random, known to nobody but this process, and tells the session's stored events from others'.
    ``session_id`` is what the client names it by, None until the transport has said so. ``is_known`` is whether its
    end will be told: it is once the session has heard its first message.
    """

    __slots__ = ("_end", "is_known", "loop", "name", "owner", "session_id")

    def __init__(self, owner: str, end: Callable[["Session"], Awaitable[None]]) -> None:
        self.owner = owner
        self.name = secrets.token_hex(16)
        self.session_id: str | None = None
        self.is_known = False
        self.loop = asyncio.get_running_loop()
        self._end = end

    async def end(self) -> None:
        """Have the transport end it, as when the client itself says goodbye."""
        await self._end(self)


serving: Final[ContextVar[Session | None]] = ContextVar("ucm_mcp_session", default=None)
"""The session whose messages the running code handles; the tasks of a session inherit it from the request that opened
it.
"""


class Sessions:
    """The live sessions by what clients name them by. From any thread."""

    __slots__ = ("_by_id", "_ending", "_lock", "_of")

    def __init__(self) -> None:
        self._by_id: dict[str, Session] = {}
        self._of: defaultdict[str, dict[str, Session]] = defaultdict(dict)
        self._lock = threading.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> Session | None:
        """The session of that name, whosever it is."""
        return self._by_id.get(session_id)

    def begin(self, session: Session, most: int) -> bool:
        """It is about to be opened, and counts from now on. False where its user has that many already."""
        with self._lock:
            if len(self._of.get(session.owner, ())) >= most:
                return False
            self._of[session.owner][session.name] = session
            return True

    def add(self, session: Session, session_id: str) -> None:
        """The transport has opened it, under that name."""
        session.session_id = session_id
        with self._lock:
            self._by_id[session_id] = session
            self._of[session.owner][session.name] = session

    def forget(self, session: Session) -> None:
        """It has ended, or never began: whoever names it from now on names nothing."""
        with self._lock:
            if session.session_id is not None:
                self._by_id.pop(session.session_id, None)
            theirs = self._of.get(session.owner)
            if theirs is not None and theirs.pop(session.name, None) is not None and not theirs:
                del self._of[session.owner]

    def end(self, session: Session) -> None:
        """Have it ended by its transport. It is nobody's from the moment that this returns."""
        self.forget(session)
        try:
            # In an empty Context: it is nobody's work that ends here.
            session.loop.call_soon_threadsafe(self._begin_end, session, context=Context())
        except RuntimeError:  # its loop has gone, and the session with it
            logger.debug("the loop of a session has gone")

    def end_all_of(self, user_id: str) -> int:
        """End a user's sessions. Returns how many there were."""
        with self._lock:
            found = [each for each in self._of.get(user_id, {}).values() if each.session_id is not None]
        for session in found:
            self.end(session)
        return len(found)

    def _begin_end(self, session: Session) -> None:
        task = session.loop.create_task(session.end(), name="end an MCP session")
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an MCP session could not be ended; nobody can name it any more", exc_info=error)
