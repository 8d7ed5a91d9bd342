"""The page, put together. It has no script, and its policy forbids any: what is in it came from a stranger."""

import base64
import hashlib
from importlib.resources import files
from typing import Final

from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.html.markup import Html, joined, tag
from ucm_middleware.certify.report.html.picture import picture
from ucm_middleware.certify.report.html.sequence import sequence
from ucm_middleware.certify.report.html.tables import coverage, table
from ucm_middleware.certify.report.reporting import Report, Run
from ucm_middleware.certify.report.words import counted, remarks, reproduced, verdict, verdict_with_ucm

_PLAIN: Final = "The application as it is"
_WITH_UCM: Final = "In UserContextMiddleware"
_MOST_PAIRS: Final = 8


def as_html(report: Report) -> str:
    """The whole page."""
    style = files("ucm_middleware.certify.report.html").joinpath("page.css").read_text(encoding="utf-8")
    page = tag("html", _head(report, style), tag("body", tag("main", *_sections(report))), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(report: Report, style: str) -> Html:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"ucm certify: {report.facts.app}"),
        tag("style", Html(style)),
    )


def _sections(report: Report) -> tuple[Html, ...]:
    return (
        _header(report),
        _pictures(report),
        *(_findings(run, report) for run in report.runs),
        _comparison(report),
        _unseen(report),
        *(_coverage(run, report) for run in report.runs),
        _footer(report),
    )


def _header(report: Report) -> Html:
    facts = report.facts
    state = "bad" if report.has_new else "known" if report.plain.findings else "none"
    changed = verdict_with_ucm(report)
    return tag(
        "header",
        tag("h1", "ucm certify ", tag("code", facts.app)),
        tag("p", f"{counted(len(facts.users), 'user')} on {facts.server}, seed {facts.seed}", class_="dim"),
        tag("p", verdict(report), class_=f"verdict {state}"),
        *([] if changed is None else [tag("p", changed, class_="verdict none")]),
    )


def _pictures(report: Report) -> Html:
    captions = (_PLAIN, _WITH_UCM)
    pictures = (picture(run, report.facts.users, captions[run.with_ucm]) for run in report.runs)
    sides = "pictures two" if report.with_ucm is not None else "pictures"
    return tag("section", tag("h2", "Who reached whose data"), tag("div", *pictures, class_=sides))


def _findings(run: Run, report: Report) -> Html:
    if not run.findings:
        return joined()
    name = "Findings" if report.with_ucm is None else f"Findings: {_WITH_UCM if run.with_ucm else _PLAIN}"
    found = (_finding(at, finding, report) for at, finding in enumerate(run.findings, 1))
    return tag("section", tag("h2", name), *found)


def _finding(number: int, finding: Reported, report: Report) -> Html:
    is_known = report.is_known(finding)
    note = report.baseline.note_of(finding) if is_known else ""
    drawn = sequence(finding)
    pairs = ", ".join(f"{pair.viewer} saw {pair.owner}'s ({pair.count:,})" for pair in finding.pairs[:_MOST_PAIRS])
    rest = len(finding.pairs) - _MOST_PAIRS
    more = f", and {counted(rest, 'more pair')}" if rest > 0 else ""
    return tag(
        "article",
        tag("h3", f"{number}. {finding.sentence}"),
        tag("p", f"Seen {counted(finding.sightings, 'time')}: {pairs}{more}. ", tag("code", finding.fingerprint)),
        *([tag("p", f"Known: {note}" if note else "Known.", class_="known")] if is_known else []),
        tag("p", reproduced(finding)),
        tag("ol", *(tag("li", text) for text in finding.texts), class_="steps"),
        tag("div", drawn, class_="scroll", tabindex=0, role="region", aria_label="The steps as a diagram")
        if drawn is not None
        else tag("p", "There are too many steps or users for a diagram.", class_="dim"),
        class_="known" if is_known else None,
    )


def _comparison(report: Report) -> Html:
    if not report.compared:
        return joined()
    rows = [(str(one.finding.place), one.change, one.finding.fingerprint) for one in report.compared]
    states = [one.change.replace(" ", "-") for one in report.compared]
    name = "What UserContextMiddleware changes"
    heads = ("finding", "change", "fingerprint")
    return tag("section", tag("h2", name), table(name, heads, rows, states=states))


def _unseen(report: Report) -> Html:
    if not report.split.unseen:
        return joined()
    rows = [(str(one.place), report.why_unseen(one), one.note) for one in report.split.unseen]
    name = "In the baseline, and not seen"
    return tag("section", tag("h2", name), table(name, ("finding", "this time", "note"), rows))


def _coverage(run: Run, report: Report) -> Html:
    covering = run.covering
    name = "Coverage" if report.with_ucm is None else f"Coverage: {_WITH_UCM if run.with_ucm else _PLAIN}"
    counts = (
        f"{covering.covered} of {counted(len(covering.routes), 'route')} covered, {covering.tried} of "
        f"{counted(len(covering.drives), 'drive')} tried."
    )
    asked = (
        f"{what}: {', '.join(keys)}"
        for what, keys in (
            ("Not tried, as asked", report.facts.skipped),
            ("Not looked at, public", report.facts.public),
        )
        if keys and not run.with_ucm
    )
    said = (tag("li", text) for text in (*remarks(run), *asked))
    return tag("section", tag("h2", name), tag("p", counts), tag("ul", *said), coverage(covering, report.facts.users))


def _footer(report: Report) -> Html:
    facts = report.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return tag(
        "footer",
        tag("p", "The same steps again: ", tag("code", facts.replay)),
        tag("p", versions, class_="dim"),
        tag("p", verdict(report)),
    )
