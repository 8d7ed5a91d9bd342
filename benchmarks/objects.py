"""Objects: what only the garbage collector frees after a request, and what is made for a context that needs nothing."""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Final

import anyio

from benchmarks.drive import connections, requests
from benchmarks.live import WRAPS, Hold, through
from benchmarks.report import finish, parser, show
from benchmarks.rows import BARE, EVERYTHING, ROWS, Wrap, json_app, raw_app

CYCLIC: Final = 0.0
"""Objects per operation beyond the bare app's that wait for the garbage collector."""
MADE: Final = 0.01
"""Tasks, timers, locks, exit stacks and threads per live request or connection beyond the bare app's. What is below one
in a hundred was made once, for all: a thread that starts or ends meanwhile has a handful of locks.
"""

WATCHED: Final[dict[str, tuple[type, ...]]] = {
    "tasks": (asyncio.Task,),
    "futures": (asyncio.Future,),
    "timers": (asyncio.TimerHandle, anyio.CancelScope),
    "locks": (type(threading.Lock()), type(threading.RLock()), asyncio.Lock, asyncio.Event, threading.Condition),
    "exit stacks": (ExitStack, AsyncExitStack),
}

Operations = Callable[[int], Awaitable[None]]


async def cyclic(operations: Operations, count: int) -> float:
    """Objects per operation that a collection finds unreachable."""
    await operations(20)
    gc.collect()
    gc.disable()
    try:
        await operations(count)
        return gc.collect() / count
    finally:
        gc.enable()


def cyclic_cells(wrap: Wrap) -> dict[str, Operations]:
    """What is run to find cyclic objects: requests and connections through the wrap."""
    raw, json = wrap(raw_app), json_app(wrap)
    return {
        "HTTP": lambda count: requests(raw, count),
        "JSON": lambda count: requests(json, count),
        "WebSocket": lambda count: connections(raw, count, 3),
    }


def census() -> Counter[str]:
    """How many of each watched kind there are in the process."""
    found: Counter[str] = Counter(threads=threading.active_count())
    for type_, number in Counter(map(type, gc.get_objects())).items():
        found[_kind(type_)] += number
    return found


def _kind(type_: type) -> str:
    """The first watched kind it belongs to: a task is a future as well."""
    return next((kind for kind, types in WATCHED.items() if issubclass(type_, types)), "others")


async def made(hold: Hold, live: int) -> dict[str, float]:
    """How many of each watched kind came to be for one of so many live requests."""
    async with hold(1):  # what is made once for all
        gc.collect()
        before = census()
        async with hold(live):
            after = census()
    return {kind: (after[kind] - before[kind]) / live for kind in (*WATCHED, "threads")}


async def measure(count: int, live: int) -> dict[str, dict[str, dict[str, float]]]:
    """Both tables, each figure beyond the bare app's."""
    left = {row: {what: await cyclic(cell, count) for what, cell in cyclic_cells(ROWS[row]).items()} for row in ROWS}
    alive = {
        f"{row}, {'WebSocket' if websocket else 'HTTP'}": await made(through(wrap, websocket=websocket), live)
        for websocket in (False, True)
        for row, wrap in WRAPS.items()
    }
    return {
        "cyclic": {row: _beyond(own, left[BARE]) for row, own in left.items() if row != BARE},
        "made": {
            row: _beyond(own, alive[f"{BARE}, {row.rpartition(', ')[2]}"])
            for row, own in alive.items()
            if not row.startswith(BARE)
        },
    }


def _beyond(own: dict[str, float], bare: dict[str, float]) -> dict[str, float]:
    return {what: number - bare[what] for what, number in own.items()}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--count", type=int, default=1000, help="operations whose leftovers are counted")
    options_parser.add_argument("--live", type=int, default=2000, help="requests that are live at once")
    options = options_parser.parse_args()
    figures = asyncio.run(measure(options.count, options.live))
    titles = {
        "cyclic": "Objects per operation that only the garbage collector frees, beyond bare",
        "made": "Made for one live request or connection, beyond bare",
    }
    for part, title in titles.items():
        rows = figures[part]
        columns = list(next(iter(rows.values())))
        show(title, ["", *columns], [[row, *(f"{own[kind]:.2f}" for kind in columns)] for row, own in rows.items()])
    missed = [
        f"{row}, {what}: {number:.2f} {'cyclic objects' if part == 'cyclic' else 'made'}, at most {limit:g}"
        for part, limit in (("cyclic", CYCLIC), ("made", MADE))
        for row, own in figures[part].items()
        if row.startswith(EVERYTHING)
        for what, number in own.items()
        if number > limit
    ]
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
