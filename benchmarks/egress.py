"""What the egress guard costs with a million protected values: a look at a JSON response of 1 KB, and all of a request
that is answered with one, with and without the guard; memory for each value.
"""

import asyncio
import json
import secrets
import statistics
import time
import tracemalloc
from typing import Final

from benchmarks.drive import requests
from benchmarks.report import finish, parser, show
from benchmarks.timing import Cell, take_turns, timed
from ucm_middleware import EgressPolicy, UserContextManager, UserContextMiddleware
from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import token_of
from ucm_middleware.types import Receive, Scope, Send

LIMIT_US: Final = 30.0
"""Microseconds of CPU that the guard may take of a request that is answered with 1 KB: all of what it does there."""

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


def bytes_of_one(count: int) -> float:
    """Bytes of memory for each of so many values of 1,000 users."""
    values = ProtectedValues(count, 3600.0, time.monotonic)
    tracemalloc.start()
    for number in range(count):
        values.add(token_of(secrets.token_hex(16), 32), f"user{number % 1000}")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / count


def served(manager: UserContextManager, body: bytes, loop: asyncio.AbstractEventLoop) -> Cell:
    """Requests through the middleware to an app that reads nothing and answers with this body."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers.copy()})
        await send({"type": "http.response.body", "body": body})

    middleware = UserContextMiddleware(app, manager=manager, identify=lambda _: "bob")

    def cell(count: int) -> int:
        start = time.thread_time_ns()
        loop.run_until_complete(requests(middleware, count))
        return time.thread_time_ns() - start

    return cell


def measure(values: int, rounds: int) -> dict[str, float]:
    """Microseconds for one response and for one request, without a hit, with so many protected values."""
    body = response()
    manager = UserContextManager(egress=EgressPolicy(max_values=values))
    guard = manager.egress
    assert guard is not None
    for number in range(values):
        guard.table.add(token_of(secrets.token_hex(16), 32), f"user{number % 50_000}")
    bob = "bob"
    loop = asyncio.new_event_loop()
    cells = {
        "response": timed(lambda: guard.hits(body, bob, None, "response")),
        "with": served(manager, body, loop),
        "without": served(UserContextManager(), body, loop),
    }
    taken = take_turns(cells, rounds)
    loop.close()
    parts = [own - theirs for own, theirs in zip(taken["with"], taken["without"], strict=True)]
    return {
        "values": float(len(guard.table)),
        "response_us": statistics.median(taken["response"]) / 1e3,
        "with_us": statistics.median(taken["with"]) / 1e3,
        "without_us": statistics.median(taken["without"]) / 1e3,
        "guard_us": statistics.median(parts) / 1e3,
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--values", type=int, default=1_000_000)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    figures = {"bytes": bytes_of_one(min(options.values, 10 * SAMPLE)), **measure(options.values, options.rounds)}
    show(
        "The egress guard",
        [
            "protected values",
            "a look at 1 KB, us",
            "a request with the guard",
            "without",
            "the guard's part",
            "bytes a value",
        ],
        [
            [
                f"{figures['values']:,.0f}",
                *(f"{figures[name]:.1f}" for name in ("response_us", "with_us", "without_us", "guard_us")),
                f"{figures['bytes']:.0f}",
            ]
        ],
    )
    took = figures["guard_us"]
    missed = [f"the guard's part of a request: {took:.1f} us, at most {LIMIT_US:g}"] if took > LIMIT_US else []
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
