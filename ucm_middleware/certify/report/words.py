"""Sentences that every form of the report has in common."""

from typing import Final

from ucm_middleware.certify.report.covering import RouteRow
from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.reporting import Report, Run

_FEW: Final = 4
"""Users that are named one by one."""


def counted(number: int, what: str, plural: str | None = None) -> str:
    """A number with its noun."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def verdict(report: Report) -> str:
    """The last line. What was not found is never called a proof."""
    run = report.plain
    sent = _sent(run)
    if not run.findings:
        if not run.covering.covered:
            return f"Nothing can be said: in {sent} no route was covered, so no canary could have reached anybody else."
        return f"No canary reached anybody else in {sent}. That is no proof: {_limits(run)}."
    new = len(report.split.new)
    known = f", {new:,} of them new" if report.split.known else ""
    return (
        f"What is one user's reached another in {counted(len(run.findings), 'place')}{known}, in {sent}. There may "
        f"be more: {_limits(run)}."
    )


def verdict_with_ucm(report: Report) -> str | None:
    """What the package changed, where it was asked for."""
    if report.with_ucm is None:
        return None
    counts = dict.fromkeys(("gone with ucm", "still there", "not tried with ucm", "only with ucm"), 0)
    for one in report.compared:
        counts[one.change] += 1
    changes = ", ".join(f"{count} {change}" for change, count in counts.items() if count)
    said = changes or "nothing was found without it, nor with it"
    no_proof = " What is gone was not seen, which is no proof." if counts["gone with ucm"] else ""
    return f"In UserContextMiddleware: {said}, in {_sent(report.with_ucm)}.{no_proof}"


def reproduced(finding: Reported) -> str:
    """What the steps are worth."""
    if finding.reproduced:
        return "These steps show it on a server of its own:"
    attempts = counted(finding.attempts, "attempt")
    return f"It was not shown again in {attempts}; these are the last steps before it was seen:"


def who(route: RouteRow, users: tuple[str, ...]) -> str:
    """Who got an answer of 2xx, or a message."""
    if len(route.answered) == len(users):
        return f"all {len(users)}"
    if len(route.answered) <= _FEW:
        return ", ".join(route.answered) or "nobody"
    return f"{len(route.answered)} of {len(users)}"


def answers(route: RouteRow) -> str:
    """How it was answered, most often first."""
    return ", ".join(f"{kind} ({count:,})" for kind, count in route.answers)


def remarks(run: Run) -> tuple[str, ...]:
    """What else there is to say of a run."""
    counts = run.covering.counts
    endless = counts["endless"]
    said = [
        (counts["late"], f"{counted(counts['late'], 'answer')} did not come in time"),
        (endless, f"{counted(endless, 'answer')} had no end, and {'was' if endless == 1 else 'were'} cut off"),
        (counts["ends"], f"the server ended by itself {counted(counts['ends'], 'time')}, and was started again"),
    ]
    return (*run.notes, *(text for count, text in said if count))


def _sent(run: Run) -> str:
    counts = run.covering.counts
    requests = counted(counts["requests"], "request")
    return f"{requests} and {counted(counts['messages'], 'message')}" if counts["messages"] else requests


def _limits(run: Run) -> str:
    covering = run.covering
    blind = f" ({len(covering.blind)} of them blind)" if covering.blind else ""
    return (
        f"{covering.covered} of {counted(len(covering.routes), 'route')} were covered{blind}, "
        f"{covering.tried} of {counted(len(covering.drives), 'drive')} tried, in {run.seconds:.0f} seconds; other "
        "users, values and timing may show more"
    )
