"""What a worker has lost is never held again, whatever comes late and whoever has not looked yet."""

import asyncio

from support.members import LEASE, Cluster
from ucm_middleware.cluster.store import Order, Slot


def test_an_order_that_begins_a_tenancy_anew_after_its_end_brings_nothing_back(cluster: Cluster) -> None:
    """One that was on its way since before the tenancy began, while the worker was stopped."""
    stopped, other = cluster.worker(), cluster.worker()
    lease = cluster.acquire(stopped)
    late = Order(Slot(lease.key, lease.tenancy.id, lease.number + 1, False), True, 2, 2, LEASE)
    cluster.clock.advance(LEASE + 1)
    cluster.server.acquire(late)
    cluster.turn(other)
    cluster.acquire(other)

    cluster.turn(stopped)  # it goes on

    assert not lease.is_held
    assert stopped.lost == [lease]


def test_what_the_store_says_is_gone_is_not_held_from_that_moment(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease = cluster.acquire(worker)
    cluster.server.data.tenancies.clear()

    newer = cluster.acquire(worker)  # no turn was taken

    assert newer.is_held
    assert not lease.is_held
    cluster.turn(worker)
    assert worker.lost == [lease]
    assert newer.is_held


def test_time_that_is_over_is_seen_also_while_the_store_gives_no_answer_that_makes_sense(cluster: Cluster) -> None:
    worker = cluster.worker()
    lease = cluster.acquire(worker)

    def garbled(_: object) -> list[object]:
        return [None]

    cluster.server.renew = garbled  # type: ignore[method-assign, assignment]
    cluster.wait(LEASE / 2, worker)
    assert worker.state == "down"
    cluster.wait(LEASE / 2, worker)

    assert not lease.is_held
    assert worker.lost == [lease]


def test_a_wait_that_was_given_up_spoils_no_later_one(cluster: Cluster) -> None:
    worker = cluster.worker()
    member = worker.member
    member._begin_anew()

    async def wait_twice() -> None:
        first = asyncio.ensure_future(member.upkeep.settled())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        second = asyncio.ensure_future(member.upkeep.settled())
        await asyncio.sleep(0)
        await member.upkeep.turn()
        await asyncio.wait({second}, timeout=5)
        assert second.done()
        assert not second.cancelled()
        assert second.exception() is None

    cluster.run(wait_twice())


def test_a_restore_that_comes_late_takes_no_slot_of_what_has_ended_since(cluster: Cluster) -> None:
    worker = cluster.worker()
    ended, kept = cluster.acquire(worker), cluster.acquire(worker)
    cluster.server.wipe()
    cluster.server.lose_orders, cluster.server.lose_only, cluster.server.are_late = 1, "restore", True
    cluster.wait(LEASE / 3, worker)
    worker.member.release(ended)
    cluster.wait(LEASE / 3, worker)
    assert cluster.server.live_of(kept.key) == [kept.slot()]

    cluster.server.deliver_late()
    cluster.wait(2 * LEASE, worker)

    assert kept.is_held
    assert cluster.server.live_of(kept.key) == [kept.slot()]
