"""The whole of what is reported, ready to be written in any form: all texts in it may be shown as they are."""

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ucm_middleware.certify.material import generator
from ucm_middleware.certify.report.baseline import Baseline, Known, Split
from ucm_middleware.certify.report.covering import Covering, covering
from ucm_middleware.certify.report.findings import Reported, reported
from ucm_middleware.certify.report.saying import Saying

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Result
    from ucm_middleware.testing.server import ServerKind

Change = Literal["gone with ucm", "still there", "not tried with ucm", "only with ucm"]
"""What the package changes about a finding. One on a route where it answers nobody else was not tried, which says
nothing; and what is gone was not seen, which is no proof.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the application: as it is, or in ``UserContextMiddleware``. ``seconds`` is how long it was tried."""

    with_ucm: bool
    findings: tuple[Reported, ...]
    covering: Covering
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """A finding, and what the package changes about it."""

    finding: Reported
    change: Change


@dataclass(frozen=True, slots=True)
class Facts:
    """What was run, and with what. ``replay`` is the command that takes the same steps again."""

    app: str
    server: str
    seed: int
    seconds: float
    users: tuple[str, ...]
    public: tuple[str, ...]
    skipped: tuple[str, ...]
    versions: Mapping[str, str]
    replay: str


@dataclass(frozen=True, slots=True)
class Report:
    """What is reported. ``split`` is of the application as it is; ``new_with_ucm`` is new, and seen with it alone."""

    facts: Facts
    plain: Run
    with_ucm: Run | None
    compared: tuple[Compared, ...]
    baseline: Baseline
    split: Split
    new_with_ucm: tuple[Reported, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """One, or both."""
        return (self.plain,) if self.with_ucm is None else (self.plain, self.with_ucm)

    @property
    def has_new(self) -> bool:
        """Whether anything was found that is not known."""
        return bool(self.split.new or self.new_with_ucm)

    def is_known(self, finding: Reported) -> bool:
        """Whether the baseline has it."""
        return any(one.fingerprint == finding.fingerprint for one in self.baseline.known)

    def why_unseen(self, known: Known) -> str:
        """What can be said of a known finding that was not seen: never that it is mended."""
        route = next((route for route in self.plain.covering.routes if route.key == known.place.route), None)
        if route is None:
            return "not seen this time: there is no such route now"
        return "not seen this time" if route.is_tried else f"not seen this time: {route.problem}"


def make_report(
    result: "Result",
    with_ucm: "Result | None" = None,
    *,
    command: tuple[str, ...],
    baseline: Baseline | None = None,
) -> Report:
    """Of a run, and of the same with the package where that was asked for.

    ``command`` is the command line that runs it again, with the seed, as words. It must have no secret in it.
    """
    options = result.options
    saying = Saying(options.cast, {*result.given, *(() if with_ucm is None else with_ucm.given)})
    plain, other = _run(result, saying), None if with_ucm is None else _run(with_ucm, saying)
    known = baseline or Baseline()
    compared = () if other is None else _compared(plain, other)
    only = tuple(one.finding for one in compared if one.change == "only with ucm")
    facts = Facts(
        app=saying.text(options.app),
        server=options.kind,
        seed=options.seed,
        seconds=options.seconds,
        users=options.cast.names,
        public=tuple(map(saying.text, options.cast.public)),
        skipped=tuple(map(saying.text, options.skip)),
        versions=versions(options.kind),
        replay=saying.text(shlex.join(command)),
    )
    return Report(facts, plain, other, compared, known, known.split(plain.findings), known.split(only).new)


def versions(kind: "ServerKind") -> Mapping[str, str]:
    """Of Python, the server, this package and the generator of requests."""
    return {
        "python": platform.python_version(),
        kind: importlib.metadata.version(kind),
        "ucm-middleware": importlib.metadata.version("ucm-middleware"),
        "generator": generator(),
    }


def _run(result: "Result", saying: Saying) -> Run:
    return Run(
        with_ucm=result.with_ucm,
        findings=reported(result.shown, saying),
        covering=covering(result, saying),
        seconds=result.seconds,
        notes=tuple(map(saying.text, result.notes)),
    )


def _compared(plain: Run, with_ucm: Run) -> tuple[Compared, ...]:
    after = {finding.fingerprint for finding in with_ucm.findings}
    before = {finding.fingerprint for finding in plain.findings}
    tried = {route.key for route in with_ucm.covering.routes if route.is_tried}

    def change_of(finding: Reported) -> Change:
        if finding.fingerprint in after:
            return "still there"
        return "gone with ucm" if finding.place.route in tried else "not tried with ucm"

    return (
        *(Compared(finding, change_of(finding)) for finding in plain.findings),
        *(Compared(finding, "only with ucm") for finding in with_ucm.findings if finding.fingerprint not in before),
    )
