"""How many objects a second the isolation report looks at."""

import gc
import statistics
import sys
import time
from typing import Any, Final

from benchmarks.report import finish, parser, show
from ucm_middleware.reachability import Root, find_shared

OBJECTS_PER_SECOND: Final = 1e6
"""Distinct objects, scalars included, that the walk gets through at least."""


def data(orders: int) -> list[Any]:
    """What a user may have: nested dicts and lists, and the scalars in them."""
    return [
        {"id": number, "tags": ["a", "b"], "lines": {"x": [number, (number, str(number))], "y": {"z": object()}}}
        for number in range(orders)
    ]


def count(*starts: Any) -> int:
    """How many distinct objects there are, classes aside: counted one by one, and not by what is measured."""
    seen: set[int] = set()
    waiting = list(starts)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [held for held in gc.get_referents(value) if not isinstance(held, type)]
    return len(seen)


def measure(orders: int, rounds: int) -> dict[str, float]:
    """The median of the rounds, without and with a finding, whose paths have to be found too."""
    alice, bob = data(orders), data(orders)
    objects = count(alice, bob)
    rates: dict[str, list[float]] = {"nothing shared": [], "one object shared": []}
    roots = [Root("alice", "alice.orders", alice), Root("bob", "bob.orders", bob)]
    for name, taken in rates.items():
        if name == "one object shared":
            bob.append(alice[len(alice) // 2]["lines"])
        for _ in range(rounds):
            before = time.process_time()
            found = find_shared(roots)
            taken.append(objects / (time.process_time() - before))
            if len(found) != (name == "one object shared"):
                sys.exit(f"found {len(found)} shared objects")
    return {"objects": objects, **{name: statistics.median(taken) for name, taken in rates.items()}}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--orders", type=int, default=60_000, help="of each of two users, 9 objects each")
    options_parser.add_argument("--rounds", type=int, default=7)
    options = options_parser.parse_args()
    figures = measure(options.orders, options.rounds)
    rate = figures["nothing shared"]
    show(
        f"The walk over {figures['objects']:,.0f} objects of two users, millions a second of CPU",
        ["", "objects"],
        [[name, f"{figures[name] / 1e6:.2f}"] for name in ("nothing shared", "one object shared")],
    )
    missed = [f"{rate:,.0f} objects a second, at least {OBJECTS_PER_SECOND:,.0f}"] if rate < OBJECTS_PER_SECOND else []
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
