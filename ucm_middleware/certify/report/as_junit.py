"""The report as JUnit XML, for what shows tests: a test case for each route, drive and channel.

A route fails where there is a finding that is not known. What was not tried is skipped, with the reason. No character
need be escaped but for XML's own: a report has printable ones alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from ucm_middleware.certify.report.covering import Row
from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.reporting import Report, Run
from ucm_middleware.certify.report.words import counted, reproduced, verdict, verdict_with_ucm

_NAME: Final = "ucm certify"


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    failing: tuple[Reported, ...] = ()
    known: tuple[Reported, ...] = ()
    skipped: str | None = None


def as_junit(report: Report) -> str:
    """The document."""
    root = ElementTree.Element("testsuites", name=_NAME)
    for run in report.runs:
        prefix = f"{_NAME} --with-ucm" if run.with_ucm else _NAME
        suites = {
            "routes": list(_routes(report, run)),
            "drives": list(map(_row, run.covering.drives)),
            "channels": list(map(_row, run.covering.channels)),
        }
        for name, cases in suites.items():
            seconds = run.seconds if name == "routes" else 0
            _suite(root, f"{prefix}: {name}", cases, seconds, report)
    for total in ("tests", "failures", "errors", "skipped"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _routes(report: Report, run: Run) -> Iterable[_Case]:
    keys = {route.key: route for route in run.covering.routes}
    for key in dict.fromkeys((*keys, *(finding.place.route for finding in run.findings))):
        found = [finding for finding in run.findings if finding.place.route == key]
        problem = keys[key].problem if key in keys else None
        yield _Case(
            key,
            failing=tuple(finding for finding in found if not report.is_known(finding)),
            known=tuple(finding for finding in found if report.is_known(finding)),
            skipped=None if found else problem,
        )


def _row(row: Row) -> _Case:
    return _Case(row.name, skipped=row.why_not)


def _suite(root: ElementTree.Element, name: str, cases: list[_Case], seconds: float, report: Report) -> None:
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(len(cases)),
        failures=str(sum(bool(case.failing) for case in cases)),
        errors="0",
        skipped=str(sum(case.skipped is not None for case in cases)),
        time=f"{seconds:.3f}",
    )
    for case in cases:
        element = ElementTree.SubElement(suite, "testcase", classname=name, name=case.name, time="0")
        if case.failing:
            first = case.failing[0].sentence
            more = f", and {counted(len(case.failing) - 1, 'more finding')}" if len(case.failing) > 1 else ""
            failure = ElementTree.SubElement(element, "failure", type="finding", message=f"{first}{more}")
            failure.text = "\n\n".join(_text(finding, report) for finding in case.failing)
        if case.skipped is not None:
            ElementTree.SubElement(element, "skipped", message=case.skipped)
        if case.known:
            known = (f"known: {finding.sentence} ({report.baseline.note_of(finding)})" for finding in case.known)
            ElementTree.SubElement(element, "system-out").text = "\n".join(known)
    said = " ".join(filter(None, (verdict(report), verdict_with_ucm(report))))
    ElementTree.SubElement(suite, "system-out").text = f"{said}\n{report.facts.replay}"


def _text(finding: Reported, report: Report) -> str:
    steps = (f"{at}. {text}" for at, text in enumerate(finding.texts, 1))
    seen = counted(finding.sightings, "time")
    return "\n".join(
        [f"{finding.sentence} (seen {seen})", finding.fingerprint, reproduced(finding), *steps, report.facts.replay]
    )
