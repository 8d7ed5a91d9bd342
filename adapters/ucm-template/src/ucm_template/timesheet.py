"""Timesheet: the plugin. It clocks each request, connection and agent run in and out, and stamps sessions."""

import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

from ucm_middleware import ConfigurationError, CrossUserAccessError, UserExecutionContext, current_context, hookimpl

STAMP = "ucm_template.user_id"
"""The key in a session's ``info`` under which its user stands."""


class Session(Protocol):
    """What is needed of a session: a place for notes, as SQLAlchemy's have."""

    @property
    def info(self) -> MutableMapping[str, object]: ...


@dataclass(slots=True)
class Shift:
    """One request, connection or agent run. ``seconds`` is None until it has ended."""

    user_id: str
    request_id: str
    agent_name: str | None = None
    notes: list[str] = field(default_factory=list[str])
    seconds: float | None = None
    failed: bool = False


class Timesheet:
    """Keeps the newest shifts in memory, ``most`` of them. ``clock`` is monotonic, in seconds.

    A plugin with settings is an object: the application makes it and gives it to its manager.
    """

    UCM_HOOK_API: ClassVar[int] = 1  # the version of the hooks that this is written for

    def __init__(self, *, most: int = 1000, clock: Callable[[], float] = time.monotonic) -> None:
        if most < 1:
            raise ConfigurationError(f"most must be a number of shifts of at least 1, not {most!r}")
        self._clock = clock
        self._done: deque[Shift] = deque(maxlen=most)
        # By the context itself, weakly: an id may be used again, and nothing here may keep a context alive.
        self._open: WeakKeyDictionary[UserExecutionContext, Shift] = WeakKeyDictionary()
        self._denied = 0
        self._lock = threading.Lock()  # notifications come from any thread

    # For the application.

    def note(self, text: str) -> None:
        """Write on the shift that the calling code works in.

        Raises ContextNotFoundError outside of a context, ContextClosedError in code that outlived its own, and
        ConfigurationError where the timesheet is no plugin of the context's manager.
        """
        shift = self._open.get(current_context())
        if shift is None:
            raise ConfigurationError("nobody is clocked in: name the timesheet in UserContextManager(plugins=[...])")
        shift.notes.append(text)

    def shifts(self) -> list[Shift]:
        """The shifts of the user that the calling code runs for, those that have ended. Raises as ``note`` does."""
        user_id = current_context().user_id  # whose they are is never a parameter: nobody can ask for another's
        with self._lock:
            return [shift for shift in self._done if shift.user_id == user_id]

    @property
    def denied(self) -> int:
        """How often code asked for what was not its user's."""
        return self._denied

    # The hooks.

    @hookimpl
    @asynccontextmanager
    async def ucm_around_context(self, context: UserExecutionContext) -> AsyncGenerator[None]:
        with self._clocked(context, Shift(context.user_id, context.request_id)):
            yield

    @hookimpl
    @asynccontextmanager
    async def ucm_around_agent_run(self, context: UserExecutionContext, agent_name: str) -> AsyncGenerator[None]:
        with self._clocked(context, Shift(context.user_id, context.request_id, agent_name)):
            yield

    @hookimpl
    def ucm_bind_session(self, context: UserExecutionContext, session: Session) -> None:
        # Fails closed: a session that was another user's is not handed out.
        if session.info.setdefault(STAMP, context.user_id) != context.user_id:
            raise CrossUserAccessError("this session was another user's: open a new one")

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        # Of a framework, its engines and pools: what all users are to share, and holds no data of one of them.
        return (Timesheet,)

    @hookimpl
    def ucm_context_bound(self, context: UserExecutionContext) -> None:
        shift = self._open.get(context)
        if shift is not None:
            shift.user_id = context.user_id

    @hookimpl
    def ucm_access_denied(self) -> None:
        with self._lock:
            self._denied += 1

    # Inside.

    @contextmanager
    def _clocked(self, context: UserExecutionContext, shift: Shift) -> Generator[None]:
        begun = self._clock()
        self._open[context] = shift
        try:
            yield
        except BaseException:
            shift.failed = True
            raise
        finally:
            del self._open[context]
            shift.seconds = self._clock() - begun
            with self._lock:
                self._done.append(shift)
