"""Throughput on real uvicorn (httptools, uvloop) under wrk, with the middleware and without.

All servers are up from the beginning, on one core, and wrk visits them in turn from another.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from socket import create_server
from typing import Final

import uvicorn

from benchmarks.report import finish, parser, show
from benchmarks.rows import BARE, EVERYTHING, ROWS, json_app

RATIO: Final = 0.90
"""The median throughput with everything on, in the bare app's of the same round."""

SERVER_CORE: Final = "0"
WRK_CORE: Final = "1"


@dataclass(frozen=True, slots=True)
class Figures:
    """Requests a second, and the ratio to the bare app of the same round: median, lowest and highest."""

    rate: float
    ratio: float
    lowest: float
    highest: float


def serve(row: str, port: int) -> None:
    """Run the server of one row in this process until it is told to stop."""
    uvicorn.run(
        json_app(ROWS[row]),
        host="127.0.0.1",
        port=port,
        http="httptools",
        loop="uvloop",
        access_log=False,
        log_level="error",
    )


@contextmanager
def server(row: str) -> Generator[str]:
    """A server of its own for the row. Gives its URL once it answers."""
    with create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["taskset", "-c", SERVER_CORE, sys.executable, "-m", "benchmarks.wire"]
    process = subprocess.Popen([*command, "--serve", row, "--port", str(port)])
    try:
        url = f"http://127.0.0.1:{port}/"
        _await_answer(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _await_answer(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                answer.read()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("a server did not start")


def visit(url: str, seconds: int, connections: int) -> float:
    """Requests a second. Raises RuntimeError when wrk was answered with anything but 2xx, or lost a connection."""
    command = ["taskset", "-c", WRK_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if rate is None or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"not every request was answered with 2xx:\n{text}")
    return float(rate[1])


def measure(rows: Sequence[str], rounds: int, seconds: int, connections: int) -> dict[str, Figures]:
    """Visit every row in every round, each right between two visits to the bare app."""
    rates: dict[str, list[float]] = {row: [] for row in rows}
    ratios: dict[str, list[float]] = {row: [] for row in rows}
    with ExitStack() as stack:
        urls = {row: stack.enter_context(server(row)) for row in dict.fromkeys((BARE, *rows))}
        for url in urls.values():
            visit(url, 1, connections)
        before = visit(urls[BARE], seconds, connections)
        for _ in range(rounds):
            for row in rows:
                rate = visit(urls[row], seconds, connections)
                after = visit(urls[BARE], seconds, connections)
                rates[row].append(rate)
                ratios[row].append(rate / ((before + after) / 2))
                before = after
    return {
        row: Figures(statistics.median(rates[row]), statistics.median(own), min(own), max(own))
        for row, own in ratios.items()
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=7)
    options_parser.add_argument("--seconds", type=int, default=3, help="of each visit")
    options_parser.add_argument("--connections", type=int, default=32)
    options_parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[BARE, EVERYTHING], metavar="ROW")
    options_parser.add_argument("--serve", choices=list(ROWS), help=argparse.SUPPRESS)
    options_parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = options_parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.port)
        return
    if missing := [tool for tool in ("wrk", "taskset") if shutil.which(tool) is None]:
        print(f"not installed: {', '.join(missing)} (apt-get install wrk util-linux)", file=sys.stderr)
        sys.exit(2)
    figures = measure(options.rows, options.rounds, options.seconds, options.connections)
    show(
        "Throughput on uvicorn (httptools, uvloop), a Starlette JSON endpoint",
        ["", "requests/s", "x bare", "lowest", "highest"],
        [
            [row, f"{own.rate:.0f}", f"{own.ratio:.3f}", f"{own.lowest:.3f}", f"{own.highest:.3f}"]
            for row, own in figures.items()
        ],
    )
    rows = {row: asdict(own) for row, own in figures.items()}
    missed = [
        f"{row}: {own.ratio:.3f} of bare, at least {RATIO:g}"
        for row, own in figures.items()
        if row == EVERYTHING and own.ratio < RATIO
    ]
    finish(options, {"rows": rows}, missed)


if __name__ == "__main__":
    main()
