"""What an owned handle, ``context.own(target)``, adds to a call, by the user whose it is."""

import asyncio
import statistics
import sys
from typing import Any, Final

from benchmarks.report import finish, parser, show
from benchmarks.timing import Samples, take_turns, timed
from ucm_middleware import UserExecutionContext, create_isolated_execution_context, managed_user_context

ADDED_US: Final = 1.0
"""Microseconds of CPU that the handle adds to a call."""


class Target:
    """Stands for an object of a client library."""

    __slots__ = ()

    def call(self) -> None:
        pass


def available() -> bool:
    """Whether contexts give out handles at all."""
    return hasattr(UserExecutionContext, "own")


async def measure(rounds: int) -> dict[str, float]:
    """Microseconds of a call without and with the handle, from inside the owner's context."""
    async with managed_user_context(create_isolated_execution_context("alice")) as context:
        owner: Any = context
        target = Target()
        handle: Target = owner.own(target)
        taken = take_turns({"plain": timed(lambda: target.call()), "owned": timed(lambda: handle.call())}, rounds)
    return {
        "plain_us": statistics.median(taken["plain"]) / 1e3,
        "owned_us": statistics.median(taken["owned"]) / 1e3,
        "added_us": statistics.median(_added(taken)) / 1e3,
    }


def _added(taken: Samples) -> list[float]:
    return [owned - plain for owned, plain in zip(taken["owned"], taken["plain"], strict=True)]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    if not available():
        print("this version of the package has no owned handles (UserExecutionContext.own)", file=sys.stderr)
        sys.exit(2)
    figures = asyncio.run(measure(options.rounds))
    show(
        "A call through an owned handle, microseconds of CPU",
        ["call", "through the handle", "added"],
        [[f"{figures[name]:.3f}" for name in ("plain_us", "owned_us", "added_us")]],
    )
    added = figures["added_us"]
    finish(options, figures, [f"a call: {added:.2f} us added, at most {ADDED_US:g}"] if added > ADDED_US else [])


if __name__ == "__main__":
    main()
