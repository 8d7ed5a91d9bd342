"""A worker that is killed, and one that is stopped for longer than its lease and goes on."""

import signal
import time
from contextlib import ExitStack

import httpx

from support.fleet import LIMIT, close_code, start_fleet
from support.hammer import check_uses
from support.history import SLACK
from support.restarts import Restarts
from support.waiting import wait_until
from support.witness import Witness, wait_until_free, wall_minus_monotonic

LEASE = 2.0


def statuses(answers: list[httpx.Response]) -> set[int]:
    return {answer.status_code for answer in answers}


def test_a_killed_workers_slots_are_free_within_the_lease(store: Restarts, witness: Witness) -> None:
    with start_fleet(store.port, 2, proxied=False, lease=LEASE) as fleet:
        killed, other = fleet.workers
        held = fleet.hold(killed, "alice", LIMIT)
        assert other.request("alice").status_code == 429
        killed.server.kill()
        at = time.time()
        for each in held:
            assert isinstance(each.exception(), httpx.HTTPError)
        wait_until(lambda: other.request("alice").status_code == 200, "a slot is free")
        wait_until_free(store.server)
    history = witness.history()
    of_killed = [life for life in history.lives.values() if life.how == "expired"]
    assert len(of_killed) == LIMIT
    assert all(at - LEASE <= life.end <= at + LEASE + SLACK for life in of_killed)
    assert not history.live


def test_a_stopped_worker_resurrects_nothing(store: Restarts, witness: Witness) -> None:
    """Whoever got its slots meanwhile keeps them, and what it had is answered with 503 or closed with 1013."""
    sockets = 3
    with start_fleet(store.port, 2, proxied=False, lease=LEASE) as fleet, ExitStack() as stack:
        stopped, other = fleet.workers
        connections = [stack.enter_context(stopped.connect("alice")) for _ in range(sockets)]
        held = fleet.hold(stopped, "alice", LIMIT - sockets)
        assert other.request("alice").status_code == 429
        stopped.signal(signal.SIGSTOP)
        try:
            wait_until(lambda: other.request("alice").status_code == 200, "the lease has expired")
            others = fleet.hold(other, "alice", LIMIT)
            for connection in connections:  # what waits for it when it goes on
                connection.send("?")
        finally:
            stopped.signal(signal.SIGCONT)
        answers = [each.result() for each in held]
        assert statuses(answers) == {503}
        assert all("retry-after" in answer.headers for answer in answers)
        assert {close_code(connection) for connection in connections} == {1013}
        reasons = [event["reason"] for event in stopped.events("alice", "closed")]
        assert reasons == ["lost"] * LIMIT
        uses = stopped.ask("uses")
        assert len(uses) == LIMIT - sockets
        # It serves again, under what is left: nothing.
        assert stopped.request("alice").status_code == 429
        assert stopped.request("bob").status_code == 200
        other.tell("open")
        assert statuses([each.result() for each in others]) == {200}
        wait_until_free(store.server)
        assert stopped.request("alice").status_code == 200
    wait_until_free(store.server)
    history = witness.history()
    assert sum(life.how == "expired" for life in history.lives.values()) == LIMIT
    assert max(history.most.values()) == LIMIT
    check_uses(uses, history, wall_minus_monotonic())
