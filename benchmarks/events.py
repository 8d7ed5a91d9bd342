"""Events to users: on real servers, beside bare sends, python-socketio's rooms and ``websockets.broadcast``; and what
idle connections hold and add.

Each server is a process of its own, and so are its clients; all are up from the beginning, and visited in turn, round
by round. CPU is that of all threads of the server.
"""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from benchmarks.event_clients import Served, served
from benchmarks.event_population import among, serialisations
from benchmarks.event_servers import LOOPS, OURS, SOCKETIO, USERS, WEBSOCKETS
from benchmarks.memory import CONNECTION, CONNECTION_BYTES, weigh_apart
from benchmarks.report import finish, parser, show

# The limits.
ONE: Final = 1.5
"""The CPU of an event to one connection, in that of a bare send of the same bytes."""
SERIALISED: Final = 1
"""How often an event to ten connections is serialised."""
AMONG: Final = 1.1
"""The CPU of an event among idle connections of others, in that of one where there are none. A tenth is noise."""

ALONE, TEN = USERS
BARE: Final = "bare/"
"""The folder of the connections without the product."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in each round: a work of a server, for the connections of a path."""

    server: str
    work: str
    path: str
    is_apart: bool = False
    """One at a time, rather than at once to clients that read later."""

    async def measure(self, server: Served, times: int) -> float:
        """Microseconds of CPU for each time."""
        return await server.cpu(self.work, self.path, times, late=not self.is_apart)


APART: Final = "one at a time, "
CELLS: Final[dict[str, Cell]] = {
    "event, 1": Cell(OURS, f"event {ALONE}", ALONE),
    "bare send, 1": Cell(OURS, f"bare {ALONE}", BARE + ALONE),
    "task, 1": Cell(OURS, f"task {ALONE}", BARE + ALONE),
    "rooms, 1": Cell(SOCKETIO, f"event {ALONE}", ALONE),
    "broadcast, 1": Cell(WEBSOCKETS, f"event {ALONE}", ALONE),
    "event, 10": Cell(OURS, f"event {TEN}", TEN),
    "bare send, 10": Cell(OURS, f"bare {TEN}", BARE + TEN),
    "rooms, 10": Cell(SOCKETIO, f"event {TEN}", TEN),
    "broadcast, 10": Cell(WEBSOCKETS, f"event {TEN}", TEN),
    f"{APART}event, 1": Cell(OURS, f"apart event {ALONE}", ALONE, is_apart=True),
    f"{APART}bare send, 1": Cell(OURS, f"apart bare {ALONE}", BARE + ALONE, is_apart=True),
    f"{APART}nothing": Cell(OURS, f"apart nothing {ALONE}", "", is_apart=True),
}
LINES: Final = {
    "event, 1": "an event to 1 connection",
    "bare send, 1": "bare `send` of the same bytes",
    "task, 1": "`json.dumps` of the data, and bare `send` in a task",
    "rooms, 1": "python-socketio, a room of 1",
    "broadcast, 1": "`websockets.broadcast` to 1",
    "event, 10": "an event to 10 connections",
    "bare send, 10": "10 bare sends",
    "rooms, 10": "python-socketio, a room of 10",
    "broadcast, 10": "`websockets.broadcast` to 10",
    f"{APART}event, 1": "one at a time: an event to 1 connection",
    f"{APART}bare send, 1": "one at a time: bare `send`",
}

Samples = dict[str, list[float]]
"""Microseconds of CPU for each time, a figure a round."""


async def take_turns(loop: str, rounds: int, times: int) -> Samples:
    """Measure every cell whose server is installed in every round; what ten connections get, a fifth as often."""
    async with AsyncExitStack() as stack:
        servers = {OURS: await stack.enter_async_context(served(OURS, loop, "", BARE))}
        for name in (SOCKETIO, WEBSOCKETS):
            if find_spec(name) is not None:
                servers[name] = await stack.enter_async_context(served(name, loop, ""))
        cells = {name: cell for name, cell in CELLS.items() if cell.server in servers}
        samples: Samples = {name: [] for name in cells}
        for at in range(rounds + 1):  # the first is to warm up
            for name in cells if at % 2 == 0 else reversed(cells):
                cell = cells[name]
                took = await cell.measure(servers[cell.server], max(1, times // 5 if name.endswith(" 10") else times))
                if at > 0:
                    samples[name].append(took)
    nothing = samples.pop(f"{APART}nothing")
    for name, own in samples.items():
        if name.startswith(APART):
            samples[name] = [took - free for took, free in zip(own, nothing, strict=True)]
    return samples


def to_bare(samples: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """What it takes in bare sends to as many connections, for each round."""
    apart, number = name.startswith(APART), name.rpartition(" ")[2]
    base = f"{APART if apart else ''}bare send, {number}"
    return [own / bare for own, bare in zip(samples[name], samples[base], strict=True)]


def missed_limits(ratios: Mapping[str, float], serialised: int, among: float, held: float) -> list[str]:
    """Which limits are missed, in words. The first are medians by row, the last are bytes."""
    one = [(LINES[name], ratios[name], ONE, "x a bare send") for name in ("event, 1", f"{APART}event, 1")]
    others = [
        ("serialised for 10 connections", serialised, SERIALISED, " times"),
        ("an event among idle connections", among, AMONG, "x one alone"),
        (CONNECTION, held, CONNECTION_BYTES, " bytes"),
    ]
    return [
        f"{what}: {it:.{2 if it < 100 else 0}f}{unit}, at most {limit:g}"
        for what, it, limit, unit in (*one, *others)
        if it > limit
    ]


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=9)
    options_parser.add_argument("--times", type=int, default=400, help="events to one connection in a round")
    options_parser.add_argument("--idle", type=int, default=10_000, help="connections of others that are idle")
    options_parser.add_argument("--held", type=int, default=5_000, help="idle connections that are weighed")
    options_parser.add_argument("--loop", choices=LOOPS, help="of the servers; default: uvloop if installed")
    options = options_parser.parse_args()
    loop: str = options.loop or ("uvloop" if find_spec("uvloop") is not None else "asyncio")
    samples = asyncio.run(take_turns(loop, options.rounds, options.times))
    ratios = {name: to_bare(samples, name) for name in samples}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    serialised = serialisations(10)
    idle = among(options.idle, options.rounds)
    weight = weigh_apart(CONNECTION, options.held)
    show(
        f"CPU of the server, {loop} (medians; lowest to highest of {options.rounds} rounds)",
        ["", "us", "", "x bare", ""],
        [
            [
                LINES[name],
                f"{statistics.median(own):.1f}",
                _range(own, ".1f"),
                f"{medians[name]:.2f}",
                _range(ratios[name], ".2f"),
            ]
            for name, own in samples.items()
        ],
    )
    print(f"An event to 10 connections is serialised {serialised} times.")
    print(f"Among {options.idle:,} idle connections, an event takes {idle:.2f} of what it takes alone.")
    print(f"{CONNECTION}: {weight.traced:.0f} bytes traced, {weight.resident:.0f} resident.")
    figures: dict[str, Any] = {
        "loop": loop,
        "rounds": samples,
        "ratios": medians,
        "serialised": serialised,
        "among": idle,
        "bytes": {"traced": weight.traced, "resident": weight.resident},
    }
    finish(options, figures, missed_limits(medians, serialised, idle, weight.traced))


if __name__ == "__main__":
    main()
