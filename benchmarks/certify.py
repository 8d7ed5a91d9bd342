"""How long `ucm certify` takes with its default budget, and how many requests it sends: to the two small applications
of the quickstarts, and to the help desk, which is as slow as applications are.

    python -m benchmarks.certify
"""

import asyncio
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.report import finish, parser, show
from ucm_middleware.certify.castfile import read_cast
from ucm_middleware.certify.certifying import SECONDS, Options, certify
from ucm_middleware.certify.coverage import Coverage

ROOT: Final = Path(__file__).parents[1]

LONGEST: Final = 60.0
"""Seconds that a run may take from its start to its report."""

RATE: Final = 1000.0
"""Requests that must be sent for each second that the sender computes, and to the fastest in each second."""

FASTEST: Final = "examples.quickstart_starlette:app"

APPS: Final = (FASTEST, "examples.quickstart_fastapi:app", "examples.helpdesk.app:app")


@dataclass(frozen=True, slots=True)
class Run:
    """``total`` and ``trying`` are seconds; ``computed`` are the sender's own, of CPU, while it tried; ``served`` are
    those of the application's process, its start included.
    """

    total: float
    trying: float
    computed: float
    served: float
    sent: int


class Watch:
    """Progress that takes the CPU time of the first steps and of the last."""

    def __init__(self) -> None:
        self._first: float | None = None
        self.computed = 0.0

    def stage(self, what: str, seconds: float | None) -> None:
        """Nothing."""

    def done(self, coverage: Coverage, findings: int) -> None:
        """Steps were taken."""
        now = time.process_time()
        if self._first is None:
            self._first = now
        self.computed = now - self._first


def run(app: str, seconds: float) -> Run:
    """One run, with all but its seconds by default."""
    cast = read_cast(str(ROOT / "examples/helpdesk/users.toml"))
    options = Options(app, cast, app_dir=ROOT, seed=1, seconds=seconds)
    watch = Watch()
    begun, served = time.perf_counter(), children_time()
    result = asyncio.run(certify(options, watch))
    total, served = time.perf_counter() - begun, children_time() - served
    return Run(total, result.seconds, watch.computed, served, result.coverage.requests + result.coverage.messages)


def children_time() -> float:
    """Seconds of CPU of the processes that were started, and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run each application once."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=SECONDS, help="how long each is tried")
    options = arguments.parse_args()
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HELPDESK_DATABASE"] = str(Path(folder, "helpdesk.sqlite"))
        for app in APPS:
            runs[app] = run(app, options.seconds)
    columns = (
        "application",
        *("seconds in all", "CPU of the application", "sent", "sent a second", "sent a second of the sender's CPU"),
    )
    show(
        f"ucm certify, with {options.seconds:g} seconds", columns, [(app, *texts_of(one)) for app, one in runs.items()]
    )
    finish(options, {app: asdict(one) for app, one in runs.items()}, missed(runs))


def texts_of(one: Run) -> tuple[str, ...]:
    """The cells of a row."""
    seconds = f"{one.total:.1f}", f"{one.served:.1f}"
    return *seconds, f"{one.sent:,}", f"{one.sent / one.trying:,.0f}", f"{one.sent / one.computed:,.0f}"


def missed(runs: Mapping[str, Run]) -> list[str]:
    """The limits that are."""
    long = [f"{app} took {one.total:.0f} s, of {LONGEST:.0f}" for app, one in runs.items() if one.total > LONGEST]
    slow = [
        f"{app}: {one.sent / one.computed:.0f} requests for a second of CPU, of {RATE:.0f}"
        for app, one in runs.items()
        if one.sent < RATE * one.computed
    ]
    fastest = runs[FASTEST]
    if fastest.sent < RATE * fastest.trying:
        slow.append(f"{FASTEST}: {fastest.sent / fastest.trying:.0f} requests a second, of {RATE:.0f}")
    return [*long, *slow]


if __name__ == "__main__":
    main()
