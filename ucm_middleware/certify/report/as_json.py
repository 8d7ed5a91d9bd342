"""The report as one JSON document, for programs.

``version`` is 1; it changes when a field changes its meaning or goes, and not when one is added. The document has

- ``options``: ``app``, ``server``, ``seed``, ``seconds``, ``users``, ``public``, ``skipped``, ``replay`` (the command
  that takes the same steps again) and ``versions`` by name;
- ``plain``: the run of the application as it is, and ``with_ucm``: that in ``UserContextMiddleware``, or null;
- ``comparison``: of each finding of either run the ``fingerprint`` and the ``change``: "gone with ucm", "still there",
  "not tried with ucm" or "only with ucm"; null for one run alone;
- ``baseline``: fingerprints that are ``known``, ``new`` and ``new_with_ucm``, and entries ``not_seen`` with why;
- ``summary``: what the report says last.

A run has ``seconds``, ``notes``, ``requests``, ``messages``, ``late``, ``endless``, ``ends``, ``output`` (bytes),
``findings`` and ``coverage``. A finding has ``fingerprint``, ``place`` (``channel``, ``route``, ``detail``),
``sentence``, ``sightings``, ``first`` (``viewer``, ``owner``, ``number`` of the request), ``pairs`` (``viewer``,
``owner``, ``count``), ``reproduced``, ``attempts``, ``replay`` and ``steps``; a step its ``kind``, the fields of
``ucm_middleware.certify.steps``, and a ``text``. Coverage has ``routes``, ``drives``, ``channels`` and ``blind``; where
something was not tried, ``why_not`` says why. No canary, secret or credential is in it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Final

from ucm_middleware.certify.report.covering import Covering, Row
from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.reporting import Report, Run
from ucm_middleware.certify.report.words import verdict, verdict_with_ucm
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Restart, Say, SignIn, SignOut, Step, Together

VERSION: Final = 1

_KINDS: Final[Mapping[type[Step], str]] = {
    Ask: "ask",
    Together: "together",
    Connect: "connect",
    Say: "say",
    HangUp: "hang up",
    SignOut: "sign out",
    SignIn: "sign in",
    Restart: "restart",
}


def as_json(report: Report) -> str:
    """The document, with a line end."""
    return json.dumps(to_json(report), indent=2, ensure_ascii=False) + "\n"


def to_json(report: Report) -> dict[str, Any]:
    """The document as plain data."""
    facts, split = report.facts, report.split
    return {
        "version": VERSION,
        "options": {**_plain(facts), "versions": dict(facts.versions)},
        "plain": _run(report.plain, facts.replay),
        "with_ucm": None if report.with_ucm is None else _run(report.with_ucm, facts.replay),
        "comparison": None
        if report.with_ucm is None
        else [{"fingerprint": one.finding.fingerprint, "change": one.change} for one in report.compared],
        "baseline": {
            "known": [finding.fingerprint for finding in split.known],
            "new": [finding.fingerprint for finding in split.new],
            "new_with_ucm": [finding.fingerprint for finding in report.new_with_ucm],
            "not_seen": [
                {
                    "fingerprint": one.fingerprint,
                    "place": _plain(one.place),
                    "note": one.note,
                    "why_not": report.why_unseen(one),
                }
                for one in split.unseen
            ],
        },
        "summary": " ".join(filter(None, (verdict(report), verdict_with_ucm(report)))),
    }


def step_to_json(step: Step, text: str) -> dict[str, Any]:
    """A step as plain data."""
    return {"kind": _KINDS[type(step)], **_plain(step), "text": text}


def _run(run: Run, replay: str) -> dict[str, Any]:
    return {
        "seconds": round(run.seconds, 3),
        "notes": list(run.notes),
        **run.covering.counts,
        "findings": [_finding(finding, replay) for finding in run.findings],
        "coverage": _covering(run.covering),
    }


def _finding(finding: Reported, replay: str) -> dict[str, Any]:
    return {
        "fingerprint": finding.fingerprint,
        "place": _plain(finding.place),
        "sentence": finding.sentence,
        "sightings": finding.sightings,
        "first": {"viewer": finding.viewer, "owner": finding.owner, "number": finding.number},
        "pairs": [_plain(pair) for pair in finding.pairs],
        "reproduced": finding.reproduced,
        "attempts": finding.attempts,
        "replay": replay,
        "steps": [step_to_json(step, text) for step, text in zip(finding.steps, finding.texts, strict=True)],
    }


def _covering(covering: Covering) -> dict[str, Any]:
    return {
        "routes": [
            {
                "route": route.key,
                "source": route.source,
                "tries": route.tries,
                "answers": dict(route.answers),
                "users": list(route.answered),
                "own": route.own,
                "covered": route.is_covered,
                "why_not": None if route.is_covered else route.problem,
            }
            for route in covering.routes
        ],
        "drives": [{**_row(drive), "steps": drive.count} for drive in covering.drives],
        "channels": [_row(channel) for channel in covering.channels],
        "blind": [route.key for route in covering.blind],
    }


def _row(row: Row) -> dict[str, Any]:
    return {"name": row.name, "tried": row.why_not is None, "why_not": row.why_not}


def _plain(value: object) -> dict[str, Any]:
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return asdict(value)
