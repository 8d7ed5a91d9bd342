"""One user's events: their order, the connections that get them, and the newest of them."""

from collections import deque
from dataclasses import dataclass
from secrets import token_hex
from typing import Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.events.envelope import Draft, Event, Narrowing
from ucm_middleware.events.outbox import Outbox
from ucm_middleware.events.policy import EventPolicy
from ucm_middleware.ids import Core

MAX_FOLLOWED: Final = 100
"""How many threads and runs one connection may follow."""


NO_IDS: Final[frozenset[str]] = frozenset()
NO_EVENTS: Final[deque[Event]] = deque(maxlen=0)
"""Stands for none that are kept: most channels keep none, and a queue takes 760 bytes."""


@dataclass(frozen=True, slots=True)
class LastEvent:
    """The last event that a client had. None for what it did not name, or in a way that names none."""

    epoch: str | None
    sequence: int | None


class Connection:
    """A live connection of a user, by its context. ``after`` is the last event its client had, if it named one.
    ``is_hushed`` is whether it gets nothing more from other workers, since its user is signed out.
    """

    __slots__ = ("after", "context", "followed", "is_hushed", "outbox")

    def __init__(self, context: UserExecutionContext, outbox: Outbox, after: LastEvent | None = None) -> None:
        self.context = context
        self.outbox = outbox
        self.after = after
        self.followed = NO_IDS
        self.is_hushed = False

    @property
    def id(self) -> str:
        """Its ``websocket_client_id``, or the id of its context where it has none."""
        return self.context.websocket_client_id or self.context.context_id

    def gets(self, narrowing: Narrowing) -> bool:
        """Whether an event that is narrowed in this way is for this connection."""
        if narrowing.connection_id is not None and narrowing.connection_id != self.id:
            return False
        context = self.context
        return (
            narrowing.thread_id is None
            or narrowing.thread_id == context.thread_id
            or narrowing.thread_id in self.followed
        ) and (narrowing.run_id is None or narrowing.run_id == context.run_id or narrowing.run_id in self.followed)


class Channel:
    """The hub's lock is held around every method.

    The epoch begins with the channel, and anew when what was kept is purged: a sequence means nothing in another one.
    """

    __slots__ = ("connections", "epoch", "kept", "kept_size", "sequence")

    def __init__(self) -> None:
        self.connections: dict[Core, Connection] = {}  # by the core of their context
        self.sequence = 0
        self.kept: deque[Event] = NO_EVENTS
        self.kept_size = 0
        self.epoch = token_hex(8)

    def number(self, draft: Draft, at: float) -> Event:
        """Give an event its place in the order."""
        self.sequence += 1
        return draft.numbered(self.epoch, self.sequence, at)

    def keep(self, event: Event, policy: EventPolicy) -> int:
        """Keep an event, and of those before it what there is room for. Returns by how many bytes that is more."""
        before = self.kept_size
        if not self.kept:
            self.kept = deque()
        self.kept.append(event)
        self.kept_size += event.size
        while len(self.kept) > policy.keep_events or self.kept_size > policy.keep_bytes:
            self.drop_oldest()
        return self.kept_size - before

    def drop_oldest(self) -> int:
        """Keep the oldest event no longer. Returns its bytes."""
        oldest = self.kept.popleft()
        self.kept_size -= oldest.size
        if not self.kept:
            self.kept = NO_EVENTS
        return oldest.size

    def drop_before(self, at: float) -> int:
        """Keep no event that is older. Returns how many bytes that were."""
        before = self.kept_size
        while self.kept and self.kept[0].at <= at:
            self.drop_oldest()
        return before - self.kept_size

    def since(self, after: LastEvent) -> list[Event] | None:
        """What was kept after an event; None when that is unknown, or not all that came after it is kept."""
        sequence = after.sequence
        if sequence is None or sequence < 0 or sequence > self.sequence:
            return None
        if sequence == 0 and after.epoch is None:  # whatever there is
            return list(self.kept)
        if after.epoch != self.epoch:
            return None
        newer = [event for event in self.kept if event.sequence > sequence]
        return newer if len(newer) == self.sequence - sequence else None
