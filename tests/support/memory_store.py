"""A store in memory that obeys the port of ``ucm_middleware.cluster.store``, with what can go wrong as switches.

``MemoryServer`` is the truth, shared by all workers of a test; ``MemoryStore`` is one worker's way to it, which can be
cut off. Its clock is the test's, so nothing here sleeps.
"""

import asyncio
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

from ucm_middleware.cluster.store import (
    BUCKETS,
    Alive,
    Gone,
    Granted,
    Hearer,
    History,
    Keep,
    Late,
    Notified,
    Order,
    Place,
    Published,
    Recovering,
    Refused,
    Release,
    Renewal,
    Session,
    Slot,
    Store,
    UserKey,
)
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError

T = TypeVar("T")

MOST_UNDONE = 64
"""How many of the last writes a failover can lose."""


@dataclass(slots=True)
class Tenancy:
    """What stands under a tenancy's key."""

    expires: float
    run: str
    fence: int = 0
    noticed: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class User:
    """What stands under a user's keys."""

    leases: dict[tuple[str, int], bool] = field(default_factory=dict)  # whether it is a connection
    position: str = ""
    run: str = ""  # that the epoch is of
    epoch: str = ""
    sequence: int = 0
    events: list[tuple[int, bytes]] = field(default_factory=list)
    notices: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass(slots=True)
class Data:
    """All that a server keeps: what a failover goes back to an earlier state of."""

    seals: str | None = None
    engines: dict[int, tuple[str, float]] = field(default_factory=dict)
    tenancies: dict[tuple[int, str], Tenancy] = field(default_factory=dict)
    users: dict[UserKey, User] = field(default_factory=dict)
    fences: dict[tuple[int, str], int] = field(default_factory=dict)  # of tenancies that have not begun


class MemoryServer:
    """The store's server. Its switches:

    ``is_down``: nobody is answered. ``refuses_orders``: why it takes none, while it renews what is held.
    ``lose_answers``: so many commands are done, and never answered. ``lose_orders``: so many are neither done nor
    answered; with ``are_late``, ``deliver_late`` does them after all. ``hold()`` keeps commands waiting before they are
    done, ``let_go()`` ends that.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.is_down = False
        self.lost_buckets: set[int] = set()  # they stand on a server of the cluster that is down
        self.reason = "down"
        self.refuses_orders: str | None = None
        self.lose_answers = 0
        self.lose_orders = 0
        self.lose_only: str | None = None  # the command whose orders and answers get lost, where not all do
        self.are_late = False
        self.remembers = False  # whether earlier states are kept, for a failover to lose writes
        self.commands: list[str] = []
        self._lock = threading.RLock()
        self._runs = map("run-{}".format, count(1))
        self._epochs = map("epoch{}".format, count(1))
        self._positions = count(1)
        self._late: list[Callable[[], object]] = []
        self._held: list[asyncio.Future[None]] | None = None
        self.someone_waits = asyncio.Event()
        self._before: deque[Data] = deque(maxlen=MOST_UNDONE)
        self.run = next(self._runs)
        self.data = Data()
        self.sessions: list[MemorySession] = []

    # Switches.

    def wipe(self) -> None:
        """Be restarted, with nothing in it."""
        with self._lock:
            self.run = next(self._runs)
            self.data = Data()
            self._before.clear()
        self._tell_deaf()

    def fail_over(self, lost_writes: int) -> None:
        """Be another server, which never heard of the last so many writes."""
        with self._lock:
            for _ in range(min(lost_writes, len(self._before))):
                self.data = self._before.pop()
            self._before.clear()
            self.run = next(self._runs)
        self._tell_deaf()

    def hold(self) -> None:
        """Keep commands waiting from now on. ``someone_waits`` says, on the test's own loop, when one does."""
        self._held = []
        self.someone_waits = asyncio.Event()

    def let_go(self) -> None:
        """Do what waits, and wait no more."""
        held, self._held = self._held or [], None
        for one in held:
            one.get_loop().call_soon_threadsafe(_wake, one)

    @property
    def waiting(self) -> int:
        """How many commands are kept waiting."""
        return len(self._held or ())

    def deliver_late(self) -> None:
        """Do what was on its way all the time."""
        late, self._late = self._late, []
        for work in late:
            work()

    # The truth.

    def live_of(self, key: UserKey) -> list[Slot]:
        """A user's live leases."""
        with self._lock:
            user = self.data.users.get(key)
            leases = {} if user is None else user.leases
            return [
                Slot(key, tenancy, number, is_connection)
                for (tenancy, number), is_connection in leases.items()
                if self._is_live(key.bucket, tenancy)
            ]

    def live(self) -> dict[UserKey, list[Slot]]:
        """All live leases, by user."""
        found = {key: self.live_of(key) for key in list(self.data.users)}
        return {key: slots for key, slots in found.items() if slots}

    def recovers(self, bucket: int, lease: float) -> float:
        """For how many seconds a bucket recovers still."""
        run, since = self.data.engines.get(bucket, ("", 0.0))
        return lease if run != self.run else max(0.0, since + lease - self.clock())

    def _is_live(self, bucket: int, tenancy: str) -> bool:
        found = self.data.tenancies.get((bucket, tenancy))
        return found is not None and self.clock() < found.expires

    def _see(self, bucket: int, lease: float) -> float:
        """Let the server see the bucket. Returns for how long it recovers."""
        data = self.data
        if data.engines.get(bucket, ("", 0.0))[0] != self.run:
            data.engines[bucket] = (self.run, self.clock())
        for at, tenancy in list(data.tenancies.items()):
            if at[0] == bucket and self.clock() >= tenancy.expires:
                del data.tenancies[at]
        return self.recovers(bucket, lease)

    # How commands are done.

    async def ask(self, session: "MemorySession", name: str, work: Callable[[], T]) -> T:
        """Do a command, or fail as the switches say."""
        self.commands.append(name)
        if self._held is not None:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._held.append(waiting)
            self.someone_waits.set()
            await waiting
        else:
            await asyncio.sleep(0)
        with self._lock:
            if self.is_down or session.store.is_cut:
                raise ClusterUnavailableError(self.reason)
            is_at_risk = self.lose_only in (None, name)
            if self.lose_orders > 0 and is_at_risk:
                self.lose_orders -= 1
                if self.are_late:
                    self._late.append(partial(self._write, work))
                raise ClusterUnavailableError("timeout", is_unknown=True)
            done = self._write(work)
            if self.lose_answers > 0 and is_at_risk:
                self.lose_answers -= 1
                raise ClusterUnavailableError("timeout", is_unknown=True)
            return done

    def _write(self, work: Callable[[], T]) -> T:
        with self._lock:
            if self.remembers:
                self._before.append(copy.deepcopy(self.data))
            return work()

    # The commands.

    def inspect(self, prefix: str, seals: Sequence[str]) -> int:
        if self.data.seals is None:
            self.data.seals = seals[0]
        if self.data.seals not in seals:
            raise ConfigurationError(f"cluster: the keys under {prefix!r} belong to an application with another secret")
        return seals.index(self.data.seals)

    def enroll(self, lease: float) -> float:
        if self.lost_buckets:
            raise ClusterUnavailableError(self.reason)
        return max(self._see(bucket, lease) for bucket in range(BUCKETS))

    def acquire(self, order: Order) -> Granted | Refused | Gone | Late | Recovering:
        slot, data = order.slot, self.data
        key = slot.user
        if self.refuses_orders is not None:
            raise ClusterUnavailableError(self.refuses_orders)
        if key.bucket in self.lost_buckets:
            raise ClusterUnavailableError(self.reason)
        if seconds := self._see(key.bucket, order.lease):
            return Recovering(seconds)
        at = (key.bucket, slot.tenancy)
        tenancy = data.tenancies.get(at)
        if tenancy is None:
            if not order.begins:
                return Gone()
            tenancy = Tenancy(self.clock() + order.lease, self.run, data.fences.get(at, 0))
        if slot.number <= tenancy.fence:
            return Late()
        user = data.users.setdefault(key, User())
        if at not in data.tenancies:  # what stood under one that ended does not stand under this one
            user.leases = {name: kind for name, kind in user.leases.items() if name[0] != slot.tenancy}
        data.tenancies[at] = tenancy  # also where it is refused
        others = [one for one in self.live_of(key) if (one.tenancy, one.number) != (slot.tenancy, slot.number)]
        if len(others) >= order.per_user:
            return Refused("user")
        if slot.is_connection and sum(one.is_connection for one in others) >= order.connections:
            return Refused("connections")
        user.leases[slot.tenancy, slot.number] = slot.is_connection
        return Granted(user.position, _place(user))

    def release(self, releases: Sequence[Release]) -> None:
        for one in releases:
            slot = one.slot
            if (user := self.data.users.get(slot.user)) is not None:
                user.leases.pop((slot.tenancy, slot.number), None)
            if not one.fence:
                continue
            at = (slot.user.bucket, slot.tenancy)
            tenancy = self.data.tenancies.get(at)
            if tenancy is not None:
                tenancy.fence = max(tenancy.fence, slot.number)
            else:  # one that has not begun is held back as well
                self.data.fences[at] = max(self.data.fences.get(at, 0), slot.number)

    def renew(self, renewals: Sequence[Renewal]) -> list[Alive | Gone | Recovering | None]:
        if all(one.bucket in self.lost_buckets for one in renewals):
            raise ClusterUnavailableError(self.reason)
        return [None if one.bucket in self.lost_buckets else self._renew(one) for one in renewals]

    def _renew(self, one: Renewal) -> Alive | Gone | Recovering:
        seconds = self._see(one.bucket, one.lease)
        tenancy = self.data.tenancies.get((one.bucket, one.tenancy))
        if seconds and (tenancy is None or tenancy.run != self.run):
            return Recovering(seconds)
        if tenancy is None:
            return Gone()
        tenancy.expires = self.clock() + one.lease
        for digest, position in one.told:
            if tenancy.noticed.get(digest) == position:
                del tenancy.noticed[digest]
        return Alive(tuple(tenancy.noticed.items()))

    def restore(self, bucket: int, name: str, lease: float, slots: Sequence[Slot]) -> bool:
        if not self._see(bucket, lease):
            return False
        tenancy = self.data.tenancies[bucket, name] = Tenancy(self.clock() + lease, self.run)
        for slot in slots:
            user = self.data.users.setdefault(slot.user, User())
            user.leases[name, slot.number] = slot.is_connection
            if user.position:
                tenancy.noticed[slot.user.digest] = user.position
        return True

    def publish(self, key: UserKey, payload: bytes, keep: Keep) -> Published:
        user = self.data.users.setdefault(key, User())
        if not user.epoch or user.run != self.run:  # numbers of events that were lost must not be given again
            user.epoch, user.sequence, user.events, user.run = next(self._epochs), 0, [], self.run
        user.sequence += 1
        if keep.events > 0 and len(payload) <= keep.size:  # what is larger is not kept, and pushes nothing out
            user.events.append((user.sequence, payload))
        while len(user.events) > keep.events or sum(len(kept) for _, kept in user.events) > keep.size:
            user.events.pop(0)
        place = Place(user.epoch, user.sequence)
        workers = [session for session in self.sessions if key in session.subscribed and session.hears]
        for session in workers:
            session.call("event", key, place, payload)
        return Published(place, len(workers), sum(slot.is_connection for slot in self.live_of(key)))

    def history(self, key: UserKey, after: int) -> History:
        user = self.data.users.get(key)
        if user is None or not user.epoch:
            return History(None, ())
        return History(_place(user), tuple(event for event in user.events if event[0] > after))

    def notify(self, key: UserKey, notice: bytes, *, forget_events: bool) -> Notified:
        user = self.data.users.setdefault(key, User())
        position = f"{next(self._positions):015}-0"
        user.position = position
        user.notices.append((position, notice))
        if forget_events:
            user.epoch, user.sequence, user.events = "", 0, []
        live = self.live_of(key)
        tenancies = list(dict.fromkeys(slot.tenancy for slot in live))
        for name in tenancies:
            self.data.tenancies[key.bucket, name].noticed[key.digest] = position
        for session in self.sessions:
            if tenancies and session.hears:
                session.call("nudged", key.bucket, tenancies)
        return Notified(position, len(live))

    def notices(self, key: UserKey, after: str) -> list[tuple[str, bytes]]:
        user = self.data.users.get(key)
        return [] if user is None else [notice for notice in user.notices if notice[0] > after]

    def count(self) -> tuple[int, int]:
        live = self.live()
        return sum(map(len, live.values())), len(live)

    def _tell_deaf(self) -> None:
        for session in self.sessions:
            if session.hears:
                session.call("deaf")


class MemorySession(Session):
    """One loop's way to the server."""

    def __init__(self, store: "MemoryStore") -> None:
        self.store = store
        self.loop = asyncio.get_running_loop()
        self.hearer: Hearer | None = None
        self.subscribed: set[UserKey] = set()
        self.is_closed = False
        store.server.sessions.append(self)

    @property
    def hears(self) -> bool:
        """Whether it would be told something now."""
        return self.hearer is not None and not self.store.is_cut

    def call(self, name: str, *args: Any) -> None:
        """Tell the hearer something, on the session's loop."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(partial(getattr(self.hearer, name), *args), context=Context())

    async def _ask(self, name: str, work: Callable[[], T]) -> T:
        assert asyncio.get_running_loop() is self.loop, "a session belongs to one loop"
        assert not self.is_closed, "the session is closed"
        return await self.store.server.ask(self, name, work)

    async def inspect(self) -> int:
        return await self._ask("inspect", partial(self.store.server.inspect, self.store.prefix, self.store.seals))

    async def enroll(self, lease: float) -> float:
        return await self._ask("enroll", partial(self.store.server.enroll, lease))

    async def is_full(self) -> bool:
        return await self._ask("is_full", lambda: self.store.server.refuses_orders == "memory")

    async def acquire(self, order: Order) -> Granted | Refused | Gone | Late | Recovering:
        return await self._ask("acquire", partial(self.store.server.acquire, order))

    async def release(self, releases: Sequence[Release]) -> None:
        await self._ask("release", partial(self.store.server.release, releases))

    async def renew(self, renewals: Sequence[Renewal]) -> list[Alive | Gone | Recovering | None]:
        return await self._ask("renew", partial(self.store.server.renew, renewals))

    async def restore(self, bucket: int, tenancy: str, lease: float, slots: Sequence[Slot]) -> bool:
        return await self._ask("restore", partial(self.store.server.restore, bucket, tenancy, lease, slots))

    async def publish(self, user: UserKey, payload: bytes, keep: Keep) -> Published:
        return await self._ask("publish", partial(self.store.server.publish, user, payload, keep))

    async def history(self, user: UserKey, after: int) -> History:
        return await self._ask("history", partial(self.store.server.history, user, after))

    async def notify(self, user: UserKey, notice: bytes, *, forget_events: bool) -> Notified:
        work = partial(self.store.server.notify, user, notice, forget_events=forget_events)
        return await self._ask("notify", work)

    async def notices(self, user: UserKey, after: str) -> list[tuple[str, bytes]]:
        return await self._ask("notices", partial(self.store.server.notices, user, after))

    async def leases_of(self, user: UserKey) -> list[Slot]:
        return await self._ask("leases_of", partial(self.store.server.live_of, user))

    async def count(self) -> tuple[int, int]:
        return await self._ask("count", self.store.server.count)

    async def listen(self, hearer: Hearer) -> None:
        self.hearer = hearer

    async def subscribe(self, user: UserKey) -> None:
        await self._ask("subscribe", partial(self.subscribed.add, user))

    async def unsubscribe(self, user: UserKey) -> None:
        await self._ask("unsubscribe", partial(self.subscribed.discard, user))

    async def aclose(self) -> None:
        self.is_closed = True
        self.hearer = None
        if self in self.store.server.sessions:
            self.store.server.sessions.remove(self)


class MemoryStore(Store):
    """One worker's store. ``is_cut``: the network between it and the server is."""

    def __init__(self, server: MemoryServer, prefix: str = "ucm:ucm:", seals: Sequence[str] = ("seal",)) -> None:
        self.server = server
        self.prefix = prefix
        self.seals = tuple(seals)
        self.is_cut = False

    def session(self) -> MemorySession:
        return MemorySession(self)


def _place(user: User) -> Place | None:
    return Place(user.epoch, user.sequence) if user.epoch else None


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
