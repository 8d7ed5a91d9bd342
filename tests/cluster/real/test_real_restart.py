"""The store is killed under load, and comes back empty."""

import asyncio
from collections import Counter

import pytest

from support.fleet import LIMIT, start_fleet
from support.hammer import Hammer, check_served, most_at_once
from support.restarts import Restarts
from support.witness import Witness, wait_until_free, wall_minus_monotonic

USERS = 60
LEASE = 2.0


@pytest.mark.timeout(180)
def test_a_store_that_comes_back_empty_is_told_what_is_held_and_grants_nothing_before(
    store: Restarts, witness: Witness
) -> None:
    offset = wall_minus_monotonic()

    async def load(ports: list[int]) -> Hammer:
        many = Hammer(ports, USERS)
        task = asyncio.create_task(many.run())
        await asyncio.wait([task], timeout=2.0)
        await asyncio.to_thread(witness.kill)
        await asyncio.wait([task], timeout=0.5)
        await asyncio.to_thread(witness.restart)
        await asyncio.wait([task], timeout=3 * LEASE)
        many.stop.set()
        await task
        return many

    with start_fleet(store.port, proxied=False, lease=LEASE) as fleet:
        many = asyncio.run(load([worker.server.port for worker in fleet.workers]))
        for worker in fleet.workers:
            worker.wait_for_state("up")
            assert worker.request("afterwards").status_code == 200
        wait_until_free(store.server)
    outcome = many.outcome
    history = witness.history()
    kinds = Counter(event.kind for event in history.events)
    print(dict(outcome.counts), dict(kinds), f"unseen: {history.unseen}")
    assert kinds["restored"] > 0, "nothing was held over the restart"
    assert outcome.counts["503"] > 0
    check_served(outcome.served, history, offset)
    assert most_at_once(outcome.served) <= LIMIT
    assert not history.live
