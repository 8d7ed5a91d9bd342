"""The file of findings that are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.reports import DASHBOARD, dashboard, report, shown
from ucm_middleware.certify.report.baseline import Baseline, Known, read_baseline, write_baseline
from ucm_middleware.certify.sightings import Place
from ucm_middleware.errors import ConfigurationError

PAIRS = {("bob", "alice"): 1}
KNOWN = Known(Place("body", DASHBOARD, "$.account.api_key"), "ticket 12")
GONE = Known(Place("header", "POST /orders", "x-user"))
UNHEARD_OF = Known(Place("header", "GET /away", "x-user"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"

    write_baseline(path, Baseline((GONE, KNOWN, Known(Place("log", "GET /ü", "shop")))))

    assert [one.place.route for one in read_baseline(path).known] == [DASHBOARD, "GET /ü", "POST /orders"]
    assert read_baseline(path).known[0] == KNOWN
    assert "GET /ü" in path.read_text(encoding="utf-8")


def test_a_run_is_split_by_it() -> None:
    new = shown(Place("body", "GET /health"), PAIRS)

    made = report([dashboard(), new], baseline=Baseline((KNOWN, GONE, UNHEARD_OF)))

    assert [found.place.route for found in made.split.known] == [DASHBOARD]
    assert [found.place.route for found in made.split.new] == ["GET /health"]
    assert made.split.unseen == (GONE, UNHEARD_OF)
    assert made.has_new
    assert "not seen this time: nobody got an answer of 2xx" in made.why_unseen(GONE)
    assert made.why_unseen(UNHEARD_OF) == "not seen this time: there is no such route now"
    assert not report([dashboard()], baseline=Baseline((KNOWN,))).has_new


def test_what_is_seen_with_the_package_alone_is_new() -> None:
    made = report([], after=[dashboard()])

    assert made.has_new
    assert not made.split.new


def test_one_that_is_written_again_keeps_notes_and_what_was_not_seen() -> None:
    new = shown(Place("body", "GET /health"), PAIRS)

    again = Baseline((KNOWN, GONE)).with_all(report([dashboard(), new]).plain.findings)

    assert again == Baseline((KNOWN, GONE, Known(Place("body", "GET /health"))))


def entry(**changes: Any) -> dict[str, Any]:
    fields = {"fingerprint": KNOWN.fingerprint, "channel": "body", "route": DASHBOARD, "detail": "$.account.api_key"}
    return {**fields, "note": "", **changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "must have a JSON object in it, not a list"),
        ('{"findings": []}', "version must be 1, not None"),
        ('{"version": 1, "findings": {}}', "findings must be a list, not a dict"),
        ([1], r"findings\[0\] must be an object, not a int"),
        ([entry(), entry(severity="low")], r"findings\[1\] has 'severity', and there are fingerprint"),
        ([{"fingerprint": "1"}], r"findings\[0\] lacks 'channel'"),
        ([entry(note=None)], r"findings\[0\].note must be a text, not a NoneType"),
        ([entry(note="\x1b[2J")], r"findings\[0\].note has characters in it that cannot be printed"),
        ([entry(channel="smell")], r"findings\[0\].channel must be one of body, .*, not 'smell'"),
        ([entry(route="GET /other")], r"findings\[0\].fingerprint is not that of its channel, route and detail"),
        ([entry(), entry()], r"findings\[1\] is the same as findings\[0\]"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "baseline.json"
    text = content if isinstance(content, str) else json.dumps({"version": 1, "findings": content})
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError, match=rf"baseline: .*baseline\.json.*{said}"):
        read_baseline(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.json cannot be read \(No such file"):
        read_baseline(tmp_path / "missing.json")
    with pytest.raises(ConfigurationError, match=r"cannot be written: Is a directory"):
        write_baseline(tmp_path, Baseline())
