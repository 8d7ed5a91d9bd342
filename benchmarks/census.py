"""What the census adds to a request that leaves nothing behind: the middleware with it, and with ``action="off"``."""

import asyncio
import statistics
from time import thread_time_ns
from typing import Final

from benchmarks.drive import requests
from benchmarks.report import finish, parser, show
from benchmarks.rows import raw_app
from benchmarks.timing import Cell, ratio, take_turns
from ucm_middleware import CensusPolicy, UserContextManager, UserContextMiddleware
from ucm_middleware.census.policy import CensusAction

ADDED_US: Final = 5.0
"""Microseconds of CPU that the census adds to a clean request."""


def cell(runner: asyncio.Runner, action: CensusAction) -> Cell:
    """Requests to the middleware with this action."""
    manager = UserContextManager(census=CensusPolicy(action=action))
    app = UserContextMiddleware(raw_app, manager=manager)

    def run(count: int) -> int:
        start = thread_time_ns()
        runner.run(requests(app, count))
        return thread_time_ns() - start

    return run


def measure(rounds: int) -> dict[str, float]:
    """Microseconds of a request without and with the census."""
    with asyncio.Runner() as runner:
        taken = take_turns({"off": cell(runner, "off"), "record": cell(runner, "record")}, rounds)
    added = [on - off for on, off in zip(taken["record"], taken["off"], strict=True)]
    return {
        "off_us": statistics.median(taken["off"]) / 1e3,
        "record_us": statistics.median(taken["record"]) / 1e3,
        "added_us": statistics.median(added) / 1e3,
        "ratio": ratio(taken, "record", "off"),
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=41)
    options = options_parser.parse_args()
    figures = measure(options.rounds)
    show(
        "A request that leaves nothing behind, microseconds of CPU",
        ["without the census", "with it", "added", "ratio"],
        [[*(f"{figures[name]:.2f}" for name in ("off_us", "record_us", "added_us")), f"{figures['ratio']:.3f}"]],
    )
    added = figures["added_us"]
    finish(options, figures, [f"the census: {added:.2f} us added, at most {ADDED_US:g}"] if added > ADDED_US else [])


if __name__ == "__main__":
    main()
