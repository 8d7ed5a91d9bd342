"""Workers, one store, users at their limit, and whatever may go wrong, in any order.

The store's own truth and each worker's belief are looked at after every step. Time passes only by rules, on one clock
that all share; a worker that is stopped, as by SIGSTOP, takes no turns, while its clock goes on.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from support.clock import Clock
from support.members import LEASE, Cluster, Worker
from support.memory_store import MemoryServer
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.policy import WhenUnavailable
from ucm_middleware.errors import ClusterUnavailableError, ContextLimitError

USERS = ("alice", "bob")
LIMIT = 2


class ClusterMachine(RuleBasedStateMachine):
    """Under the policy "closed"."""

    policy: WhenUnavailable = "closed"

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.server = MemoryServer(self.clock)
        self.server.remembers = True
        self.cluster = Cluster(self.server, self.clock)
        self.workers: list[Worker] = []
        self.stopped: set[int] = set()
        self.held: dict[Lease, Worker] = {}  # what was granted and not closed, by whoever was not killed
        self.over: set[Lease] = set()  # what was closed, or seen to be lost

    @initialize()
    def begin(self) -> None:
        self.server.enroll(LEASE)
        self.clock.advance(LEASE)
        self.workers = [self.cluster.worker(self.policy) for _ in range(3)]

    @property
    def awake(self) -> list[Worker]:
        return [worker for number, worker in enumerate(self.workers) if number not in self.stopped]

    @rule(target=leases, number=st.integers(0, 2), user=st.sampled_from(USERS), is_connection=st.booleans())
    def open(self, number: int, user: str, is_connection: bool) -> Any:
        if number in self.stopped:
            return multiple()
        try:
            lease = self.cluster.acquire(self.workers[number], user, is_connection=is_connection)
        except (ContextLimitError, ClusterUnavailableError):
            return multiple()
        assert lease.is_held
        self.held[lease] = self.workers[number]
        return lease

    @rule(lease=leases)
    def close(self, lease: Lease) -> None:
        worker = self.held.get(lease)
        if worker in self.awake:
            del self.held[lease]
            worker.member.release(lease)
            self.over.add(lease)

    @rule(number=st.integers(0, 2))
    def turn(self, number: int) -> None:
        if number not in self.stopped:
            self.cluster.turn(self.workers[number])

    @rule(seconds=st.sampled_from((0.1, 1.0, LEASE / 3)))
    def tick(self, seconds: float) -> None:
        """Time passes, and whoever is awake takes its turns in time."""
        self.cluster.wait(seconds, *self.awake, step=LEASE / 6)

    @rule(seconds=st.sampled_from((LEASE / 2, 0.95 * LEASE, 2 * LEASE)))
    def doze(self, seconds: float) -> None:
        """Time passes, and nobody takes any turn."""
        self.clock.advance(seconds)

    @rule(number=st.integers(0, 2), how=st.sampled_from(("stop", "go on", "cut", "connect")))
    def part(self, number: int, how: str) -> None:
        """Something befalls one worker, or is over."""
        if how == "stop":
            self.stopped.add(number)
        elif how == "go on":
            self.stopped.discard(number)
        else:
            self.workers[number].store.is_cut = how == "cut"

    @rule(number=st.integers(0, 2))
    def kill(self, number: int) -> None:
        """One dies, and another takes its place."""
        dead = self.workers[number]
        self.held = {lease: worker for lease, worker in self.held.items() if worker is not dead}
        dead.store.is_cut = True
        self.stopped.discard(number)
        self.workers[number] = self.cluster.worker(self.policy, recovered=False)

    @rule(how=st.sampled_from(("down", "up", "lose an answer", "lose an order", "keep an order", "deliver")))
    def disturb(self, how: str) -> None:
        """The store is not to be asked, or not well."""
        if how in ("down", "up"):
            self.server.is_down = how == "down"
        elif how == "lose an answer":
            self.server.lose_answers += 1
        elif how == "deliver":
            self.server.deliver_late()
        else:
            self.server.lose_orders += 1
            self.server.are_late = how == "keep an order"

    @rule(lost_writes=st.one_of(st.none(), st.integers(0, 3)))
    def replace_server(self, lost_writes: int | None) -> None:
        """By an empty one, or by one that lacks a few writes."""
        if lost_writes is None:
            self.server.wipe()
        else:
            self.server.fail_over(lost_writes)

    @rule()
    def mend(self) -> None:
        """All is well for a while."""
        self._mend()
        self.cluster.wait(1.5 * LEASE, *self.workers, step=LEASE / 6)

    def _mend(self) -> None:
        server = self.server
        server.is_down, server.lose_answers, server.lose_orders = False, 0, 0
        self.stopped.clear()
        for worker in self.workers:
            worker.store.is_cut = False

    @invariant()
    def nobody_has_more_than_the_limit_by_what_workers_believe(self) -> None:
        if self.policy == "local":
            return  # each worker counts by itself for a while, as declared
        for user in USERS:
            assert sum(lease.is_held for lease in self.held if lease.user_id == user) <= LIMIT

    @invariant()
    def nobody_has_more_than_the_limit_by_the_stores_truth(self) -> None:
        for key, slots in self.server.live().items():
            if self.server.recovers(key.bucket, LEASE) <= 0:
                assert len(slots) <= LIMIT

    @invariant()
    def what_is_believed_is_true_in_the_store(self) -> None:
        """Unless it has failed over, and must be told yet."""
        for lease, worker in self.held.items():
            if lease.tenancy.is_carried:
                continue
            key = worker.member.key_of(lease.user_id)
            if lease.is_held and self.server.recovers(key.bucket, LEASE) <= 0:
                assert lease.slot() in self.server.live_of(key)

    @invariant()
    def what_was_lost_is_lost_for_ever(self) -> None:
        for worker in self.workers:
            self.over.update(worker.lost)
            for lease in worker.lost:
                self.held.pop(lease, None)
        assert not [lease for lease in self.over if lease in self.held]
        for worker in self.workers:
            assert not [lease for lease in worker.lost if lease.is_held]
            for user in USERS:
                assert not self.over.intersection(worker.member.leases_of(user))

    def teardown(self) -> None:
        """Everything is free again when all is closed, and everybody can open again."""
        server = self.server
        self._mend()
        if self.workers:
            self.cluster.wait(4 * LEASE, *self.workers)
            assert {worker.state for worker in self.workers} == {"up"}
            for lease, worker in self.held.items():
                worker.member.release(lease)
            self.cluster.turn(*self.workers)
            server.deliver_late()
            self.cluster.wait(2 * LEASE, *self.workers)
            assert server.live() == {}
            for user in USERS:
                assert self.cluster.acquire(self.workers[0], user).is_held
        self.cluster.close()


class LocalMachine(ClusterMachine):
    """Under the policy "local"."""

    policy = "local"


TestCluster = ClusterMachine.TestCase
TestCluster.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLocalCluster = LocalMachine.TestCase
TestLocalCluster.settings = TestCluster.settings
