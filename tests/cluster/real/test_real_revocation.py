"""A revocation in one worker reaches a user's sockets in all of them, also in one that was away."""

from contextlib import ExitStack

import pytest
from websockets.exceptions import InvalidStatus

from support.fleet import close_code, start_fleet
from support.restarts import Restarts
from support.witness import Witness, wait_until_free

LEASE = 2.0


def test_it_closes_the_sockets_in_all_workers_and_nobody_elses(store: Restarts, witness: Witness) -> None:
    with start_fleet(store.port, proxied=False, lease=LEASE) as fleet, ExitStack() as stack:
        mine = [stack.enter_context(worker.connect("alice")) for worker in fleet.workers for _ in range(2)]
        others = [stack.enter_context(worker.connect("bob")) for worker in fleet.workers]
        fleet.workers[0].tell("revoke?user=alice")
        assert {close_code(connection) for connection in mine} == {1008}
        for connection in others:
            connection.send("?")
            assert '"told"' in str(connection.recv())
        for worker in fleet.workers:
            assert [event["reason"] for event in worker.events("alice", "closed")] == ["revoked"] * 2
    wait_until_free(store.server)
    assert not witness.history().live


def test_a_worker_that_was_away_applies_it_before_it_serves_that_user_again(store: Restarts, witness: Witness) -> None:
    """Under "local" its sockets live on while it is away: they are the first thing that it sees to when it is back."""
    with (
        start_fleet(store.port, 2, lease=LEASE, timeout=0.3, when_unavailable="local") as fleet,
        ExitStack() as stack,
    ):
        here, away = fleet.workers
        mine = [stack.enter_context(away.connect("alice")) for _ in range(3)]
        bob = stack.enter_context(away.connect("bob"))
        away.proxy.refuse()
        away.proxy.cut()
        away.wait_for_state("local")
        here.tell("revoke?user=alice")
        for connection in mine:  # it has not heard of it
            connection.send("?")
            assert '"told"' in str(connection.recv())
        away.proxy.refuse(False)
        away.wait_for_state("up")
        assert {close_code(connection) for connection in mine} == {1008}
        assert [event["reason"] for event in away.events("alice", "closed")] == ["revoked"] * 3
        bob.send("?")
        assert '"told"' in str(bob.recv())
        with away.connect("alice") as again:  # a new one is another matter
            again.send("?")
            assert '"told"' in str(again.recv())
    wait_until_free(store.server)
    assert not witness.history().live


def test_a_revocation_that_cannot_be_told_yet_is_told_later(store: Restarts, witness: Witness) -> None:
    """It is cut off who revokes: what is here is closed at once, the rest when the store can be asked."""
    # So long a lease that it is not over before: that would close it too, with 1013.
    with start_fleet(store.port, 2, lease=10.0, timeout=0.3) as fleet, ExitStack() as stack:
        away, other = fleet.workers
        mine = stack.enter_context(away.connect("alice"))
        theirs = stack.enter_context(other.connect("alice"))
        away.proxy.refuse()
        away.proxy.cut()
        away.wait_for_state("down")
        assert away.tell("revoke?user=alice") == "unavailable"
        assert close_code(mine) == 1008
        with pytest.raises(InvalidStatus) as refused:
            stack.enter_context(away.connect("alice"))
        assert refused.value.response.status_code == 503
        theirs.send("?")
        assert '"told"' in str(theirs.recv())
        away.proxy.refuse(False)
        assert close_code(theirs) == 1008
    wait_until_free(store.server)
    assert not witness.history().live
