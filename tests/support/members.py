"""Several members on one store in memory, whose turns a test takes by itself: no thread, no sleeping."""

import asyncio
import hashlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from support.clock import Clock
from support.memory_store import MemoryServer, MemoryStore
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.policy import ClusterPolicy, WhenUnavailable
from ucm_middleware.cluster.users import Users
from ucm_middleware.secret import Secret, SecretRing

T = TypeVar("T")

SECRET = hashlib.sha256(b"the cluster of the tests").digest()
LEASE = 15.0


@dataclass(slots=True)
class SomeLimits:
    """Those of a registry."""

    per_user: int = 2
    connections: int = 2


class Worker:
    """One member, and its way to the store."""

    def __init__(self, server: MemoryServer, clock: Clock, policy: ClusterPolicy, ring: SecretRing) -> None:
        users = Users(ring, policy.application)
        self.store = MemoryStore(server, f"ucm:{policy.application}:", users.seals)
        self.member = Member(policy, self.store, users, clock=clock)
        self.lost: list[Lease] = []
        self.member.on_lost = self.lost.extend

    @property
    def state(self) -> str:
        """How it stands with the store by now."""
        return self.member.state


class Cluster:
    """Workers of one application, on one loop."""

    def __init__(self, server: MemoryServer, clock: Clock) -> None:
        self.server = server
        self.clock = clock
        self.limits = SomeLimits()
        self.loop = asyncio.new_event_loop()

    def worker(
        self, when_unavailable: WhenUnavailable = "closed", *secrets: bytes, recovered: bool = True, **settings: Any
    ) -> Worker:
        """One more, which has looked at the store; where that recovers, it has then, unless that is not wanted."""
        ring = SecretRing([Secret(one) for one in secrets or (SECRET,)], is_production=False)
        policy = ClusterPolicy(url="memory://", when_unavailable=when_unavailable, **{"lease": LEASE, **settings})
        worker = Worker(self.server, self.clock, policy, ring)
        self.turn(worker)
        if recovered and worker.member.is_reachable and max(worker.member.recovers_at) > self.clock():
            self.clock.advance(policy.lease)
            self.turn(worker)
        return worker

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something to its end."""
        return self.loop.run_until_complete(work)

    def turn(self, *workers: Worker) -> None:
        """Let each do what is due, and what it began thereby."""
        for worker in workers:
            self.run(worker.member.upkeep.turn())
            self.settle()

    def settle(self) -> None:
        """Let the tasks that have been begun go on."""

        async def pass_some_steps() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        self.run(pass_some_steps())

    def acquire(self, worker: Worker, user_id: str = "alice", *, is_connection: bool = False) -> Lease:
        """A lease. Raises as the member does."""
        return self.run(worker.member.acquire(user_id, is_connection=is_connection, limits=self.limits))

    def wait(self, seconds: float, *workers: Worker, step: float = 1.0) -> None:
        """Let time pass, with turns of these workers in small steps."""
        while seconds > 0:
            self.clock.advance(min(step, seconds))
            seconds -= step
            self.turn(*workers)

    def close(self) -> None:
        """End what is under way."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.settle()
        self.loop.close()
