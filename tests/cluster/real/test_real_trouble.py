"""A store that is slow, and one that has no memory left: the declared policy holds, and what is held is kept."""

import pytest

from support.fleet import LIMIT, Worker, start_fleet
from support.restarts import Restarts
from support.waiting import wait_until
from support.witness import Witness, wait_until_free

LEASE = 3.0
SHORT = 0.3
"""Seconds that the store has for an answer."""


@pytest.mark.parametrize(("when", "status"), [("closed", 503), ("local", 200)])
def test_a_store_that_is_slower_than_its_time_is_as_good_as_down(
    when: str, status: int, store: Restarts, witness: Witness
) -> None:
    with start_fleet(store.port, 2, lease=LEASE, timeout=SHORT, when_unavailable=when) as fleet:
        slow, other = fleet.workers
        for worker in fleet.workers:
            worker.wait_for_state("up")
        slow.proxy.delay("replies", 2 * SHORT)
        wait_until(lambda: slow.ask("state")["state"] == ("down" if when == "closed" else "local"), "it is slow")
        assert slow.request("alice").status_code == status
        assert other.request("alice").status_code == 200
        slow.proxy.delay("replies", 0)
        slow.wait_for_state("up")
        assert slow.request("alice").status_code == 200
        # What was asked for in vain, and perhaps done, is given back.
        wait_until_free(store.server)
        held = fleet.hold(slow, "alice", LIMIT)
        assert other.request("alice").status_code == 429
        slow.tell("open")
        assert {each.result().status_code for each in held} == {200}
    wait_until_free(store.server)
    history = witness.history()
    assert not history.live


def is_granted(worker: Worker) -> bool:
    """Whether the store lets somebody in."""
    answer = worker.request("bob")
    return answer.status_code == 200 and answer.json()["lease"] != ""


@pytest.mark.parametrize(("when", "status"), [("closed", 503), ("local", 200)])
def test_a_store_without_memory_grants_nothing_and_keeps_what_it_has(
    when: str, status: int, store: Restarts, witness: Witness
) -> None:
    with start_fleet(store.port, 2, proxied=False, lease=LEASE, when_unavailable=when) as fleet:
        one, other = fleet.workers
        held = fleet.hold(one, "alice", LIMIT)
        store.server.admin.config_set("maxmemory", "1")  # it evicts nothing
        answer = other.request("bob")
        assert answer.status_code == status
        assert ("retry-after" in answer.headers) is (status == 503)
        assert not is_granted(other)
        other.wait_for_state("full")
        assert other.ask("state")["is_healthy"] is (when == "local")
        renewed = one.ask("state")["renewals"]
        wait_until(lambda: one.ask("state")["renewals"] > renewed + 1, "what is held is renewed all the same")
        assert one.ask("state")["live"] == LIMIT
        one.tell("open")
        assert {each.result().status_code for each in held} == {200}
        wait_until_free(store.server)
        store.server.admin.config_set("maxmemory", "0")
        wait_until(lambda: is_granted(other), "it grants again")
        other.wait_for_state("up")
    wait_until_free(store.server)
    assert not witness.history().live
