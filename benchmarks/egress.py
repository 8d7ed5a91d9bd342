"""What the egress guard costs: a look at a JSON response of 1 KB with a million protected values; memory for each."""

import json
import secrets
import statistics
import time
import tracemalloc
from typing import Final

from benchmarks.report import finish, parser, show
from benchmarks.timing import take_turns, timed
from ucm_middleware import EgressPolicy, UserContextManager
from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import token_of

LIMIT_US: Final = 30.0
"""Microseconds of CPU that a response of 1 KB may take."""

SIZE: Final = 1024
SAMPLE: Final = 10_000


def response() -> bytes:
    """A JSON document of 1 KB as services send it: names, texts, UUIDs, and tokens that are nobody's."""
    document = [
        {
            "id": number,
            "name": "Somebody Of Somewhere",
            "uuid": f"0b8a5f0c-4c8f-4b0b-9d3e-1f7a7a2b9c{number:02x}",
            "note": "a text of some words, as people write",
            "active": True,
            "token": secrets.token_urlsafe(32),
        }
        for number in range(8)
    ]
    return json.dumps(document).encode()[:SIZE]


def bytes_of_one() -> float:
    """Bytes of memory for each of 100,000 values of 1,000 users."""
    count = 10 * SAMPLE
    values = ProtectedValues(count, 3600.0, time.monotonic)
    tracemalloc.start()
    for number in range(count):
        values.add(token_of(secrets.token_hex(16), 32), f"user{number % 1000}")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / count


def measure(values: int, rounds: int) -> dict[str, float]:
    """Microseconds for one response, without a hit, by how many values are protected."""
    body = response()
    manager = UserContextManager(egress=EgressPolicy(max_values=values))
    guard = manager.egress
    assert guard is not None
    for number in range(values):
        guard.table.add(token_of(secrets.token_hex(16), 32), f"user{number % 50_000}")
    bob = "bob"
    taken = take_turns({"response": timed(lambda: guard.hits(body, bob, None, "response"))}, rounds)
    return {"values": float(len(guard.table)), "response_us": statistics.median(taken["response"]) / 1e3}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--values", type=int, default=1_000_000)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    figures = {"bytes": bytes_of_one(), **measure(options.values, options.rounds)}
    show(
        "The egress guard",
        ["protected values", "a response of 1 KB, us", "bytes a value"],
        [[f"{figures['values']:,.0f}", f"{figures['response_us']:.1f}", f"{figures['bytes']:.0f}"]],
    )
    took = figures["response_us"]
    missed = [f"a response of 1 KB: {took:.1f} us, at most {LIMIT_US:g}"] if took > LIMIT_US else []
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
