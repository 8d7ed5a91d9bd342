"""A member's leases: taken at most as often as the limit says, renewed, given back."""

import pytest

from support.members import LEASE, Cluster
from ucm_middleware.errors import ClusterUnavailableError, ContextLimitError


def test_a_lease_is_held_and_stands_in_the_store(cluster: Cluster) -> None:
    worker = cluster.worker()

    lease = cluster.acquire(worker)

    assert lease.is_held
    assert cluster.server.live_of(worker.member.key_of("alice")) == [lease.slot()]
    assert worker.member.leases_of("alice") == [lease]


def test_an_open_takes_one_round_trip(cluster: Cluster) -> None:
    worker = cluster.worker()
    cluster.server.commands.clear()

    cluster.acquire(worker)

    assert cluster.server.commands == ["acquire"]


def test_two_workers_share_one_limit(cluster: Cluster) -> None:
    first, second = cluster.worker(), cluster.worker()
    cluster.acquire(first)
    cluster.acquire(second)

    for worker in (first, second):
        with pytest.raises(ContextLimitError) as refused:
            cluster.acquire(worker)
        assert refused.value.scope == "user"
    assert cluster.acquire(second, "bob").is_held


def test_connections_have_a_limit_of_their_own(cluster: Cluster) -> None:
    cluster.limits.connections = 1
    first, second = cluster.worker(), cluster.worker()
    cluster.acquire(first, is_connection=True)

    with pytest.raises(ContextLimitError) as refused:
        cluster.acquire(second, is_connection=True)

    assert refused.value.scope == "connections"
    assert cluster.acquire(second).is_held


def test_what_is_released_is_free_for_others_after_the_next_turn(cluster: Cluster) -> None:
    first, second = cluster.worker(), cluster.worker()
    leases = [cluster.acquire(first), cluster.acquire(first)]

    first.member.release(leases[0])
    cluster.turn(first)

    assert cluster.acquire(second).is_held


def test_what_a_worker_has_just_released_is_free_for_itself_at_once(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease, _ = cluster.acquire(worker), cluster.acquire(worker)

    worker.member.release(lease)

    assert cluster.acquire(worker).is_held


def test_expired_contexts_make_room(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease, _ = cluster.acquire(worker), cluster.acquire(worker)
    worker.member.close_expired = lambda user_id: worker.member.release(lease)

    assert cluster.acquire(worker).is_held


def test_renewed_leases_are_held_for_long(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease = cluster.acquire(worker)

    cluster.wait(10 * LEASE, worker)

    assert lease.is_held
    assert cluster.server.live_of(worker.member.key_of("alice")) == [lease.slot()]


def test_a_lease_is_not_held_any_more_before_the_store_lets_go_of_it(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease = cluster.acquire(worker)

    cluster.clock.advance(LEASE * 0.9)

    assert not lease.is_held
    assert cluster.server.live_of(worker.member.key_of("alice")) == [lease.slot()]


def test_what_a_dead_worker_held_is_free_after_its_lease(cluster: Cluster) -> None:
    dead, other = cluster.worker(), cluster.worker()
    cluster.acquire(dead)
    cluster.acquire(dead)

    cluster.wait(LEASE, other)

    assert cluster.acquire(other).is_held


def test_a_worker_that_was_stopped_has_lost_and_nothing_comes_back(cluster: Cluster) -> None:
    stopped, other = cluster.worker(), cluster.worker()
    lease = cluster.acquire(stopped)
    cluster.wait(2 * LEASE, other)

    assert not lease.is_held
    cluster.turn(stopped)

    assert stopped.lost == [lease]
    assert not lease.is_held
    assert cluster.server.live() == {}
    fresh = cluster.acquire(stopped)
    assert fresh.is_held
    assert fresh.tenancy is not lease.tenancy
    cluster.wait(2 * LEASE, stopped)
    assert fresh.is_held
    assert not lease.is_held


def test_a_stopped_worker_asks_under_a_new_tenancy_even_before_its_thread_has_looked(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease = cluster.acquire(worker)
    cluster.clock.advance(2 * LEASE)

    fresh = cluster.acquire(worker)

    assert fresh.is_held
    assert not lease.is_held
    cluster.turn(worker)
    assert worker.lost == [lease]


def test_a_thousand_leases_are_renewed_by_one_command_of_a_third_of_the_lease(cluster: Cluster) -> None:
    worker = cluster.worker()
    for number in range(1000):
        cluster.acquire(worker, f"user{number}")
    cluster.server.commands.clear()

    cluster.wait(LEASE, worker)

    assert 3 <= cluster.server.commands.count("renew") <= 4
    assert len(cluster.server.live()) == 1000


def test_idle_tenancies_are_not_renewed_for_ever(cluster: Cluster) -> None:
    worker = cluster.worker()
    worker.member.release(cluster.acquire(worker))

    cluster.wait(3 * LEASE, worker)

    assert worker.member.book.all_tenancies() == []
    assert cluster.acquire(worker).is_held


def test_while_the_store_is_down_nobody_waits_for_it(cluster: Cluster) -> None:
    worker = cluster.worker()
    cluster.server.is_down = True
    with pytest.raises(ClusterUnavailableError):
        cluster.acquire(worker)
    cluster.turn(worker)
    cluster.server.commands.clear()

    with pytest.raises(ClusterUnavailableError) as refused:
        cluster.acquire(worker)

    assert worker.member.state == "down"
    assert cluster.server.commands == []
    assert refused.value.retry_after >= 1
