"""Many users at four workers: no user ever has an eleventh lease, and nobody is served under a lost one.

It is short here; `tox run -e cluster-soak` goes on for a minute.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from support.fleet import APPS, LIMIT, QUIET, environment, start_fleet
from support.hammer import Outcome, check_served, hammer, most_at_once
from support.history import History
from support.restarts import Restarts
from support.witness import Witness, wait_until_free, wall_minus_monotonic
from ucm_middleware.testing.server import start_server

USERS = 200
SECONDS = float(os.environ.get("UCM_TEST_SECONDS", "4"))
LEASE = 2.0
UNAVAILABLE = {"503", "refused with 503", "closed with 1013"}
"""On a machine that is busy the store, or a worker, may not be in time: one answer in twenty at most."""
TOLD = {"200", "429", "messages", "refused with 429"} | UNAVAILABLE
"""Everybody is served, or told why not."""

Start = Callable[[Restarts], AbstractContextManager[list[int]]]


@contextmanager
def supervised(store: Restarts) -> Iterator[list[int]]:
    """One uvicorn that starts four workers, which share its port."""
    env = environment(store.url, lease=LEASE)
    with start_server("cluster_app:app", app_dir=APPS, env=env, options=(*QUIET, "--workers", "4")) as server:
        yield [server.port]


@contextmanager
def separate(store: Restarts) -> Iterator[list[int]]:
    """Four that were started each by itself, as on four machines."""
    with start_fleet(store.port, proxied=False, lease=LEASE) as fleet:
        yield [worker.server.port for worker in fleet.workers]


def tell(outcome: Outcome, history: History) -> None:
    print(
        json.dumps(
            {
                "answers": dict(outcome.counts),
                "leases": len(history.lives),
                "most of one user": max(history.most.values()),
                "users with ten": sum(most == LIMIT for most in history.most.values()),
                "events": len(history.events),
            }
        )
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", [supervised, separate])
def test_never_an_eleventh_lease_nor_an_answer_under_a_lost_one(
    start: Start, store: Restarts, witness: Witness
) -> None:
    offset = wall_minus_monotonic()
    with start(store) as ports:
        outcome = asyncio.run(hammer(ports, USERS, SECONDS))
        wait_until_free(store.server)
    drift = abs(wall_minus_monotonic() - offset)
    assert drift < 0.001, "the machine's clock was set meanwhile"
    history = witness.history()
    tell(outcome, history)
    assert not history.live
    released = sum(life.how == "released" for life in history.lives.values())
    assert released > 0.9 * len(history.lives)  # and not left to expire
    assert max(history.most.values()) == LIMIT  # they came to the limit, and stopped there
    assert len({answer.pid for answer in outcome.served}) == 4
    check_served(outcome.served, history, offset)
    assert most_at_once(outcome.served) <= LIMIT
    assert outcome.counts["429"] > 0
    assert outcome.counts.keys() <= TOLD, outcome.counts
    assert sum(outcome.counts[each] for each in UNAVAILABLE) <= outcome.counts.total() // 20, outcome.counts
