"""Instructions per request, connection and message, counted by callgrind: figures that a busy machine does not move.

Each row runs in a process of its own, all its cells one after another. The process calls ``getsid``, which nothing else
does, before and after each cell, and callgrind writes down the instructions since the last call.
"""

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.drive import connections, requests
from benchmarks.report import finish, parser, show
from benchmarks.rows import BARE, EVERYTHING, FLOOR, ROWS, json_app, raw_app

# The limits, of the row with everything on.
HTTP_FLOORS: Final = 9.0
"""What is added to a request, in what the floor adds to it."""
WEBSOCKET_FLOORS: Final = 9.0
"""What is added to a connection, in what the floor adds to it."""
JSON_RATIO: Final = 1.4
"""A Starlette JSON endpoint, against itself without the middleware."""
MESSAGE_RATIO: Final = 1.01
"""A WebSocket message received and one sent, against themselves without the middleware; 1% is noise."""

TEXTS: Final = 10
WARM_UP: Final = 60
"""Operations before the counting: lazy set-up, and an interpreter that specialises what runs often."""

Cell = Callable[[int], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions per operation of one row. ``message`` is one text received and echoed."""

    http: float
    json: float
    websocket: float
    message: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One row against the bare app and the floor."""

    http_added: float
    http_floors: float
    json_ratio: float
    websocket_added: float
    websocket_floors: float
    message_added: float
    message_ratio: float


def cells(row: str) -> list[Cell]:
    """What is counted of a row, each to be run with a number of operations."""
    wrap = ROWS[row]
    raw, json = wrap(raw_app), json_app(wrap)
    return [
        lambda count: requests(raw, count),
        lambda count: requests(json, count),
        lambda count: connections(raw, count, 0),
        lambda count: connections(raw, count, TEXTS),
    ]


def run_row(row: str, operations: int) -> None:
    """Under callgrind: run each cell, and mark its beginning and end."""
    with asyncio.Runner() as runner:
        measured = cells(row)
        for cell in measured:
            runner.run(cell(WARM_UP))
        gc.collect()
        gc.freeze()
        for cell in measured:
            runner.run(_marked(cell, operations))


async def _marked(cell: Cell, operations: int) -> None:
    await cell(WARM_UP // 3)
    gc.collect()
    os.getsid(0)
    await cell(operations)
    os.getsid(0)


def count_row(row: str, operations: int) -> Counts:
    """Instructions per operation. Raises RuntimeError with what the process said when it failed."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "counts")
        valgrind = ["valgrind", "--tool=callgrind", "--dump-before=getsid", f"--callgrind-out-file={output}"]
        command = [*valgrind, sys.executable, "-m", "benchmarks.cost", "--run", row, "--operations", str(operations)]
        # Hashes that differ from run to run make dicts of different shapes.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"the row {row!r} failed under valgrind:\n{done.stderr}")
        http, json, silent, talking = (
            _instructions(Path(f"{output}.{2 * at + 2}")) / operations for at in range(len(cells(row)))
        )
    return Counts(http, json, silent, (talking - silent) / TEXTS)


def _instructions(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind wrote no totals into {dump.name}")
    return int(found[1])


def compare(counts: dict[str, Counts]) -> dict[str, Figures]:
    """Each row against the bare app and the floor."""
    bare, floor = counts[BARE], counts[FLOOR]
    return {
        row: Figures(
            http_added=own.http - bare.http,
            http_floors=(own.http - bare.http) / (floor.http - bare.http),
            json_ratio=own.json / bare.json,
            websocket_added=own.websocket - bare.websocket,
            websocket_floors=(own.websocket - bare.websocket) / (floor.websocket - bare.websocket),
            message_added=own.message - bare.message,
            message_ratio=own.message / bare.message,
        )
        for row, own in counts.items()
    }


def missed_limits(figures: Figures) -> list[str]:
    """Which limits are missed, in words."""
    held = [
        ("HTTP request", figures.http_floors, HTTP_FLOORS, "x the floor"),
        ("Starlette JSON endpoint", figures.json_ratio, JSON_RATIO, "x bare"),
        ("WebSocket connection", figures.websocket_floors, WEBSOCKET_FLOORS, "x the floor"),
        ("WebSocket message", figures.message_ratio, MESSAGE_RATIO, "x bare"),
    ]
    return [f"{what}: {found:.2f}{unit}, at most {limit:g}" for what, found, limit, unit in held if found > limit]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--operations", type=int, default=100, help="per cell; default 100")
    options_parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    options_parser.add_argument("--run", choices=list(ROWS), metavar="ROW", help="run one row here, uncounted")
    options = options_parser.parse_args()
    if options.run is not None:
        run_row(options.run, options.operations)
        return
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: get the package of that name (apt-get install valgrind)", file=sys.stderr)
        sys.exit(2)
    with ThreadPoolExecutor(options.jobs) as pool:
        counts = dict(zip(ROWS, pool.map(partial(count_row, operations=options.operations), ROWS), strict=True))
    figures = compare(counts)
    show(
        "Instructions, in thousands",
        ["", "HTTP", "x floor", "JSON", "x bare", "WebSocket", "x floor", "message", "x bare"],
        [
            [
                row,
                f"{counts[row].http / 1e3:.1f}",
                f"{own.http_floors:.2f}",
                f"{counts[row].json / 1e3:.1f}",
                f"{own.json_ratio:.3f}",
                f"{counts[row].websocket / 1e3:.1f}",
                f"{own.websocket_floors:.2f}",
                f"{counts[row].message / 1e3:.2f}",
                f"{own.message_ratio:.3f}",
            ]
            for row, own in figures.items()
        ],
    )
    rows = {row: {"instructions": asdict(counts[row]), **asdict(own)} for row, own in figures.items()}
    finish(options, {"rows": rows}, missed_limits(figures[EVERYTHING]))


if __name__ == "__main__":
    main()
