"""Notices that a worker has missed reach what it holds, before anything newer of that user does, and cost no leases."""

import asyncio

import pytest

from support.members import LEASE, Cluster, Worker
from support.waiting import wait_until
from ucm_middleware import UserExecutionContext
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.store import UserKey
from ucm_middleware.errors import ClusterUnavailableError


def deafen(worker: Worker) -> None:
    """Have its nudges get lost."""
    for session in worker.store.server.sessions:
        if session.store is worker.store:
            session.hearer = None


def heard_by(worker: Worker) -> list[UserKey]:
    heard: list[UserKey] = []

    async def hear(user: UserKey) -> None:
        heard.append(user)

    worker.member.on_noticed = hear
    return heard


class TestRestored:
    """A tenancy that was put back under another name is told of nothing that was left before."""

    def test_its_users_notices_are_read(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.wipe()
        cluster.server.notify(lease.key, b"left before it was put back", forget_events=False)
        heard = heard_by(worker)

        cluster.wait(LEASE / 3, worker)

        assert lease.is_held
        assert lease.key in heard

    def test_they_are_read_later_where_the_store_cannot_be_asked(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        heard: list[UserKey] = []

        async def fail_once(user: UserKey) -> None:
            heard.append(user)
            if len(heard) == 1:
                raise ClusterUnavailableError("timeout")

        worker.member.on_noticed = fail_once
        cluster.server.wipe()
        cluster.wait(2 * LEASE, worker)

        assert lease.is_held
        assert heard == [lease.key, lease.key]

    def test_what_comes_to_live_there_later_looks_for_itself(self, cluster: Cluster) -> None:
        """What is read before finds nobody that a notice could be meant for."""
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.wipe()
        cluster.server.notify(lease.key, b"left before it was put back", forget_events=False)
        heard = heard_by(worker)
        while not heard:  # as soon as it is put back
            cluster.turn(worker)
        assert lease.is_restored

        heard.clear()
        worker.store.is_cut = True  # so that no renewal tells of it
        lease.context = UserExecutionContext(user_id="alice", thread_id="t", run_id="r")
        worker.member.lives(lease)
        wait_until(lambda: heard == [lease.key], "the notices are read")
        worker.member.end_soon()

    def test_they_are_put_back_once(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.wipe()
        cluster.wait(LEASE / 3, worker)
        tenancy = lease.tenancy
        cluster.wait(LEASE / 3, worker)

        assert lease.tenancy is tenancy
        assert cluster.server.commands.count("restore") == 1


class TestNewer:
    """A context is opened while older ones of its user have missed a notice."""

    context = UserExecutionContext(user_id="alice", thread_id="thread-1", run_id="run-1")

    def acquire_older(self, cluster: Cluster, worker: Worker) -> Lease:
        """One under which something lives."""
        lease = cluster.acquire(worker)
        lease.context = self.context
        return lease

    def test_the_older_ones_come_first(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        older = self.acquire_older(cluster, worker)
        deafen(worker)
        position = cluster.server.notify(older.key, b"left", forget_events=False).position
        heard = heard_by(worker)

        newer = cluster.acquire(worker)

        assert heard == [older.key]
        assert newer.position == older.position == position

    def test_it_is_not_opened_where_they_cannot_be_told(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        older = self.acquire_older(cluster, worker)
        deafen(worker)
        cluster.server.notify(older.key, b"left", forget_events=False)

        async def fail(*_: object) -> None:
            raise ClusterUnavailableError("timeout")

        worker.member.on_noticed = fail
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)
        cluster.turn(worker)

        assert cluster.server.live_of(older.key) == [older.slot()]

    def test_it_is_not_opened_where_the_telling_lasts(self, cluster: Cluster) -> None:
        worker = cluster.worker(timeout=0.05)
        older = self.acquire_older(cluster, worker)
        deafen(worker)
        cluster.server.notify(older.key, b"left", forget_events=False)

        async def last(*_: object) -> None:
            await asyncio.Event().wait()

        worker.member.on_noticed = last
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)


def test_what_lasts_while_a_lease_is_placed_costs_no_other_lease(cluster: Cluster) -> None:
    """Whoever revokes a user holds up that user's notices, and so does a plugin that is told of it."""
    worker = cluster.worker("local")
    worker.store.is_cut = True
    cluster.turn(worker)
    with_notice = cluster.acquire(worker, "alice")
    cluster.wait(LEASE, worker)

    async def last(user: UserKey) -> None:
        if user == with_notice.key:
            await asyncio.Event().wait()

    worker.member.on_noticed = last
    worker.store.is_cut = False
    bob = cluster.acquire(worker, "bob")

    async def some_turns() -> None:
        for _ in range(40):
            cluster.clock.advance(LEASE / 20)
            async with asyncio.timeout(5):
                await worker.member.upkeep.turn()
            for _ in range(10):
                await asyncio.sleep(0)

    cluster.run(some_turns())
    carol = cluster.acquire(worker, "carol")
    cluster.wait(LEASE, worker)

    assert carol.is_held
    assert not carol.is_over
    assert bob.is_held
