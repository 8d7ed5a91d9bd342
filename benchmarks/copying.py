"""The copy of an app's data at the boundary of a context, against ``copy.deepcopy``."""

import copy
import statistics
from typing import Any, Final

from benchmarks.report import finish, parser, show
from benchmarks.timing import ratio, take_turns, timed
from ucm_middleware.isolation import copy_data

RATIO: Final = 1 / 3
"""The copy of the typical data, in what ``copy.deepcopy`` takes."""

TYPICAL: Final = "typical, nested"


def samples() -> dict[str, dict[str, Any]]:
    """What applications put into a context: one level, a few levels, and many of them."""
    flat: dict[str, Any] = {"account": 17, "tenant": "t-17", "locale": "en", "admin": False, "plan": "pro"}
    typical = {
        **flat,
        "roles": ["reader", "writer", "billing"],
        "flags": {"beta": True, "dark": False, "limit": 25},
        "preferences": {
            "theme": "dark",
            "page": {"size": 50, "sort": "date"},
            "columns": ["id", "name", "when"],
        },
        "scopes": ["read:all", "write:own"],
        "email": "someone@example.org",
    }
    large = {f"key-{number}": {"n": number, "tags": ["a", "b"], "text": f"value {number}"} for number in range(200)}
    return {"flat": flat, TYPICAL: typical, "large": large}


def measure(data: dict[str, Any], rounds: int) -> dict[str, float]:
    """Microseconds of both copies, and the ratio."""
    taken = take_turns(
        {
            "own": timed(lambda: copy_data(data, "agent_context")),
            "deepcopy": timed(lambda: copy.deepcopy(data)),
        },
        rounds,
    )
    return {
        "copy_us": statistics.median(taken["own"]) / 1e3,
        "deepcopy_us": statistics.median(taken["deepcopy"]) / 1e3,
        "ratio": ratio(taken, "own", "deepcopy"),
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    figures = {name: measure(data, options.rounds) for name, data in samples().items()}
    show(
        "Copying at the boundary, microseconds of CPU",
        ["data", "copy", "deepcopy", "ratio"],
        [
            [name, f"{own['copy_us']:.2f}", f"{own['deepcopy_us']:.2f}", f"{own['ratio']:.2f}"]
            for name, own in figures.items()
        ],
    )
    found = figures[TYPICAL]["ratio"]
    missed = [f"the typical data: {found:.2f} of deepcopy, at most {RATIO:.2f}"] if found > RATIO else []
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
