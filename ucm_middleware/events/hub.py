"""The hub: from an event for a user to each of that user's connections, and to nobody else's."""

# pyright: reportPrivateUsage=false
# The fields of a context are read where they are.

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ucm_middleware.audit.records import Data
from ucm_middleware.audit.trail import LostBy
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextNotFoundError, InvalidContextError
from ucm_middleware.events.channel import MAX_FOLLOWED, NO_IDS, Channel, Connection, LastEvent
from ucm_middleware.events.delivery import Delivery, Dropped
from ucm_middleware.events.envelope import TO_ALL, Draft, Event, Origin
from ucm_middleware.events.policy import EVENTS_MISSED, EventPolicy
from ucm_middleware.expiry import front
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import Core, is_anonymous_id
from ucm_middleware.lifetime import WEBSOCKET

SLICE: Final = 256
"""How many users' events are forgotten at a time, so that the lock is never held for long."""


@dataclass(slots=True)
class Sent:
    """An event that is on its way: the connections in whose line it stands, and its place there. ``full`` are those
    that must be closed for it.
    """

    event: Event
    epoch: str
    waiting: list[tuple[Connection, int]]
    dropped: list[Dropped]
    full: list[UserExecutionContext]
    kept: bool

    @property
    def placed(self) -> Data:
        """For the record: its place, and for how many connections it waits."""
        return ("sequence", self.event.sequence), ("connections", len(self.waiting))

    def delivery(self) -> Delivery:
        """What has become of it by now."""
        number = self.event.sequence
        delivered = queued = 0
        dropped = self.dropped.copy()
        for connection, place in self.waiting:
            outbox = connection.outbox
            if outbox.sent >= place:
                delivered += 1
            elif outbox.is_over:
                dropped.append(Dropped(connection.id, number, "gone"))
            else:
                queued += 1
        return Delivery(self.epoch, number, delivered, queued, tuple(dropped), self.kept)


class Watch(Protocol):
    """Looks at what is sent to users."""

    def holds_back(self, user_id: str, text: str) -> bool:
        """Whether an event with this data must not be sent."""
        ...

    def look_at(self, user_id: str, text: str) -> None:
        """It was put in line: tell what is found in it."""
        ...

    def keeps_out(self, user_id: str, text: str) -> bool:
        """Whether an event that another worker has sent must not be put in line here, where other values are known.
        What is found is told in any case.
        """
        ...


class Posted(Protocol):
    """What is known of an event that was given away to be sent."""

    @property
    def placed(self) -> Data:
        """For the record: what is known of its place by then."""
        ...

    @property
    def dropped(self) -> Sequence[Dropped]:
        """What is lost already."""
        ...

    @property
    def full(self) -> Sequence[UserExecutionContext]:
        """The contexts of connections that must be closed for it."""
        ...

    def delivery(self) -> Delivery:
        """What has become of it by now."""
        ...


class Relays(Protocol):
    """Brings a named user's events to all workers that share the user. Events come back to each of them that has a
    connection, this one too.
    """

    def post(self, user_id: str, draft: Draft) -> Posted:
        """Have an event sent, behind those of the same user that were posted here before. Never waits."""
        ...

    async def publish(self, user_id: str, draft: Draft) -> Posted:
        """The same, and wait for its place. Raises ClusterUnavailableError."""
        ...

    async def knows_soon(self, user_id: str) -> bool:
        """Whether a user is live on any worker, or has events that are kept. Raises ClusterUnavailableError."""
        ...

    def knows(self, user_id: str) -> bool:
        """The same in a thread, which it holds up."""
        ...

    def joined(self, connection: Connection, user_id: str, channel: Channel) -> None:
        """A connection is there, and is owed what came after its place. Never waits; the hub's lock is held."""
        ...

    def left(self, connection: Connection, user_id: str) -> None:
        """It is not there any more. Never waits; the hub's lock is held."""
        ...


class Hub:
    """Thread-safe. One lock, which is held for the few steps that give an event its place and put it in line.

    ``clock`` is monotonic, in seconds; ``plan`` sees to it that ``sweep`` is called at a reading of it.
    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_channels",
        "_clock",
        "_keeping",
        "_kept_size",
        "_lock",
        "_plan",
        "_wake",
        "policy",
        "relay",
        "watch",
    )

    def __init__(self, policy: EventPolicy, clock: Callable[[], float], plan: Callable[[float], None]) -> None:
        self.policy = policy
        self.watch: Watch | None = None
        self.relay: Relays | None = None
        self._clock = clock
        self._plan = plan
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the connections are the parent's."""
        # Reentrant: a finalizer that sends an event may come in between.
        self._lock = threading.RLock()
        self._channels: dict[str, Channel] = {}
        # What connections follow that are not accepted yet, by the core of their context.
        self._ahead: dict[Core, frozenset[str]] = {}
        # Those that keep events, in the order of their newest: so the first of them is due first.
        self._keeping: dict[str, Channel] = {}
        self._kept_size = 0
        self._wake: float | None = None

    @property
    def lock(self) -> threading.RLock:
        """What outboxes share with the hub."""
        return self._lock

    def relay_of(self, user_id: str) -> Relays | None:
        """What brings this user's events to other workers; None where there are none that could have the user's
        connections. Those of an anonymous one are all here.
        """
        return None if self.relay is None or is_anonymous_id(user_id) else self.relay

    def knows(self, user_id: str) -> bool:
        """Whether the user has a connection here, or events that are kept."""
        return user_id in self._channels

    def connections_of(self, user_id: str) -> list[Connection]:
        """The user's connections to this worker."""
        with self._lock:
            channel = self._channels.get(user_id)
            return [] if channel is None else [*channel.connections.values()]

    def send(self, user_id: str, draft: Draft, *, is_looked_at: bool = False) -> Sent:
        """Put an event in line for each connection of the user to this worker that it is for, and keep it. With
        ``is_looked_at``, the guard has seen it.
        """
        watch = None if is_looked_at else self.watch
        if watch is not None and watch.holds_back(user_id, draft.data_text):
            return self._held_back(user_id, draft)
        with self._lock:
            wake = self._wake
            channel = self._channel(user_id)
            event = channel.number(draft, self._clock())
            sent = Sent(event, channel.epoch, [], [], [], self._keep(user_id, channel, event))
            for connection in tuple(channel.connections.values()):
                if event.narrowing is TO_ALL or connection.gets(event.narrowing):
                    self._put(connection, event, sent)
            self._forget_idle(user_id, channel)
        if wake is None and (wake := self._wake) is not None:
            self._plan(wake)  # not with the lock held: the sweeper has a lock of its own
        for connection, _ in sent.waiting:
            connection.outbox.wake()
        if watch is not None:
            watch.look_at(user_id, draft.data_text)
        return sent

    def _held_back(self, user_id: str, draft: Draft) -> Sent:
        """An event that nobody gets: it takes no place in the order, where clients would miss it."""
        with self._lock:
            channel = self._channel(user_id)
            number = channel.sequence
            dropped = [
                Dropped(connection.id, number, "guarded")
                for connection in channel.connections.values()
                if connection.gets(draft.narrowing)
            ]
            sent = Sent(draft.numbered(channel.epoch, number, self._clock()), channel.epoch, [], dropped, [], False)
            self._forget_idle(user_id, channel)
        return sent

    def _put(self, connection: Connection, event: Event, sent: Sent) -> None:
        lost = connection.outbox.put(event)
        for sequence, why in lost:
            sent.dropped.append(Dropped(connection.id, sequence, why))
            if why == "full":
                sent.full.append(connection.context)
        if not lost or lost[-1][1] == "oldest":
            sent.waiting.append((connection, connection.outbox.placed))

    # Connections.

    def join(self, connection: Connection) -> None:
        """Send this connection what was kept after its last event, and from now on its user's events."""
        context = connection.context
        with self._lock:
            user_id = context.user_id  # once: an anonymous context may learn its user in the middle of this
            channel = self._channel(user_id)
            channel.connections[context._core] = connection
            connection.followed |= self._ahead.pop(context._core, NO_IDS)
            relay = None if self.relay is None else self.relay_of(user_id)
            if relay is None:
                self.replay(connection, channel, user_id)
            else:
                relay.joined(connection, user_id, channel)
        if context.lifetime.is_open:
            connection.outbox.wake()
        else:  # closed in the middle of this, and whoever closed it may have found no connection
            self.leave(context)

    def move(self, context: UserExecutionContext, old_id: str) -> None:
        """A connection's context, which was anonymous, has learned its user."""
        with self._lock:
            old = self._channels.get(old_id)
            connection = None if old is None else old.connections.pop(context._core, None)
            if old is not None:
                self._forget_idle(old_id, old)
        if connection is not None:
            self.join(connection)

    def leave(self, context: UserExecutionContext) -> None:
        """The context is about to close: nothing is sent to its connection any more."""
        with self._lock:
            user_id = context._user_id
            self._ahead.pop(context._core, None)
            channel = self._channels.get(user_id)
            connection = None if channel is None else channel.connections.pop(context._core, None)
            if channel is not None:
                self._forget_idle(user_id, channel)
            if connection is not None:
                connection.outbox.end()
                if self.relay is not None:
                    self.relay.left(connection, user_id)

    def hush(self, context: UserExecutionContext) -> None:
        """Another worker has signed the user out: what is sent from now on is not for this connection, which is about
        to be closed.
        """
        with self._lock:
            connection = self.connection_of(context)
            if connection is not None:
                connection.is_hushed = True

    def follow(self, context: UserExecutionContext, *ids: str) -> None:
        """Let a connection have the events of these threads and runs too. Before it is accepted, those that are
        replayed to it among them.

        Raises ContextNotFoundError without a live connection, InvalidContextError for too many.
        """
        with self._lock:
            connection = self.connection_of(context)
            if connection is None and not _awaits_accept(context):
                raise ContextNotFoundError(
                    "this context is of no live connection: only a WebSocket follows, and until it is closed"
                )
            core = context._core
            before = self._ahead.get(core, NO_IDS) if connection is None else connection.followed
            followed = before.union(ids)
            if len(followed) > MAX_FOLLOWED:
                raise InvalidContextError(
                    "ids", f"are {len(followed)}, and a connection follows {MAX_FOLLOWED} at most", "leave some out"
                )
            if connection is None:
                self._ahead[core] = followed
            else:
                connection.followed = followed

    def connection_of(self, context: UserExecutionContext) -> Connection | None:
        """The connection of a context; None before it is accepted, and once it is over."""
        channel = self._channels.get(context.user_id)
        return None if channel is None else channel.connections.get(context._core)

    def replay(self, connection: Connection, channel: Channel, user_id: str) -> None:
        """Put in line what was kept here after a connection's last event. The lock is held."""
        after = connection.after
        if after is None or is_anonymous_id(user_id):  # then there is nothing yet that it could have missed
            return
        connection.after = None
        self._kept_size -= channel.drop_before(self._clock() - self.policy.keep_seconds)
        self._stop_keeping_if_empty(user_id, channel)
        events = channel.since(after)
        if events is None:
            draft = missed(user_id, after, self.policy)
            # With the newest number there is: what comes after it is live.
            events = [draft.numbered(channel.epoch, channel.sequence, self._clock())]
        for event in events:
            if connection.gets(event.narrowing):
                connection.outbox.replay(event)

    # What is kept.

    def purge(self, user_id: str) -> None:
        """Forget what was kept for a user, and let no number that was given be one to come back with."""
        with self._lock:
            channel = self._channels.get(user_id)
            if channel is None:
                return
            self._kept_size -= channel.kept_size
            fresh = Channel()
            fresh.connections = channel.connections
            self._keeping.pop(user_id, None)
            self._channels[user_id] = fresh
            self._forget_idle(user_id, fresh)

    def purge_numbered(self, user_id: str | None = None) -> None:
        """The same, for named users whose events were numbered here: this one, or all of them with None."""
        with self._lock:
            for one in tuple(self._channels) if user_id is None else (user_id,):
                channel = self._channels.get(one)
                if channel is not None and channel.sequence > 0 and not is_anonymous_id(one):
                    self.purge(one)

    def sweep(self) -> None:
        """Forget what was kept for long enough, some users' at a time: others wait for the lock."""
        while self._forget_some():
            pass

    def _forget_some(self) -> bool:
        """Whether there may be more of it."""
        with self._lock:
            due = self._clock() - self.policy.keep_seconds
            for user_id in front(self._keeping, SLICE):
                channel = self._keeping.get(user_id)
                if channel is None:
                    continue  # a finalizer has just taken it out
                if channel.kept[-1].at > due:
                    self._wake = channel.kept[-1].at + self.policy.keep_seconds
                    return False
                self._kept_size -= channel.drop_before(due)
                self._stop_keeping_if_empty(user_id, channel)
            if not self._keeping:
                self._wake = None
            return bool(self._keeping)

    def next_wake(self) -> float | None:
        """When ``sweep`` may have something to do, on the hub's clock. It takes no lock: whoever asks may hold one that
        a sender waits for.
        """
        return self._wake

    def _keep(self, user_id: str, channel: Channel, event: Event) -> bool:
        policy = self.policy
        if is_anonymous_id(user_id):  # nobody can come back as this one
            return False
        if policy.keep_events == 0 or event.size > min(policy.keep_bytes, policy.keep_total_bytes):
            return False
        self._kept_size -= channel.drop_before(event.at - policy.keep_seconds)
        self._kept_size += channel.keep(event, policy)
        self._keeping.pop(user_id, None)
        self._keeping[user_id] = channel  # now the last of them
        while self._kept_size > policy.keep_total_bytes:
            first = next(iter(self._keeping))
            self._kept_size -= self._keeping[first].drop_oldest()
            self._stop_keeping_if_empty(first, self._keeping[first])
        if self._wake is None:
            self._wake = event.at + policy.keep_seconds
        return True

    def _stop_keeping_if_empty(self, user_id: str, channel: Channel) -> None:
        if not channel.kept:
            self._keeping.pop(user_id, None)
            self._forget_idle(user_id, channel)

    def _channel(self, user_id: str) -> Channel:
        channel = self._channels.get(user_id)
        if channel is None:
            self._channels[user_id] = channel = Channel()
        return channel

    def _forget_idle(self, user_id: str, channel: Channel) -> None:
        if not channel.connections and not channel.kept and self._channels.get(user_id) is channel:
            del self._channels[user_id]


def lost_by(sent: Posted) -> LostBy | None:
    """For the record: by what an event is lost with it, if any is."""
    for lost in sent.dropped:
        if lost.why == "cluster":
            return "cluster"
        if lost.why in ("full", "oldest"):
            return "full"
    return None


def missed(user_id: str, after: LastEvent, policy: EventPolicy) -> Draft:
    """What tells a connection that not all after this event can be had."""
    about = {"epoch": after.epoch, "sequence": after.sequence}
    return Draft(EVENTS_MISSED, about, Origin(user_id), TO_ALL, policy)


def _awaits_accept(context: UserExecutionContext) -> bool:
    """Whether it is of a connection that may still be accepted. Whoever closes it looks here after that."""
    return context.lifetime.opened_by == WEBSOCKET and context.lifetime.is_open
