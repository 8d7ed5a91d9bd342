"""The protocol of the cluster at 1,000 workers and 10 million users: what the store has to do, and how much it keeps.

A simulation, event by event, in which only the store's work is counted; what a command costs the store is measured
first, in the same run, on a real Valkey with the adapter's real scripts. Its assumptions are `Assumptions`, each with
what it means, and are printed with the result: put in your own. The server is the one of the tests; run it with
``PYTHONPATH=tests``, as tox does. Needs ucm-valkey with its extra `valkey`, and the dependency group `databases`.
"""

import argparse
import asyncio
import heapq
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from benchmarks.cluster_costs import Cost, Costs, measure, measured_store
from benchmarks.cluster_recovery import TICK, Recovered, recover
from benchmarks.report import finish, parser, show
from ucm_middleware.cluster.store import BUCKETS, KEEP_USER
from ucm_middleware.cluster.thread import GATHER

LONGEST_RUN: Final = 120.0
"""Seconds that it may take."""

MOST_RECOVERY: Final = 1.0
"""Of a lease: after a restart everybody must have put back what he holds before anything new is granted."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is taken for granted. Times in seconds, sizes in bytes."""

    workers: int = 1000
    users: int = 10_000_000
    """Users who are there at the same time, spread evenly over workers and buckets."""
    seconds_between_requests: float = 30.0
    """Of one user, at random times."""
    request_seconds: float = 0.1
    """How long a request lives, on average; exponential."""
    connected: float = 0.3
    """The share of users who have a WebSocket."""
    connection_seconds: float = 1800.0
    """How long one lives, on average; exponential."""
    returning: float = 0.5
    """The share of new connections that ask for the events they missed."""
    seconds_between_events: float = 60.0
    """For one user with a connection; from any worker."""
    event_bytes: int = 400
    """One event, sealed."""
    events_kept: int = 30
    """Of a user with a connection: those of a connection's life."""
    revocations: float = 20.0
    """Revocations and clears a second, of all users together."""
    lease: float = 15.0
    busy: float = 0.6
    """The share of a server's core that is planned for."""
    outage: float = 3.0
    """How long the store is away when it is restarted."""
    round_trip: float = 0.0005
    sampled_workers: int = 12
    sampled_seconds: float = 20.0
    """So many workers are simulated for so long, and stand for all: they meet in the store only."""
    measured: int = 6000
    """Commands of each kind with which its cost is measured."""


class Simulation:
    """One worker after another: they meet in the store only. ``counts`` has commands, ``items`` what is in them."""

    def __init__(self, given: Assumptions, seed: int = 1) -> None:
        self.given = given
        self.counts: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._events: list[tuple[float, int, str, int]] = []
        self._number = 0
        self._pending: list[int] = []
        self._flushes = False

    def run(self) -> None:
        for _ in range(self.given.sampled_workers):
            self._worker()

    def _worker(self) -> None:
        given, chance = self.given, self._chance
        users = given.users / given.workers
        connections = round(users * given.connected)
        for _ in range(connections):  # they are in the middle of their lives
            self._plan(chance.expovariate(1 / given.connection_seconds), "disconnect", chance.randrange(BUCKETS))
            self._plan(chance.uniform(0, KEEP_USER / 2), "touch", 0)
        self._rates = {
            "request": users / given.seconds_between_requests,
            "connect": connections / given.connection_seconds,
            "publish": connections / given.seconds_between_events,
            "notify": given.revocations / given.workers,
        }
        for kind in self._rates:
            self._again(0.0, kind)
        self._plan(chance.uniform(0, given.lease / 3), "renew", 0)
        while self._events and self._events[0][0] < given.sampled_seconds:
            now, _, kind, bucket = heapq.heappop(self._events)
            self._on(now, kind, bucket)
        self._events.clear()
        self._pending.clear()
        self._flushes = False

    def _on(self, now: float, kind: str, bucket: int) -> None:
        given, chance = self.given, self._chance
        match kind:
            case "request":
                self._again(now, kind)
                self.counts["acquire"] += 1
                self._plan(now + chance.expovariate(1 / given.request_seconds), "end", chance.randrange(BUCKETS))
            case "connect":
                self._again(now, kind)
                self.counts["acquire"] += 1
                self.counts["subscribe"] += 1
                self.counts["history"] += chance.random() < given.returning
                self._plan(
                    now + chance.expovariate(1 / given.connection_seconds), "disconnect", chance.randrange(BUCKETS)
                )
            case "end" | "disconnect":
                self.counts["subscribe"] += kind == "disconnect"  # to end one costs the same
                self._pending.append(bucket)
                if not self._flushes:
                    self._flushes = True
                    self._plan(now + GATHER, "flush", 0)
            case "flush":
                self._flushes = False
                self.counts["release"] += len(set(self._pending))  # one for each bucket, in one pipeline
                self.items["release"] += len(self._pending)
                self._pending.clear()
            case "renew":
                self.counts["renew"] += BUCKETS
                self._plan(now + given.lease / 3 * chance.uniform(0.85, 1.0), "renew", 0)
            case "touch":
                self.items["touch"] += 1
            case "publish":
                self._again(now, kind)
                self.counts["publish"] += 1
            case _:
                self._again(now, kind)
                self.counts["notify"] += 1
                self.counts["notices"] += 1  # one worker has that user, looks at all it has, and asks what it is
                self.counts["renew"] += BUCKETS
                self.items["nudge"] += given.workers  # every worker hears the nudges of every bucket

    def _again(self, now: float, kind: str) -> None:
        self._plan(now + self._chance.expovariate(self._rates[kind]), kind, 0)

    def _plan(self, at: float, kind: str, bucket: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, kind, bucket))

    def rate(self, counted: Counter[str], kind: str) -> float:
        """A second, of all workers."""
        given = self.given
        return counted[kind] / given.sampled_seconds / given.sampled_workers * given.workers


@dataclass(frozen=True, slots=True)
class Load:
    """Of one kind of command, all servers together: a second."""

    kind: str
    commands: float
    cores: float
    inside: float
    received: float
    sent: float


def loads(simulation: Simulation, costs: Costs) -> list[Load]:
    def load(kind: str, cost: Cost, items: float = 0.0, each: Cost | None = None, name: str | None = None) -> Load:
        rate = simulation.rate(simulation.counts, kind)
        per = cost if each is None or not rate else cost.and_for(items / rate, each)
        return Load(name or kind, rate, rate * per.cpu / 1e6, per.inside, rate * per.received, rate * per.sent)

    items = simulation.rate(simulation.items, "release")
    nudges = simulation.rate(simulation.items, "nudge")
    touches = simulation.rate(simulation.items, "touch")
    told = costs.delivery
    return [
        load("acquire", costs.acquire),
        load("release", costs.release, items, costs.release_each),
        load("renew", costs.renew, touches, costs.touch),
        load("publish", costs.publish, simulation.rate(simulation.counts, "publish"), costs.delivery),
        load("history", costs.history),
        load("subscribe", costs.subscribe),
        load("notify", costs.notify),
        load("notices", costs.history),
        Load("nudges told", nudges, nudges * told.cpu / 1e6, 0.0, 0.0, nudges * told.sent),
    ]


def memory(given: Assumptions, costs: Costs) -> dict[str, float]:
    """Bytes by what they are for, of all servers together."""
    connected = given.users * given.connected
    requests = given.users / given.seconds_between_requests * given.request_seconds
    return {
        "leases": (connected + requests) * costs.user_bytes,
        "events": connected * (costs.events_bytes + (given.events_kept - 1) * costs.event_bytes),
        "tenancies": given.workers * BUCKETS * costs.tenancy_bytes,
        "subscriptions": connected * costs.subscription_bytes,
    }


async def costs_of(given: Assumptions) -> Costs:
    async with measured_store() as store:
        return await measure(store, given.measured, given.event_bytes)


def simulate(given: Assumptions) -> dict[str, Any]:
    began = time.monotonic()
    costs = asyncio.run(costs_of(given))
    measured = time.monotonic() - began
    simulation = Simulation(given)
    simulation.run()
    found = loads(simulation, costs)
    cores = sum(load.cores for load in found)
    servers = min(BUCKETS, max(1, math.ceil(cores / given.busy)))
    kept = memory(given, costs)
    held = given.users * given.connected / given.workers
    held += given.users / given.seconds_between_requests * given.request_seconds / given.workers
    recovered = recover(
        costs,
        workers=given.workers,
        servers=servers,
        leases=held,
        lease=given.lease,
        outage=given.outage,
        trip=given.round_trip,
    )
    _show(given, costs, found, kept, servers, recovered)
    took = time.monotonic() - began
    print(f"It took {took:.0f} s, {measured:.0f} s of which the measuring.")
    return {
        "assumptions": asdict(given),
        "costs": asdict(costs),
        "commands_a_second": {load.kind: load.commands for load in found},
        "cores": cores,
        "servers": servers,
        "memory_bytes": kept,
        "received_bytes_a_second": sum(load.received for load in found),
        "sent_bytes_a_second": sum(load.sent for load in found),
        "users_of_one_server": given.users * given.busy / cores,
        "recovery_seconds": recovered.last,
        "restored_leases": recovered.leases,
        "lost_leases": recovered.lost,
        "restores_in_the_busiest_second": recovered.per_second(),
        "longest_wait_seconds": recovered.longest_wait,
        "first_second": [recovered.commands[tick] for tick in range(round(1 / TICK))],
        "seconds": took,
    }


def _show(
    given: Assumptions,
    costs: Costs,
    found: Sequence[Load],
    kept: dict[str, float],
    servers: int,
    recovered: Recovered,
) -> None:
    show(
        "Assumptions",
        ["", ""],
        [[each.name.replace("_", " "), f"{getattr(given, each.name):,}"] for each in fields(given)],
    )
    print(
        f"A command's cost is the CPU of the main thread of Valkey {costs.version} over {given.measured} of them, many "
        "at once on one connection, and the bytes that it counted; the bytes of keys are MEMORY USAGE's. Both were "
        "measured in this run, with the adapter's scripts. In a cluster a command is about one bucket. Replicas and "
        "TLS cost besides."
    )
    total = sum(load.commands for load in found)
    show(
        f"{given.users:,} users on {given.workers:,} workers: the store's work a second, all servers together",
        ["", "commands", "cores", "us inside", "MB in", "MB out"],
        [
            *(
                [
                    load.kind,
                    f"{load.commands:,.0f}",
                    f"{load.cores:.3f}",
                    f"{load.inside:.1f}",
                    f"{load.received / 1e6:.1f}",
                    f"{load.sent / 1e6:.1f}",
                ]
                for load in found
            ),
            [
                "together",
                f"{total:,.0f}",
                f"{sum(load.cores for load in found):.2f}",
                "",
                f"{sum(load.received for load in found) / 1e6:.1f}",
                f"{sum(load.sent for load in found) / 1e6:.1f}",
            ],
        ],
    )
    cores = sum(load.cores for load in found)
    alone = given.users * given.busy / cores
    print(f"{servers} servers at {given.busy:.0%} of a core each; one alone serves {alone:,.0f} users of this kind.")
    show(
        "Memory, all servers together, without replicas",
        ["", "GB", "bytes a user"],
        [
            *([name, f"{size / 1e9:.2f}", f"{size / given.users:.0f}"] for name, size in kept.items()),
            ["together", f"{sum(kept.values()) / 1e9:.2f}", f"{sum(kept.values()) / given.users:.0f}"],
        ],
    )
    _show_recovery(given, servers, recovered)


def _show_recovery(given: Assumptions, servers: int, recovered: Recovered) -> None:
    ticks = range(round(1 / TICK))
    show(
        f"All {servers} servers are away for {given.outage:g} s and come back empty: the first second, by tenths",
        ["", *(f"{tick * TICK:.1f}" for tick in ticks)],
        [
            ["workers that find them", *(f"{recovered.found[tick]:,}" for tick in ticks)],
            ["commands", *(f"{recovered.commands[tick]:,}" for tick in ticks)],
            ["leases put back", *(f"{recovered.restored[tick]:,}" for tick in ticks)],
        ],
    )
    window = round(1 / TICK)

    def of(counted: Counter[int], second: int) -> str:
        return f"{sum(counted[second * window + each] for each in range(window)):,}"

    show(
        "The same by seconds, until all is granted again",
        ["second", "workers that find them", "commands", "leases put back, some again"],
        [
            [str(second), *(of(each, second) for each in (recovered.found, recovered.commands, recovered.restored))]
            for second in range(math.ceil(given.lease))
        ],
    )
    print(
        f"All {recovered.leases:,} leases are back after {recovered.last:.2f} s, {recovered.per_second():,.0f} of them "
        f"in the busiest second; {recovered.lost:,} are lost. New contexts are refused for {given.lease:g} s from when "
        f"the store is first seen again. No command waits for longer than {recovered.longest_wait * 1000:.0f} ms in a "
        f"server, which has {recovered.busiest:,.0f} commands a second in its busiest tenth of one."
    )


def _options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    for each in fields(Assumptions):
        kind: Any = each.type
        made.add_argument(f"--{each.name.replace('_', '-')}", type=kind, default=each.default)
    return made


def main() -> None:
    options = _options().parse_args()
    given = Assumptions(**{each.name: getattr(options, each.name) for each in fields(Assumptions)})
    try:
        figures = simulate(given)
    except ImportError as error:
        print(
            f"{error}: install adapters/ucm-valkey[valkey] and the dependency group databases; set PYTHONPATH=tests",
            file=sys.stderr,
        )
        sys.exit(2)
    missed: list[str] = []
    if figures["seconds"] > LONGEST_RUN:
        missed.append(f"it took {figures['seconds']:.0f} s, and may take {LONGEST_RUN:.0f}")
    if figures["recovery_seconds"] > MOST_RECOVERY * given.lease or figures["lost_leases"]:
        missed.append("after a restart not everybody is back before new leases are granted")
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
