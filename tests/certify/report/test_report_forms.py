"""The report as JSON, as JUnit XML and on the terminal."""

import io
import json
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from support.reports import DASHBOARD, canary, crowd, dashboard, report, secret_of, shown
from ucm_middleware.certify.coverage import RouteCoverage
from ucm_middleware.certify.report.as_json import as_json
from ucm_middleware.certify.report.as_junit import as_junit
from ucm_middleware.certify.report.baseline import Baseline, Known
from ucm_middleware.certify.report.html import as_html
from ucm_middleware.certify.report.reporting import Report
from ucm_middleware.certify.sightings import Place
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Restart, Say, SignIn, SignOut, Step, Together
from ucm_middleware.cli.certify.text import show

PAIRS = {("bob", "alice"): 2}


def as_text(made: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(made, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


FORMS: list[Callable[[Report], str]] = [as_text, as_json, as_junit, as_html]


# For programs.


def test_json_has_findings_with_steps_as_data_and_as_text() -> None:
    ask = Ask(1, "alice", DASHBOARD, 0, "alice.0")
    steps: tuple[Step, ...] = (
        ask,
        Together((ask,), http2=True),
        Connect(2, "bob", "WS /live", 0, "b"),
        Say(3, "bob", "WS /live", "b", 1),
    )
    steps = (*steps, HangUp("bob", "b", abruptly=True), SignOut(4, "bob", "POST /out", "c"))
    steps = (*steps, SignIn(5, "alice", "POST /in", "c"), Restart())

    document = json.loads(as_json(report([shown(Place("body", DASHBOARD, "$.a"), PAIRS, steps)])))

    (found,) = document["plain"]["findings"]
    assert document["version"] == 1
    assert found["place"] == {"channel": "body", "route": DASHBOARD, "detail": "$.a"}
    assert found["pairs"] == [{"viewer": "bob", "owner": "alice", "count": 2}]
    assert found["replay"] == "ucm certify shop:app --seed 7"
    assert [step["kind"] for step in found["steps"]] == [
        *("ask", "together", "connect", "say", "hang up", "sign out", "sign in", "restart"),
    ]
    assert found["steps"][1]["asks"][0]["line"] == "alice.0"
    assert found["steps"][0]["text"] == f"alice: {DASHBOARD} (on the connection 'alice.0')"


def test_json_has_what_was_not_tried_with_the_reason() -> None:
    document = json.loads(as_json(report(notes=("no schema",))))

    coverage = document["plain"]["coverage"]
    routes = {route["route"]: route for route in coverage["routes"]}
    assert routes[DASHBOARD]["covered"]
    assert routes[DASHBOARD]["users"] == ["alice", "bob"]
    assert "nobody got an answer" in routes["POST /orders"]["why_not"]
    assert coverage["blind"] == ["GET /health"]
    drives = {drive["name"]: drive for drive in coverage["drives"]}
    assert drives["burst"] == {"name": "burst", "tried": True, "why_not": None, "steps": 144}
    assert "hypercorn" in drives["HTTP/2"]["why_not"]
    assert drives["restart"]["why_not"] == "the time was over before it was tried"
    channels = {channel["name"]: channel["tried"] for channel in coverage["channels"]}
    assert channels == {"body": True, "header": True, "event": True, "log": True, "span": False, "setting": False}
    assert document["plain"]["notes"] == ["no schema"]
    assert document["with_ucm"] is None
    assert set(document["options"]["versions"]) == {"python", "uvicorn", "ucm-middleware", "generator"}


def test_json_compares_finding_by_finding() -> None:
    document = json.loads(as_json(report([dashboard()], after=[])))

    assert [one["change"] for one in document["comparison"]] == ["gone with ucm"]
    assert document["with_ucm"]["findings"] == []


def cases(made: Report) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(as_junit(made))
    assert root.tag == "testsuites"
    for suite in root:
        found = suite.findall("testcase")
        assert int(suite.get("tests", "")) == len(found)
        assert int(suite.get("failures", "")) == sum(case.find("failure") is not None for case in found)
        assert int(suite.get("skipped", "")) == sum(case.find("skipped") is not None for case in found)
    assert int(root.get("tests", "")) == len(root.findall("testsuite/testcase"))
    return {f"{case.get('classname')} {case.get('name')}": case for case in root.iter("testcase")}


def test_junit_has_a_case_for_each_route_drive_and_channel() -> None:
    found = cases(report([dashboard(), dashboard(channel="header")]))

    failure = found[f"ucm certify: routes {DASHBOARD}"].find("failure")
    assert failure is not None
    assert "and 1 more finding" in failure.get("message", "")
    assert "1. alice: GET" in (failure.text or "")
    skipped = found["ucm certify: routes POST /orders"].find("skipped")
    assert skipped is not None
    assert "nobody got an answer" in skipped.get("message", "")
    assert found["ucm certify: routes GET /health"].find("skipped") is not None
    assert found["ucm certify: drives HTTP/2"].find("skipped") is not None
    assert not list(found["ucm certify: drives burst"])
    assert not list(found["ucm certify: channels body"])


def test_junit_does_not_fail_for_what_is_known() -> None:
    known = Known(Place("body", DASHBOARD, "$.account.api_key"), "ticket 12")

    case = cases(report([dashboard()], baseline=Baseline((known,))))[f"ucm certify: routes {DASHBOARD}"]

    assert case.find("failure") is None
    assert "ticket 12" in case.findtext("system-out", "")


def test_junit_fails_for_a_route_that_is_not_covered() -> None:
    case = cases(report([shown(Place("body", "POST /orders"), PAIRS)]))["ucm certify: routes POST /orders"]

    assert case.find("failure") is not None
    assert case.find("skipped") is None


def test_junit_has_the_run_with_the_package_too() -> None:
    found = cases(report([dashboard()], after=[dashboard()]))

    assert found[f"ucm certify --with-ucm: routes {DASHBOARD}"].find("failure") is not None


# For people.


def test_the_terminal_shows_steps_then_coverage_then_the_verdict() -> None:
    said = as_text(report([dashboard()]))

    places = [
        said.index(text) for text in ("1. bob was sent", "  2. bob: GET", "2 of 4 routes", "Blind:", "again: ucm")
    ]
    assert places == sorted(places)
    assert said.rstrip().splitlines()[-1].startswith("What is one user's reached another in 1 place")


@pytest.mark.parametrize("form", FORMS)
def test_coverage_and_reasons_are_always_there(form: Callable[[Report], str]) -> None:
    said = form(report(notes=("the application has no schema",)))

    for text in ("POST /orders", "no request can be made by its schema", "try --server hypercorn", "is not installed"):
        assert text in said


@pytest.mark.parametrize("form", FORMS)
def test_no_finding_is_never_called_a_proof(form: Callable[[Report], str]) -> None:
    assert "No canary reached anybody else in 5,907 requests. That is no proof: 2 of 4 routes" in form(report())


def test_where_nothing_was_covered_nothing_is_said() -> None:
    made = report()
    for route in (plain := made.plain.covering).routes:
        object.__setattr__(route, "is_covered", False)
    assert not plain.covered

    assert as_text(made).rstrip().splitlines()[-1].startswith("Nothing can be said: in 5,907 requests no route")


def test_the_terminal_says_what_the_package_changes() -> None:
    said = as_text(report([dashboard()], after=[]))

    assert f"gone with ucm: body of {DASHBOARD}" in said
    assert "In UserContextMiddleware: 1 gone with ucm, in 5,907 requests. What is gone was not seen" in said
    assert "What is gone" not in as_text(report([dashboard()], after=[dashboard()]))


def test_the_terminal_says_what_is_known_and_what_was_not_seen() -> None:
    known = Known(Place("body", DASHBOARD, "$.account.api_key"), "ticket 12")
    gone = Known(Place("header", DASHBOARD, "x-user"))

    said = as_text(report([dashboard()], baseline=Baseline((known, gone))))

    assert "known: ticket 12" in said
    assert f"header of {DASHBOARD} at x-user [{gone.fingerprint}]: not seen this time" in said
    assert "fixed" not in said


@pytest.mark.parametrize("form", FORMS)
def test_no_secret_is_in_any_form(form: Callable[[Report], str]) -> None:
    texts = [secret_of("alice"), canary("bob"), "token-of-alice"]
    places = [Place("span", f"GET /{text}", f"name {text}") for text in texts]
    steps = [(Ask(1, "alice", place.route, 0, "x"), Ask(2, "bob", place.route, 0, "x")) for place in places]
    routes = [RouteCoverage(place.route, "schema", f"why {place.detail}") for place in places]

    said = form(
        report(
            [shown(place, PAIRS, taken) for place, taken in zip(places, steps, strict=True)],
            routes=routes,
            notes=tuple(texts),
        )
    )

    assert not [text for text in texts if text in said]


HOSTILE = st.text(min_size=1, max_size=12) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "]]>",
        "[red]x[/]",
        "\x1b[2J",
        "\x00",
        "\u202e",
        "\ud800",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=HOSTILE.filter(str.isprintable), route=HOSTILE, detail=HOSTILE, reason=HOSTILE)
def test_hostile_names_harm_no_form(name: str, route: str, detail: str, reason: str) -> None:
    names = (name, f"{name} too")
    place = Place("header", f"GET /{route}", detail)
    made = report(
        [shown(place, {(names[0], names[1]): 1})],
        names,
        after=[],
        routes=[RouteCoverage(f"PUT /{route}", "schema", reason)],
        notes=(reason,),
    )

    json.loads(as_json(made))
    ElementTree.fromstring(as_junit(made))
    assert as_text(made).replace("\n", "").isprintable()
    page = as_html(made)
    page.encode()
    assert "<script" not in page
    assert "<img" not in page
    ElementTree.fromstring(_as_xml(page))


def _as_xml(page: str) -> str:
    """A page of this package's is XML but for its void elements: if a name broke out of its place, it is none."""
    lines = page.removeprefix("<!doctype html>\n")
    for void in ("meta", "link"):
        head, *parts = lines.split(f"<{void} ")
        lines = head + "".join(f"<{void} {part.replace('>', '/>', 1)}" for part in parts)
    return lines


def test_many_users_are_shown_in_every_form() -> None:
    names, found = crowd(60)
    made = report(found, names)

    assert "10 users to whom less happened are left out" in as_html(made)
    assert len(json.loads(as_json(made))["plain"]["findings"][0]["pairs"]) == 60
    assert "all 60" in as_text(made)
