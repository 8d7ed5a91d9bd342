"""The network between one worker and the store is cut, and heals: under either policy."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest

from support.fleet import LIMIT, Worker, close_code, start_fleet
from support.restarts import Restarts
from support.waiting import wait_until
from support.witness import Witness, wait_until_free

LEASE = 2.0


def cut(worker: Worker) -> None:
    """Its connections are reset, and none are taken."""
    worker.proxy.refuse()
    worker.proxy.cut()


def fall_silent(worker: Worker) -> None:
    """Nothing gets through any more, and nobody says so."""
    worker.proxy.hold("requests")
    worker.proxy.hold("replies")


def heal(worker: Worker) -> None:
    worker.proxy.refuse(False)
    worker.proxy.release("requests")
    worker.proxy.release("replies")


@pytest.mark.parametrize("fail", [cut, fall_silent])
def test_closed_refuses_what_is_new_and_ends_what_it_has_with_its_lease(
    fail: Callable[[Worker], None], store: Restarts, witness: Witness
) -> None:
    with start_fleet(store.port, 2, lease=LEASE, timeout=0.3) as fleet, ExitStack() as stack:
        alone, other = fleet.workers
        connection = stack.enter_context(alone.connect("alice"))
        held = fleet.hold(alone, "alice", LIMIT - 1)
        fail(alone)
        alone.wait_for_state("down")
        refused = alone.request("bob")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert alone.ask("state")["is_healthy"] is False
        assert {each.result().status_code for each in held} == {503}
        assert close_code(connection) == 1013
        assert {event["reason"] for event in alone.events("alice", "closed")} == {"lost"}
        # The others are not concerned, and have the slots as soon as the lease is over.
        assert other.request("bob").status_code == 200
        wait_until(lambda: other.request("alice").status_code == 200, "the slots are free")
        heal(alone)
        alone.wait_for_state("up")
        assert alone.request("alice").status_code == 200
        assert alone.ask("state")["is_healthy"] is True
        wait_until_free(store.server)
    history = witness.history()
    assert not history.live
    assert sum(life.how == "expired" for life in history.lives.values()) == LIMIT


def is_at_limit(worker: Worker) -> bool:
    """A worker that counts by itself for a moment may serve her, and only without a lease of the store's."""
    answer = worker.request("alice")
    assert answer.status_code == 429 or answer.json()["lease"] == "", answer.text
    return answer.status_code == 429


def test_local_carries_on_by_itself_and_comes_back_to_the_limit_of_all(store: Restarts, witness: Witness) -> None:
    with start_fleet(store.port, 2, lease=LEASE, timeout=0.3, when_unavailable="local") as fleet:
        alone, other = fleet.workers
        fleet.hold(alone, "alice", 4)
        cut(alone)
        alone.wait_for_state("local")
        wait_until_free(store.server)  # for the store the lease is over
        fleet.hold(other, "alice", 8)
        # Each worker goes by its own limit now: what it had lives on, and as many more as it would allow alone.
        health = alone.ask("state")
        assert health["is_healthy"] is True
        assert health["live"] == 4
        fleet.hold(alone, "alice", LIMIT - 4)
        assert alone.request("alice").status_code == 429
        heal(alone)
        alone.wait_for_state("up")
        # Ten of the eighteen have a place: eight in the other worker, and two here.
        alone.wait_for_live(2)
        reasons = [event["reason"] for event in alone.events("alice", "closed")]
        assert reasons == ["lost"] * 8
        assert other.ask("state")["live"] == 8
        for worker in fleet.workers:
            # One that lacks the processor for a moment may take the store for slow, and count by itself.
            wait_until(partial(is_at_limit, worker), "the limit is that of all")
            worker.tell("open")
        wait_until_free(store.server)
    history = witness.history()
    assert max(history.most.values()) == LIMIT
    assert not history.live
