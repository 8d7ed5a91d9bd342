"""Workers of a cluster in one event loop, without their thread: what the relay and the notices need, step by step."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from support.clock import Clock
from support.events import Client, accept, open_connection
from support.memory_store import MemoryServer, MemorySession, MemoryStore
from ucm_middleware import EventPolicy, UserContextManager, UserExecutionContext
from ucm_middleware.cluster.errands import Errands
from ucm_middleware.cluster.notices import Notice, Notices
from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.relay import Relay
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Order, Place, Slot, UserKey
from ucm_middleware.cluster.worker import Held
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.secret import Secret
from ucm_middleware.testing import closing_contexts

SECRET = Secret(b"one secret of all the workers of a test, 48 bytes")

T = TypeVar("T")

LEASE = 3600.0

_numbers = count(1)


def seasoned() -> MemoryServer:
    """A server that has recovered from its start."""
    server = MemoryServer(Clock())
    recover(server)
    return server


def recover(server: MemoryServer) -> None:
    """Let the time go by in which it grants nothing."""
    assert isinstance(server.clock, Clock)
    server.enroll(LEASE)
    server.clock.advance(LEASE + 1)


@dataclass(eq=False)
class StubLease:
    """A lease of a context."""

    user: UserKey
    slot: Slot
    position: str
    events: Place | None
    context: UserExecutionContext | None = None
    is_awaited: bool = False
    is_restored: bool = False


class LossySession(MemorySession):
    """One whose answers may take a while, and whose connection for what is told may be slow, or lost with what is on
    it.
    """

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.lag = 0
        """Rounds of the loop that an answer takes."""
        self.is_slow = False
        self._told: list[tuple[str, tuple[Any, ...]]] = []

    async def _ask(self, name: str, work: Callable[[], T]) -> T:
        answer = await super()._ask(name, work)
        for _ in range(self.lag):
            await asyncio.sleep(0)
        return answer

    def call(self, name: str, *args: Any) -> None:
        self._told.append((name, args))
        if not self.is_slow:
            self.loop.call_soon_threadsafe(self.hear, context=Context())

    def hear(self) -> None:
        """What was told comes in."""
        told, self._told = self._told, []
        for name, args in told:
            getattr(self.hearer, name)(*args)

    def lose_told(self) -> None:
        """What was told and is not heard yet, is lost."""
        self._told = [("deaf", ())]
        self.loop.call_soon_threadsafe(self.hear, context=Context())


@dataclass(eq=False)
class StubWorker:
    """A worker on the running loop. The tests say how it stands with the store."""

    store: MemoryStore
    policy: ClusterPolicy
    id: str = field(default_factory=lambda: f"worker{next(_numbers)}")
    state: str = "up"
    leases: list[StubLease] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.session = LossySession(self.store)
        self.numbers = count(1)

    @property
    def is_here(self) -> bool:
        return False

    async def looked(self) -> None:
        """It was."""

    def call(self, run: Callable[..., object], *args: Any) -> bool:
        if self.loop.is_closed():
            return False
        self.loop.call_soon_threadsafe(run, *args, context=Context())
        return True

    def doubt(self, error: ClusterUnavailableError) -> None:
        """The test says how it stands."""

    def key_of(self, user_id: str) -> UserKey:
        return UserKey(sum(user_id.encode()) % 64, f"digest-of-{user_id}")

    def leases_here(self, user: UserKey) -> Sequence[StubLease]:
        return [lease for lease in self.leases if lease.user == user]

    def taken_here(self, user: UserKey) -> int:
        return len(self.leases_here(user))

    def lease_of(self, context: UserExecutionContext) -> StubLease | None:
        return next((lease for lease in self.leases if lease.context is context), None)

    async def acquire(self, user_id: str) -> StubLease:
        user = self.key_of(user_id)
        slot = Slot(user, f"{self.id}-1", next(self.numbers), True)
        granted = await self.session.acquire(Order(slot, True, 1000, 1000, LEASE))
        lease = StubLease(user, slot, granted.position, granted.events)  # type: ignore[union-attr]
        self.leases.append(lease)
        return lease


@dataclass(eq=False)
class Site:
    """A worker with its manager."""

    manager: UserContextManager
    worker: StubWorker
    relay: Relay
    notices: Notices
    applied: list[tuple[Notice, str, list[Held]]] = field(default_factory=list)
    unopened: list[int] = field(default_factory=list)

    def event(self, user: UserKey, place: Place, payload: bytes) -> None:
        self.relay.heard(user, place, payload)

    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None:
        """The member renews, and is told by that."""

    def deaf(self) -> None:
        self.relay.was_deaf()


@asynccontextmanager
async def site(
    server: MemoryServer, *, when_unavailable: Any = "closed", events: EventPolicy | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """A worker of the server's cluster."""
    with closing_contexts(
        UserContextManager(events=events, max_contexts_per_user=1000, max_connections_per_user=1000, **settings)
    ) as manager:
        worker = StubWorker(MemoryStore(server), ClusterPolicy(when_unavailable=when_unavailable))
        errands = Errands(worker)
        unopened: list[int] = []
        applied: list[tuple[Notice, str, list[Held]]] = []
        seals = Seals((SECRET,), "ucm", lambda: 0, unopened.append)

        def apply(notice: Notice, at: str, leases: Sequence[Held]) -> None:
            applied.append((notice, at, list(leases)))
            manager._revocation.apply(notice, at, leases)

        notices = Notices(worker, errands, seals, apply)
        relay = Relay(
            manager._hub,
            worker,
            errands,
            seals,
            manager._trail,
            lambda context: context.close("slow"),
            notices.catch_up,
        )
        one = Site(manager, worker, relay, notices, applied, unopened)
        manager._hub.relay = relay
        await worker.session.listen(one)
        try:
            yield one
        finally:
            manager.cleanup_all_contexts()
            await quiet(one)
            await worker.session.aclose()


async def joined(
    one: Site, user_id: str, after: tuple[str | None, int | None] | None = None
) -> tuple[StubLease | None, UserExecutionContext, Client]:
    """A connection, as the middleware makes it: under a lease, or without one where the worker carries on alone."""
    lease = None
    if one.worker.state != "local":
        try:
            lease = await one.worker.acquire(user_id)
        except ClusterUnavailableError:
            if one.worker.policy.when_unavailable == "closed":
                raise
    context, client = open_connection(one.manager, user_id)
    if lease is not None:
        lease.context = context
    accept(one.manager, context, client, after)
    return lease, context, client


async def quiet(*sites: Site) -> None:
    """Let the loop go on until nothing is under way, but for what waits for a client, or for a store that is down."""
    for _ in range(40):
        await asyncio.sleep(0)
