"""Events on their way to the store: those of one user one after the other, as they were sent here."""

# pyright: reportPrivateUsage=false
# The core of a context is read where it is.

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from ucm_middleware.cluster.errands import Errands
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Keep, Place, Published
from ucm_middleware.cluster.worker import Worker
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.envelope import Draft
from ucm_middleware.events.hub import Hub, Sent
from ucm_middleware.events.policy import EventPolicy
from ucm_middleware.ids import Core

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 64 * 1024 * 1024
"""Of all events that were posted and are not sent yet."""

MOST_HAD: Final = 4096
"""How many events are remembered of which it is not known whether the store has them. Each costs a timeout."""

NOBODY: Final[frozenset[Core]] = frozenset()

Publication = Published | Sent
"""What the store says of an event; or this worker, where the store could not be asked, and the policy is "local"."""


@dataclass(slots=True, eq=False)
class Line:
    """One user's events that are not sent yet. With a future, somebody waits for it."""

    drafts: deque[tuple[Draft, "Future[Publication] | None"]] = field(
        default_factory=deque[tuple[Draft, "Future[Publication] | None"]]
    )
    size: int = 0


class Outgoing:
    """Thread-safe. ``lost`` is called, on the cluster's thread, for a posted event that could not be sent; ``lined_up``
    for one that was put in line here alone.
    """

    __slots__ = (
        "_asked",
        "_errands",
        "_had",
        "_hub",
        "_lined_up",
        "_lines",
        "_lock",
        "_lost",
        "_numbers",
        "_seals",
        "_size",
        "_worker",
    )

    def __init__(
        self,
        worker: Worker,
        errands: Errands,
        hub: Hub,
        seals: Seals,
        lost: Callable[[str, Draft], None],
        lined_up: Callable[[Sent], None],
    ) -> None:
        self._worker = worker
        self._errands = errands
        self._hub = hub
        self._seals = seals
        self._lost = lost
        self._lined_up = lined_up
        self.after_fork()

    def after_fork(self) -> None:
        """Begin anew in a forked child: what waits is sent by the parent."""
        self._lock = threading.RLock()  # reentrant: a finalizer that sends an event may come in between
        self._lines: dict[str, Line] = {}
        self._size = 0
        self._numbers = count(1)
        self._had: dict[str, frozenset[Core]] = {}
        self._asked: dict[str, Place | None] = {}  # what the store has not answered yet, and where it was heard of

    def heard(self, mark: str, place: Place) -> frozenset[Core]:
        """An event of this worker came from the store. Returns which connections had it here before, when it was not
        known whether the store had taken it; by the core of their context.
        """
        if mark in self._asked:
            self._asked[mark] = place
        return self._had.get(mark, NOBODY)

    def put(self, user_id: str, draft: Draft, waiter: "Future[Publication] | None" = None) -> bool:
        """Let an event wait. False when it has no room, or will never be sent; one that is waited for has room."""
        policy = self._hub.policy
        with self._lock:
            line = self._lines.get(user_id)
            is_new = line is None
            if line is None:
                line = self._lines[user_id] = Line()
            if waiter is None and (
                len(line.drafts) >= policy.queue_events
                or line.size + draft.size > policy.queue_bytes
                or self._size + draft.size > MOST_BYTES
            ):
                return False
            line.drafts.append((draft, waiter))
            line.size += draft.size
            self._size += draft.size
        return not is_new or self._begin(user_id, line)

    def _begin(self, user_id: str, line: Line) -> bool:
        async def send_all() -> None:
            try:
                while (one := self._next(user_id, line)) is not None:
                    await self._send(user_id, *one)
            finally:
                self._give_up(user_id, line)  # what is left when the thread ends; else nothing

        if self._worker.call(self._errands.start, send_all):
            return True
        self._next(user_id, line)  # the first is whoever's that asks, and learns it by the answer
        self._give_up(user_id, line)
        return False

    def _give_up(self, user_id: str, line: Line) -> None:
        """Nobody sends what is in a line any more: tell whoever waits for it, and let the next event begin another."""
        while (one := self._next(user_id, line)) is not None:
            draft, waiter = one
            if waiter is None:
                self._lost(user_id, draft)
            elif waiter.set_running_or_notify_cancel():
                waiter.set_exception(ClusterUnavailableError("down"))

    def _next(self, user_id: str, line: Line) -> "tuple[Draft, Future[Publication] | None] | None":
        with self._lock:
            if not line.drafts:
                if self._lines.get(user_id) is line:
                    del self._lines[user_id]
                return None
            draft, waiter = line.drafts.popleft()
            line.size -= draft.size
            self._size -= draft.size
            return draft, waiter

    async def _send(self, user_id: str, draft: Draft, waiter: "Future[Publication] | None") -> None:
        if waiter is not None and not waiter.set_running_or_notify_cancel():
            return  # whoever waited for it has given up before it was sent
        try:
            publication = await self._publication(user_id, draft)
        except BaseException as error:
            if waiter is None:
                self._lost(user_id, draft)
            else:
                waiter.set_exception(
                    error if isinstance(error, Exception) else ClusterUnavailableError("down", is_unknown=True)
                )
            if not isinstance(error, Exception):
                raise
            if waiter is None and not isinstance(error, ClusterUnavailableError):
                logger.exception("an event could not be sent")  # and those behind it are, all the same
        else:
            if waiter is not None:
                waiter.set_result(publication)

    async def _publication(self, user_id: str, draft: Draft) -> Publication:
        worker = self._worker
        await worker.looked()
        if worker.state == "down":
            raise ClusterUnavailableError("down")
        if worker.state == "local":
            return self._line_up(user_id, draft)
        user = worker.key_of(user_id)
        mark = f"{worker.id}.{next(self._numbers)}"
        sealed = self._seals.seal("event", user, draft.packed(mark))
        self._asked[mark] = None
        try:
            published = await worker.session.publish(user, sealed, keep_of(self._hub.policy))
        except ClusterUnavailableError as error:
            worker.doubt(error)
            if (place := self._asked[mark]) is not None:  # only the answer was lost
                return Published(place, 1, len(self._hub.connections_of(user_id)))
            if worker.policy.when_unavailable == "local":
                sent = self._line_up(user_id, draft)
                if error.is_unknown and sent.waiting:
                    self._note_had(mark, sent)
                return sent
            raise
        finally:
            del self._asked[mark]
        self._hub.purge_numbered(user_id)  # what was numbered here meanwhile is over
        return published

    def _note_had(self, mark: str, sent: Sent) -> None:
        self._had[mark] = frozenset(connection.context._core for connection, _ in sent.waiting)
        if len(self._had) > MOST_HAD:
            del self._had[next(iter(self._had))]

    def _line_up(self, user_id: str, draft: Draft) -> Sent:
        sent = self._hub.send(user_id, draft, is_looked_at=True)
        self._lined_up(sent)
        return sent


def keep_of(policy: EventPolicy) -> Keep:
    """What the store keeps of each user."""
    return Keep(policy.keep_events, policy.keep_bytes, policy.keep_seconds)
