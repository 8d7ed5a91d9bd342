"""Whole runs on real servers: what is planted is found and shown by few steps, and what is clean is not accused."""

import dataclasses

import pytest

from examples.gallery.certify import cast as gallery_cast
from support.apps.certify_shops import KEYS
from support.certifying import certified
from ucm_middleware.certify.cast import Call, Cast, User, strangers
from ucm_middleware.certify.certifying import Options, Result

APPS = "support.apps.certify_shops"
OUT = Call("/logout")

SIGNING_IN = Cast(
    tuple(
        User(name, secrets=(key,), sign_in=Call("/login", body={"user": name}), sign_out=OUT)
        for name, key in KEYS.items()
    )
)
WITH_QUERIES = Cast(tuple(User(name, secrets=(key,), query={"token": name}) for name, key in KEYS.items()))
WITH_HEADERS = Cast(tuple(User(name, {"X-User": name}) for name in KEYS))


def tried(
    name: str, cast: Cast, *, seconds: float = 2.0, with_ucm: bool = False, shorten: float = 0.0, **more: object
) -> Result:
    options = Options(name, cast, factory=True, seconds=seconds, shorten=shorten, seed=1)
    return certified(dataclasses.replace(options, **more), with_ucm=with_ucm)  # type: ignore[arg-type]


def routes_of(result: Result) -> set[str]:
    return {shown.finding.place.route for shown in result.shown}


def test_a_session_that_is_mixed_up_is_found_and_shown_by_few_steps() -> None:
    result = tried(f"{APPS}:sessions_mixed", SIGNING_IN, first=True, shorten=10.0)
    assert routes_of(result) == {"GET /me"}
    shortest = result.shown[0].shortest
    assert shortest.reproduced
    assert len(shortest.steps) <= 3
    told = f"{result!r} {[str(step) for step in shortest.steps]}"
    assert not any(secret in told for secret in (*KEYS.values(), "s-0-", "sid="))


def test_sessions_that_are_kept_apart_are_not_accused() -> None:
    result = tried(f"{APPS}:sessions_apart", SIGNING_IN)
    assert routes_of(result) == set()
    assert result.coverage.routes["GET /me"].users == {*KEYS}
    assert result.coverage.routes["GET /me"].own > 0
    assert result.coverage.routes["GET /me"].answers.keys() == {"2xx"}
    assert result.coverage.routes["POST /logout"].problem == "users sign in or out by it, and that is tried as such"
    assert "sign out and in" in result.coverage.drives
    assert "sign out and in" not in result.coverage.without


def test_users_may_be_known_by_the_query() -> None:
    result = tried(f"{APPS}:queries_apart", WITH_QUERIES)
    assert routes_of(result) == set()
    assert {key: route.users for key, route in result.coverage.routes.items()} == {
        "GET /me": {*KEYS},
        "WS /live": {*KEYS},
    }
    assert routes_of(tried(f"{APPS}:queries_mixed", WITH_QUERIES)) == {"WS /live"}


def test_what_websockets_are_opened_denied_and_closed_with_is_looked_at() -> None:
    cast = Cast(tuple(User(name, {"X-User": name}, secrets=(key,)) for name, key in KEYS.items()))
    places = {str(shown.finding.place) for shown in tried(f"{APPS}:sockets_mixed", cast, seconds=4.0).shown}
    assert places == {
        "header of WS /live at x-key",
        "event of WS /live at reason of the close",
        "header of WS /denied at x-key",
        "body of WS /denied at $.key",
    }
    result = tried(f"{APPS}:sockets_apart", cast, seconds=4.0)
    assert result.shown == ()
    assert result.coverage.routes["WS /live"].own > 0
    assert result.coverage.routes["GET /me"].own > 0, "the cookie of the handshake is kept"
    assert result.coverage.routes["WS /denied"].problem == "nobody got a message: {times} times not accepted".format(
        times=result.coverage.routes["WS /denied"].answers["not accepted"]
    )


def test_spans_of_a_provider_that_is_made_at_import_and_set_nowhere_are_looked_at() -> None:
    places = {
        str(each.finding.place) for each in tried("support.apps.certify_spans:app", strangers(), factory=False).shown
    }
    assert places == {"span of POST /say at saying"}


def test_an_id_that_is_all_it_takes_is_found() -> None:
    assert "GET /notes/{note_id}" in routes_of(tried(f"{APPS}:ids_open", WITH_HEADERS))


def test_ids_that_are_guarded_and_credentials_in_the_schema_are_not_accused() -> None:
    result = tried(f"{APPS}:ids_closed", WITH_HEADERS)
    assert routes_of(result) == set()
    assert result.coverage.routes["GET /notes/{note_id}"].own > 0
    assert "others' ids" not in result.coverage.without


def test_what_is_said_of_an_id_that_its_user_asked_by_is_no_finding() -> None:
    result = tried(f"{APPS}:ids_chosen", WITH_HEADERS)
    assert routes_of(result) == set()
    assert result.coverage.routes["GET /notes/{note_id}"].own > 0


@pytest.mark.parametrize(("bug", "is_cured"), [("request_variable", True), ("global_cache", False)])
def test_what_the_package_cures_is_shown(bug: str, is_cured: bool) -> None:
    app = f"examples.gallery.{bug}:planted"
    assert tried(app, gallery_cast()).shown
    assert bool(tried(app, gallery_cast(), with_ucm=True).shown) is not is_cured


def test_the_package_knows_users_however_they_sign_in() -> None:
    route = tried(f"{APPS}:contexts_shown", SIGNING_IN, with_ucm=True).coverage.routes["GET /context"]
    assert route.users == {*KEYS}
    assert route.own > 0


def test_requests_that_are_multiplexed_are_tried() -> None:
    result = tried("examples.gallery.global_cache:planted", gallery_cast(), kind="hypercorn")
    assert result.shown
    assert result.coverage.drives["HTTP/2"] > 0
