"""What findings are called, how they are explained, and what may not be said."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.reports import DASHBOARD, canary, cast_of, dashboard, report, secret_of, shown
from ucm_middleware.certify.cast import Call, Cast, User
from ucm_middleware.certify.coverage import RouteCoverage
from ucm_middleware.certify.report.findings import reported
from ucm_middleware.certify.report.saying import Saying, visible
from ucm_middleware.certify.sightings import Channel, Place
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Restart, SignIn, SignOut, Step, Together

BOBS = f"bob's {DASHBOARD} was answered"


def saying(*names: str) -> Saying:
    return Saying(cast_of(names), ())


@pytest.mark.parametrize(
    ("channel", "source", "expected"),
    [
        ("body", None, f"bob was sent a secret of alice's in the body of {DASHBOARD}, at x"),
        ("header", 3, f"bob was sent something that alice had sent in a header of the answer to {DASHBOARD}, at x"),
        ("event", 3, f"bob was sent something that alice had sent in a message of {DASHBOARD}, at x"),
        ("log", None, f"a log record of x has a secret of alice's in it, made while {BOBS}"),
        ("span", None, f"the span x has a secret of alice's in it, made while {BOBS}"),
        (
            "setting",
            3,
            f"the setting x of its database connection has something that alice had sent in it, made while {BOBS}",
        ),
    ],
)
def test_a_sentence_says_who_saw_whose_where(channel: str, source: int | None, expected: str) -> None:
    place = Place(channel, DASHBOARD, "x")  # type: ignore[arg-type]

    (found,) = report([shown(place, {("bob", "alice"): 1}, source=source)]).plain.findings

    assert found.sentence == expected


def test_a_fingerprint_does_not_depend_on_who_takes_part() -> None:
    one = reported(
        [shown(Place("body", "GET /m", "$.members.alice.key"), {("bob", "alice"): 1})], saying("alice", "bob")
    )
    other = reported(
        [shown(Place("body", "GET /m", "$.members.dora.key"), {("emil", "dora"): 9})], saying("dora", "emil")
    )

    assert one[0].fingerprint == other[0].fingerprint
    assert one[0].place.detail == "$.members.*.key"


@pytest.mark.parametrize("channel", ["log", "header", "span", "setting"])
def test_a_word_of_the_application_s_is_no_name_though_a_user_is_called_so(channel: Channel) -> None:
    places = [Place(channel, DASHBOARD, f"app.{name}") for name in ("admin", "user")]

    findings = reported([shown(place, {("admin", "user"): 1}) for place in places], saying("admin", "user"))

    assert [found.place for found in findings] == places


@pytest.mark.parametrize(
    "place", [Place("header", DASHBOARD, "$.a"), Place("body", "GET /b", "$.a"), Place("body", DASHBOARD, "$.b")]
)
def test_a_fingerprint_depends_on_channel_route_and_detail(place: Place) -> None:
    pairs = {("bob", "alice"): 1}

    findings = report([shown(Place("body", DASHBOARD, "$.a"), pairs), shown(place, pairs)]).plain.findings

    assert len({found.fingerprint for found in findings}) == 2


def test_spans_whose_names_have_canaries_in_them_are_one_finding() -> None:
    spans = [
        shown(Place("span", DASHBOARD, f"load {canary(owner)}"), {("bob", "alice"): count}, reproduced=is_shown)
        for owner, count, is_shown in (("alice", 2, False), ("bob", 3, True))
    ]

    (found,) = report(spans).plain.findings

    assert found.place.detail == "load (canary)"
    assert found.sightings == 5
    assert found.reproduced


def test_findings_stand_in_the_order_of_their_routes() -> None:
    pairs = {("bob", "alice"): 1}
    places = [Place("body", "GET /b"), Place("header", "GET /a", "x"), Place("body", "GET /a", "x")]

    findings = report([shown(place, pairs) for place in places]).plain.findings

    assert [str(found.place) for found in findings] == [
        "body of GET /a at x",
        "header of GET /a at x",
        "body of GET /b",
    ]


def test_no_secret_credential_or_canary_is_said() -> None:
    text = f"{canary('alice').upper()} {secret_of('bob')} token-of-alice and {canary('bob')[:14]} cut off"

    assert saying("alice", "bob").text(text) == "(canary) (secret) (secret) and (canary) cut off"


def test_no_credential_of_a_query_is_said() -> None:
    cast = Cast((User("alice", query={"access_token": "hush-hush", "version": "2026-11-30"}), User("bob")))

    assert Saying(cast, ()).text("hush-hush 2026-11-30") == "(secret) 2026-11-30"


def test_nothing_that_users_sign_in_with_is_said_nor_what_they_are_given() -> None:
    form = {"grant_type": "password", "username": "alice-the-first", "password": "hunter2-of-alice"}
    body = {"users": [{"name": "bob", "pin": 12345678, "key": "correct-horse-bob"}]}
    cast = Cast(
        (
            User("alice-the-first", sign_in=Call("/login", form=form), sign_out=Call("/out", body=["bye-bye-alice"])),
            User("bob", sign_in=Call("/login", body=body)),
        )
    )

    said = Saying(cast, {"s3ssion-of-bob", "short"})

    assert said.text("hunter2-of-alice, correct-horse-bob; bye-bye-alice") == "(secret), (secret); (secret)"
    assert said.text("s3ssion-of-bob short alice-the-first bob password") == (
        "(secret) short alice-the-first bob password"
    )


def test_a_name_is_said_even_where_it_is_a_credential_too() -> None:
    cast = Cast((User("visitor-one", {"X-Auth-User": "visitor-one"}), User("visitor-two")))

    assert Saying(cast, ()).text("visitor-one: GET /") == "visitor-one: GET /"


def test_steps_are_said_like_everything_else() -> None:
    route = f"GET /{secret_of('alice')}\x1b[2J"
    ask = Ask(1, "alice", route, 0, "alice.0")
    steps: tuple[Step, ...] = (
        ask,
        Together((ask,)),
        Connect(2, "bob", route, 0, f"bob at {route}"),
        HangUp("bob", f"bob at {route}"),
    )
    sign_in = SignIn(3, "bob", route, "bob.0")
    steps = (*steps, sign_in, SignOut(4, "bob", route, "bob.0"), Restart((sign_in,)))

    (found,) = report([shown(Place("body", DASHBOARD), {("bob", "alice"): 1}, steps)]).plain.findings

    said = repr(found)
    assert secret_of("alice") not in said
    assert r"\\x1b" in said
    assert r"'\x1b" not in said


@given(st.text(st.characters(), max_size=40))
def test_whatever_it_is_it_can_be_printed(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)


def test_a_known_gap_of_the_package_is_not_gone() -> None:
    """A route that is not covered with the package was not tried there, which says nothing."""
    before = [dashboard(), shown(Place("body", "POST /orders"), {("bob", "alice"): 1})]
    after = [shown(Place("header", DASHBOARD, "x-user"), {("bob", "alice"): 1})]

    compared = report(before, after=after).compared

    assert {(str(one.finding.place), one.change) for one in compared} == {
        (f"body of {DASHBOARD} at $.account.api_key", "gone with ucm"),
        ("body of POST /orders", "not tried with ucm"),
        (f"header of {DASHBOARD} at x-user", "only with ucm"),
    }
    assert report([dashboard()], after=[dashboard()]).compared[0].change == "still there"


def test_what_users_sign_in_by_is_tried_though_that_covers_nothing() -> None:
    found = shown(Place("body", "POST /login"), {("bob", "alice"): 1})
    login = RouteCoverage("POST /login", "schema", "users sign in by it", users={"alice", "bob"})

    made = report([found], after=[], routes=[login])

    assert not login.is_covered
    assert [one.change for one in made.compared] == ["gone with ucm"]


def test_a_canary_of_whatever_run_is_not_said() -> None:
    """Each run and each attempt to repeat it has others."""
    said = saying("alice", "bob")
    assert {said.text(canary("alice", seed=seed)) for seed in (0, 99, secrets.randbits(64))} == {"(canary)"}
    found = Place("header", DASHBOARD, f"x-{canary('bob', seed=5)}")
    assert said.lasting(found) == Place("header", DASHBOARD, "x-(canary)")
