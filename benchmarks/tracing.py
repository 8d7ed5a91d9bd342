"""What spans cost a request: the guard where no SDK is set, and what an SDK makes of it where one is."""

import asyncio
from collections.abc import Callable
from secrets import token_urlsafe
from typing import Final

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from starlette.requests import HTTPConnection

from benchmarks.drive import requests
from benchmarks.report import finish, parser, show
from benchmarks.rows import raw_app
from benchmarks.timing import ratio, take_turns, timed
from ucm_middleware import UserContextManager, UserContextMiddleware
from ucm_middleware.types import ASGIApp

GUARDS: Final = 2
"""How often a request looks whether there are spans."""

GUARD_PERCENT: Final = 1.0
"""Of a request, what its guards take."""


def served(manager: UserContextManager) -> ASGIApp:
    """The least application, with a resolver."""

    def identify(connection: HTTPConnection) -> str:
        return "alice"

    return UserContextMiddleware(raw_app, manager=manager, identify=identify)


def measure(rounds: int) -> dict[str, float]:
    """Microseconds of CPU of each, and ratios within a round."""
    without = UserContextManager()
    off = served(without)
    with asyncio.Runner() as runner:
        runner.run(requests(off, 1))  # before there is an SDK: from its first record on, the manager looks no more
        trace.set_tracer_provider(provider := TracerProvider())
        provider.add_span_processor(SpanProcessor())  # one that does nothing: no exporter is measured
        on = served(UserContextManager(secret=token_urlsafe(32)))
        recording = provider.get_tracer("benchmark")

        def request(app: ASGIApp) -> Callable[[], object]:
            return lambda: runner.run(requests(app, 50))

        def guard() -> None:
            for _ in range(50 * GUARDS):
                if without.telemetry.spans is not None:
                    raise AssertionError("the manager without spans has some")

        def nothing() -> None:
            for _ in range(50 * GUARDS):
                pass

        def span() -> None:
            for _ in range(50):
                recording.start_span("a span", attributes={"one": "1"}).end()

        cells = {
            "request without spans": timed(request(off)),
            "request with spans": timed(request(on)),
            "guards": timed(guard),
            "the loop of the guards": timed(nothing),
            "a bare span of the SDK": timed(span),
        }
        taken = take_turns(cells, rounds)
    base = "request without spans"
    own = {name: ratio(taken, name, base) for name in cells}
    return {
        "request_us": sorted(taken[base])[rounds // 2] / 50e3,
        "guard_percent": 100 * (own["guards"] - own["the loop of the guards"]),
        "traced_ratio": own["request with spans"],
        "span_ratio": own["a bare span of the SDK"],
    }


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    figures = measure(options.rounds)
    show(
        "A request, and what spans add to it",
        ["without spans", "the guards, of that", "with spans, recorded", "a bare span of the SDK"],
        [
            [
                f"{figures['request_us']:.1f} us",
                f"{figures['guard_percent']:.2f}%",
                f"x {figures['traced_ratio']:.2f}",
                f"x {figures['span_ratio']:.2f}",
            ]
        ],
    )
    percent = figures["guard_percent"]
    missed = [f"the guards take {percent:.2f}% of a request, at most {GUARD_PERCENT:g}"]
    finish(options, figures, missed if percent > GUARD_PERCENT else [])


if __name__ == "__main__":
    main()
