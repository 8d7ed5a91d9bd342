"""Simulated: the store's servers are restarted empty, and each worker finds them again and puts back what it holds.

Each server is a queue with one core. Each worker looks for the store at growing waits with chance in them, as
`ucm_middleware.cluster.upkeep` does, and then asks one thing after another. As long as the store recovers, each renewal
puts everything back once more.
"""

import heapq
import random
import statistics
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from benchmarks.cluster_costs import Costs
from ucm_middleware.cluster.leases import MARGIN
from ucm_middleware.cluster.store import BUCKETS
from ucm_middleware.cluster.upkeep import FIRST_PROBE, LONGEST_PROBE

INSPECTION: Final = 6
"""Commands of a worker on each server before it asks for anything: who is there, its settings, the seal, the rights."""

TICK: Final = 0.1
"""Seconds of a column in the distribution."""


@dataclass(slots=True)
class Recovered:
    """``commands`` and ``restored`` are per tick since the store came back: of all servers, and leases put back."""

    commands: Counter[int] = field(default_factory=Counter[int])
    found: Counter[int] = field(default_factory=Counter[int])
    restored: Counter[int] = field(default_factory=Counter[int])
    last: float = 0.0
    leases: int = 0
    lost: int = 0
    longest_wait: float = 0.0
    busiest: float = 0.0

    def per_second(self) -> float:
        """Leases put back in the busiest second."""
        ticks = range(max(self.restored, default=0) + 1)
        window = round(1 / TICK)
        return max((sum(self.restored[at + each] for each in range(window)) for at in ticks), default=0)


Step = tuple[int, float, int]
"""A server, the microseconds that it is busy with a command, and how many leases are back after it."""


def recover(
    costs: Costs, *, workers: int, servers: int, leases: float, lease: float, outage: float, trip: float
) -> Recovered:
    """``leases`` is how many a worker holds, ``outage`` and ``trip`` (there and back) are seconds."""
    chance = random.Random(9)
    result = Recovered()
    free_at = [outage] * servers
    busy: list[Counter[int]] = [Counter() for _ in range(servers)]
    queue: list[tuple[float, int, Generator[list[Step], None, None], float]] = []
    for number in range(workers):
        renewed = -chance.uniform(0, lease / 3)
        at = _found_at(chance, outage, lease)
        work = _first(costs, chance, servers, leases / BUCKETS)
        heapq.heappush(queue, (at, number, work, renewed + lease * MARGIN))
        result.found[int((at - outage) / TICK)] += 1
    recovered = queue[0][0] + lease
    again: set[int] = set()
    while queue:
        at, number, work, valid_until = heapq.heappop(queue)
        if at >= valid_until:
            result.lost += sum(back for steps in work for _, _, back in steps)
            continue
        steps = next(work, None)
        if steps is None:
            if number not in again:
                again.add(number)
                result.last = max(result.last, at - outage)
            renew_at = at + lease / 3 * chance.uniform(0.85, 1.0)
            if renew_at < recovered:
                work = _put_back(costs, chance, servers, leases / BUCKETS)
                heapq.heappush(queue, (renew_at, number, work, at + lease * MARGIN))
            continue
        answered = at
        for server, taken, back in steps:
            begin = max(at + trip / 2, free_at[server])
            result.longest_wait = max(result.longest_wait, begin - at - trip / 2)
            free_at[server] = begin + taken / 1e6
            answered = max(answered, free_at[server] + trip / 2)
            tick = int((begin - outage) / TICK)
            result.commands[tick] += 1
            busy[server][tick] += 1
            result.restored[tick] += back
            result.leases += back if number not in again else 0
        heapq.heappush(queue, (answered, number, work, valid_until))
    result.busiest = statistics.mean(max(counter.values(), default=0) for counter in busy) / TICK
    return result


def _found_at(chance: random.Random, outage: float, lease: float) -> float:
    """When a worker that lost its connection at 0 looks for the first time after the store is back."""
    at, failures = chance.uniform(0, 0.01), 0
    while at < outage:
        failures += 1
        pause = min(FIRST_PROBE * 2**failures, LONGEST_PROBE, lease / 3)
        at += pause * chance.uniform(0.5, 1.0)
    return at


def _first(costs: Costs, chance: random.Random, servers: int, slots: float) -> Generator[list[Step], None, None]:
    """What a worker asks for when it finds the store: what is in one list goes together."""
    for _ in range(INSPECTION):
        yield [(server, costs.renew.cpu, 0) for server in range(servers)]
    buckets = range(BUCKETS)
    yield [(bucket % servers, costs.renew.cpu, 0) for bucket in buckets]  # it enrolls
    yield [(bucket % servers, costs.subscribe.cpu, 0) for bucket in buckets]  # it listens for nudges
    yield from _put_back(costs, chance, servers, slots)


def _put_back(costs: Costs, chance: random.Random, servers: int, slots: float) -> Generator[list[Step], None, None]:
    """What it asks for when it renews, and is told that all recover."""
    buckets = list(range(BUCKETS))
    yield [(bucket % servers, costs.renew.cpu, 0) for bucket in buckets]
    chance.shuffle(buckets)
    for bucket in buckets:
        held = int(slots) + (chance.random() < slots % 1)
        server = bucket % servers
        yield [(server, costs.release.and_for(held, costs.release_each).cpu, 0)]
        yield [(server, costs.restore.and_for(held, costs.restore_each).cpu, held)]
