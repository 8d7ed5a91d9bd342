"""One user's connections to this worker, and how far each of them is. The hub's lock is held around every method."""

from collections import deque
from dataclasses import dataclass

from ucm_middleware.cluster.places import MOST, Cursor, owed
from ucm_middleware.cluster.store import Place, Session, UserKey
from ucm_middleware.events.channel import Connection, LastEvent
from ucm_middleware.events.envelope import Event
from ucm_middleware.events.policy import EventPolicy
from ucm_middleware.ids import Core


@dataclass(frozen=True, slots=True)
class Heard:
    """What came from the store at a place. Without an event: it must not be delivered here. ``had_by`` are those who
    had it here already, by the core of their context.
    """

    place: Place
    event: Event | None
    had_by: frozenset[Core] = frozenset()


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose events are looked up, and from where on; and how many had been heard by then."""

    owed: list[tuple[Connection, Cursor]]
    after: int
    heard: int

    def is_other_epoch(self, newest: Place | None) -> bool:
        """Whether somebody was in another epoch than that which there is now."""
        epoch = None if newest is None else newest.epoch
        return any(cursor.epoch != epoch for _, cursor in self.owed)


@dataclass(frozen=True, slots=True)
class Owed:
    """What a connection is owed; None for what cannot be had, after ``last``. A ``newcomer`` has had nothing yet."""

    connection: Connection
    events: list[Heard] | None
    last: LastEvent
    newcomer: bool


class Audience:
    """Whoever is level gets what is heard at once. While somebody is behind, it also waits here; of what is more than
    a connection's queue, the oldest is dropped, and is looked up again with the rest.
    """

    __slots__ = (
        "_heard",
        "_is_asking",
        "_waiting",
        "_waiting_size",
        "cursors",
        "is_attended",
        "is_behind",
        "is_leaving",
        "key",
        "subscribed_by",
        "user_id",
    )

    def __init__(self, user_id: str, key: UserKey) -> None:
        self.user_id = user_id
        self.key = key
        self.cursors: dict[Connection, Cursor] = {}
        self.subscribed_by: Session | None = None
        self.is_behind = False
        """Whether what the store has kept must be looked up."""
        self.is_leaving = False
        """Whether it is not known that what is said to the user is told here no more."""
        self.is_attended = False
        self._is_asking = False
        self._waiting: deque[Heard] = deque()
        self._waiting_size = 0
        self._heard = 0

    def hear(self, heard: Heard, policy: EventPolicy) -> list[Connection]:
        """Something came. Returns those for whom it is the next one."""
        self._heard += 1
        level, is_behind = self._next_for(heard)
        if self._is_asking or self.is_behind or is_behind:
            self._wait(heard, policy)
            if not self._is_asking:
                self.is_behind = True
        return level

    def _next_for(self, heard: Heard) -> tuple[list[Connection], bool]:
        """For whom it is the next, who are then past it; and whether somebody lacks something before."""
        level: list[Connection] = []
        is_behind = False
        for connection, cursor in self.cursors.items():
            if cursor.precedes(heard.place):
                cursor.settle(heard.place)
                level.append(connection)
            elif not cursor.has(heard.place):
                is_behind = True
        return level, is_behind

    def _wait(self, heard: Heard, policy: EventPolicy) -> None:
        self._waiting.append(heard)
        self._waiting_size += _size_of(heard)
        while len(self._waiting) > policy.queue_events or self._waiting_size > policy.queue_bytes:
            self._waiting_size -= _size_of(self._waiting.popleft())

    def waiting(self) -> dict[Place, Heard]:
        """What was heard, and somebody lacked something before it."""
        return {heard.place: heard for heard in self._waiting}

    def ask(self) -> Asked:
        """What is to be looked up now. Who comes to be behind from now on is not among it."""
        self.is_behind = False
        self._is_asking = True
        known = [cursor.sequence for cursor in self.cursors.values() if cursor.sequence is not None]
        return Asked([*self.cursors.items()], min(min(known, default=MOST), MOST), self._heard)

    def unanswered(self) -> None:
        """It could not be looked up."""
        self.is_behind = True
        self._is_asking = False

    def answered(self, asked: Asked, newest: Place | None, kept: dict[int, Heard]) -> list[Owed]:
        """What each connection is owed up to the newest place; it is past that then."""
        available = dict(kept)
        for one in self._waiting:  # what was not kept may have been heard
            if newest is not None and one.place.epoch == newest.epoch:
                available[one.place.sequence] = one
        answers: list[Owed] = []
        for connection, cursor in asked.owed:
            if self.cursors.get(connection) is not cursor:
                continue
            sequences = owed(cursor, newest, available, tuple(kept))
            events = None if sequences is None else [available[one] for one in sequences]
            answers.append(Owed(connection, events, cursor.last, not cursor.is_settled))
            if newest is None or not cursor.has(newest):
                cursor.settle(newest)
        return answers

    def catch_up(self, asked: Asked) -> list[tuple[Connection, Heard]]:
        """What was heard after it was asked, and for whom it is next. Where something is missing, they are behind
        again: what had been heard before is in the answer, or in an epoch that is over.
        """
        old = len(self._waiting) - (self._heard - asked.heard)
        nexts: list[tuple[Connection, Heard]] = []
        for at, heard in enumerate(self._waiting):
            level, is_behind = self._next_for(heard)
            nexts += ((connection, heard) for connection in level)
            if is_behind and at >= old:
                self.is_behind = True
        self._is_asking = False
        if not self.is_behind:
            self._waiting.clear()
            self._waiting_size = 0
        return nexts


def _size_of(heard: Heard) -> int:
    return 0 if heard.event is None else heard.event.size
