"""Bytes of one live context beyond the app's own data. Each figure is taken in a process of its own."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.live import WRAPS, Hold, accepted_for_events, made_by_hand, opened_for_connections, through
from benchmarks.report import finish, parser, show
from benchmarks.rows import BARE

CONTEXT_BYTES: Final = 600.0
"""What the manager holds for one context, by tracemalloc."""

CONNECTION_BYTES: Final = 2048.0
"""What all of the package holds for one WebSocket that waits for events, its context among it."""

SIZES: Final = (10_000, 100_000)
WARM_UP: Final = 100
CONNECTION: Final = "an idle connection with events"
CONTEXTS: Final = {
    "a connection's context": opened_for_connections,
    "create_isolated_context": made_by_hand,
    CONNECTION: accepted_for_events,
}

CASES: Final[dict[str, Callable[[], Hold]]] = {
    **CONTEXTS,
    **{name: partial(through, wrap) for name, wrap in WRAPS.items()},
}
"""Contexts alone, and one live request of each row: its context, coroutines and closures."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Of one live context or request: as tracemalloc sees it, and as the process grew."""

    traced: float
    resident: float


async def weigh(case: str, live: int, *, traced: bool, lines: int = 0) -> float:
    """Bytes of each of so many. With ``lines``, print where most of them were asked for."""
    hold = CASES[case]()
    async with hold(WARM_UP):
        gc.collect()
        gc.disable()
        if traced:
            tracemalloc.start()
        before = _used(traced)
        async with hold(live):
            held = (_used(traced) - before) / live
            if lines:
                for line in tracemalloc.take_snapshot().statistics("lineno")[:lines]:
                    print(f"{line.size / live:7.0f} bytes  {line.traceback}")
        tracemalloc.stop()
        gc.enable()
    return held


def _used(traced: bool) -> float:
    if traced:
        return tracemalloc.get_traced_memory()[0]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def weigh_apart(case: str, live: int) -> Bytes:
    """Both figures, each from a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--weigh", case, "--live", str(live)]
    traced, resident = (
        json.loads(subprocess.run([*command, *more], stdout=subprocess.PIPE, check=True).stdout)
        for more in (["--traced"], [])
    )
    return Bytes(traced, resident)


def beyond_bare(figures: dict[str, Bytes]) -> dict[str, Bytes]:
    """The requests without what the bare app's request takes: its scope, task and coroutine."""
    bare = figures[BARE]
    return {
        case: own if case in CONTEXTS else Bytes(own.traced - bare.traced, own.resident - bare.resident)
        for case, own in figures.items()
        if case != BARE
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--live", type=int, nargs="+", default=list(SIZES), help="how many are live at once")
    options_parser.add_argument("--lines", type=int, default=0, help="with --weigh: print the lines that hold most")
    options_parser.add_argument("--weigh", choices=list(CASES), metavar="CASE", help="one case, in this process")
    options_parser.add_argument(
        "--traced", action="store_true", help="with --weigh: by tracemalloc, not by the process"
    )
    options = options_parser.parse_args()
    if options.weigh is not None:
        traced = options.traced or options.lines > 0
        print(asyncio.run(weigh(options.weigh, options.live[0], traced=traced, lines=options.lines)))
        return
    sizes: dict[int, dict[str, Bytes]] = {
        live: beyond_bare({case: weigh_apart(case, live) for case in CASES}) for live in options.live
    }
    show(
        "Bytes beyond the app's own: a context, or a live request of each row",
        ["", *(f"{kind}, {live:,} live" for live in sizes for kind in ("traced", "resident"))],
        [
            [case, *(f"{value:.0f}" for own in sizes.values() for value in (own[case].traced, own[case].resident))]
            for case in CASES
            if case != BARE
        ],
    )
    missed = [
        f"{case} at {live:,}: {own[case].traced:.0f} bytes, at most {most:g}"
        for live, own in sizes.items()
        for case in CONTEXTS
        if own[case].traced > (most := CONNECTION_BYTES if case == CONNECTION else CONTEXT_BYTES)
    ]
    figures: dict[str, Any] = {
        str(live): {case: asdict(bytes_) for case, bytes_ in own.items()} for live, own in sizes.items()
    }
    finish(options, {"live": figures}, missed)


if __name__ == "__main__":
    main()
