"""What the terminal shows of a run: findings, then always what was tried and what was not, then one line."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ucm_middleware.certify.report.words import answers, counted, remarks, reproduced, verdict, verdict_with_ucm, who

if TYPE_CHECKING:
    from ucm_middleware.certify.report.covering import Covering, RouteRow, Row
    from ucm_middleware.certify.report.findings import Reported
    from ucm_middleware.certify.report.reporting import Report, Run

_MOST_PAIRS: Final = 6
_STATE: Final = {"covered": "green", "blind": "yellow", "not covered": "red"}


def show(report: "Report", console: Console | None = None) -> None:
    """Print it, to stdout. Nothing in it is markup."""
    where = console or Console(highlight=False, emoji=False, markup=False)
    for part in as_text(report):
        where.print(part, soft_wrap=isinstance(part, Text))  # no command or sentence is cut in two for a narrow log


def as_text(report: "Report") -> list[RenderableType]:
    """The whole of it."""
    parts: list[RenderableType] = []
    for run in report.runs:
        if report.with_ucm is not None:
            parts.append(_heading("With UserContextMiddleware" if run.with_ucm else "The application as it is"))
        parts.extend(_finding(at, finding, report) for at, finding in enumerate(run.findings, 1))
        parts.extend(_coverage(run, report))
    parts.extend(_comparison(report))
    parts.extend(_unseen(report))
    facts = report.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    parts.append(Text(f"\nseed {facts.seed}; {versions}\nagain: {facts.replay}\n", style="dim"))
    if (changed := verdict_with_ucm(report)) is not None:
        parts.append(Text(changed))
    parts.append(Text(verdict(report), style="bold red" if report.has_new else "bold"))
    return parts


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold underline")


def _finding(number: int, finding: "Reported", report: "Report") -> RenderableType:
    is_known = report.is_known(finding)
    title = Text(f"\n{number}. {finding.sentence}", style="bold" if is_known else "bold red")
    seen = f"seen {counted(finding.sightings, 'time')}: {_pairs(finding)}"
    lines = [Text(f"{seen} [{finding.fingerprint}]", style="dim")]
    if is_known:
        note = report.baseline.note_of(finding)
        lines.append(Text(f"known: {note}" if note else "known", style="yellow"))
    lines.append(Text(reproduced(finding)))
    lines.extend(Text(f"  {at}. {text}") for at, text in enumerate(finding.texts, 1))
    return Group(title, Padding(Group(*lines), (0, 0, 0, 3)))


def _pairs(finding: "Reported") -> str:
    said = [f"{pair.viewer} saw {pair.owner}'s ({pair.count:,})" for pair in finding.pairs[:_MOST_PAIRS]]
    rest = len(finding.pairs) - len(said)
    return ", ".join([*said, f"and {counted(rest, 'more pair')}"] if rest else said)


def _coverage(run: "Run", report: "Report") -> Iterable[RenderableType]:
    covering = run.covering
    title = f"{covering.covered} of {counted(len(covering.routes), 'route')} covered"
    yield _heading(f"{title}, {covering.tried} of {counted(len(covering.drives), 'drive')} tried")
    yield _routes(covering, report.facts.users)
    yield from _gaps("Not covered", (route for route in covering.routes if not route.is_covered))
    yield from _gaps("Blind", covering.blind)
    tried = ", ".join(f"{drive.name} ({drive.count:,})" for drive in covering.drives if drive.why_not is None)
    yield Text(f"Drives tried, with their steps: {tried or 'none'}")
    yield from _not_tried("Drives not tried", covering.drives)
    looked = ", ".join(channel.name for channel in covering.channels if channel.why_not is None)
    yield Text(f"Looked for canaries in: {looked or 'nothing'}")
    yield from _not_tried("Not looked for in", covering.channels)
    for what, keys in (("Not tried, as asked", report.facts.skipped), ("Not looked at, public", report.facts.public)):
        if keys:
            yield Text(f"{what}: {', '.join(keys)}")
    for remark in remarks(run):
        yield Text(f"Note: {remark}", style="yellow")


def _routes(covering: "Covering", users: tuple[str, ...]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", collapse_padding=True)
    table.add_column("route", overflow="fold", ratio=None)
    for name in ("tried", "answered"):
        table.add_column(name, justify="right" if name == "tried" else "left")
    table.add_column("got a 2xx")
    table.add_column("own came back", justify="right")
    table.add_column("")
    for route in covering.routes:
        cells = (route.key, f"{route.tries:,}", answers(route), who(route, users), f"{route.own:,}")
        table.add_row(*map(Text, cells), Text(route.state, style=_STATE[route.state]))
    return table


def _gaps(what: str, routes: "Iterable[RouteRow]") -> Iterable[RenderableType]:
    lines = [Text(f"  {route.key}: {route.problem}") for route in routes]
    if lines:
        yield Text(f"{what}:", style="yellow")
        yield from lines


def _not_tried(what: str, rows: "Iterable[Row]") -> Iterable[RenderableType]:
    lines = [Text(f"  {row.name}: {row.why_not}") for row in rows if row.why_not is not None]
    if lines:
        yield Text(f"{what}:", style="yellow")
        yield from lines


def _comparison(report: "Report") -> Iterable[RenderableType]:
    if report.compared:
        yield _heading("What UserContextMiddleware changes")
        for one in report.compared:
            yield Text(f"  {one.change}: {one.finding.place} [{one.finding.fingerprint}]")


def _unseen(report: "Report") -> Iterable[RenderableType]:
    if report.split.unseen:
        yield _heading("In the baseline")
        for known in report.split.unseen:
            yield Text(f"  {known.place} [{known.fingerprint}]: {report.why_unseen(known)}")
