"""What is wrong with an application is said plainly, with what was and was not covered."""

import re

import pytest

from support.certifying import certified
from ucm_middleware.certify.cast import Call, Cast, User, strangers
from ucm_middleware.certify.certifying import Options, Result
from ucm_middleware.certify.server import SubjectError
from ucm_middleware.certify.trial import SignInError

APPS = "tests.certify.apps.bad_apps"


def tried(name: str, seconds: float = 2.0) -> Result:
    return certified(Options(f"{APPS}:{name}", strangers(), seconds=seconds, shorten=0, seed=1))


def problem(result: Result, route: str) -> str | None:
    return result.coverage.routes[route].problem


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("does_not_start", "the database is not there|Application startup failed"),
        ("bare", "nothing to try: no schema at /openapi.json"),
        ("absent", "has no 'absent'"),
        ("LAST", "is a dict, and no ASGI application"),
        ("strangers", "has no 'strangers'"),
    ],
)
def test_one_that_cannot_be_tried_is_told_why(name: str, said: str) -> None:
    with pytest.raises(SubjectError, match=said):
        tried(name)


def test_one_that_does_not_come_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm_middleware.certify.server.STARTING", 2.0)
    with pytest.raises(SubjectError, match="neither listens nor ends within 2 seconds"):
        tried("does_not_come_up")


def test_a_route_that_hangs_does_not_take_the_others_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm_middleware.certify.stage.PATIENCE", 0.2)
    result = tried("hangs")
    assert result.coverage.late > 0
    assert "it hangs, or its connection is lost" in str(problem(result, "GET /never"))
    assert problem(result, "GET /ok") is None


def test_one_that_exits_again_and_again_is_given_up() -> None:
    with pytest.raises(SubjectError, match=r"ended by itself 5 times, the last time after: .*visitor-\d: GET /exit"):
        tried("exits", seconds=90)


def test_one_that_only_fails_is_not_called_clean() -> None:
    result = tried("fails")
    assert result.coverage.covered == 0
    for route in ("GET /broken", "POST /also-broken"):
        assert "nobody got an answer of 2xx" in str(problem(result, route))
        assert "5xx" in str(problem(result, route))


def test_one_that_streams_for_ever_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm_middleware.certify.stage.PATIENCE", 0.5)
    result = tried("streams", seconds=4)
    assert result.coverage.endless > 0
    assert result.coverage.late > 0


def test_one_that_was_given_no_credentials_says_so() -> None:
    result = tried("closed")
    assert "its users' file gives no credentials that it takes" in str(problem(result, "GET /mine"))


def test_one_that_logs_megabytes_is_read_all_the_same() -> None:
    result = tried("logs")
    assert result.coverage.output > 2_000_000
    assert problem(result, "GET /loud") is None


def test_a_user_that_cannot_sign_in_is_named() -> None:
    users = (User("alice", sign_in=Call("/login", body={"password": "of alice"})), User("bob"))
    with pytest.raises(SignInError, match=r"the sign-in of alice \(POST /login\) is answered with 404"):
        certified(Options(f"{APPS}:hangs", Cast(users), seconds=1, shorten=0))


def test_a_sign_in_that_fails_in_the_middle_ends_nothing_and_is_told_of() -> None:
    users = tuple(User(name, sign_in=Call("/login", body={"name": name})) for name in ("alice", "bob"))
    result = certified(Options(f"{APPS}:strict", Cast(users), seconds=5, shorten=0, seed=1))
    said = result.coverage.without["sign out and in"]
    assert re.fullmatch(r"in the middle of the run the sign-in of \w+ \(POST /login\) is answered with 429.*", said)
    assert problem(result, "GET /me") is None


def test_what_is_in_the_log_of_another_s_request_is_found() -> None:
    result = tried("mixes")
    places = {(one.finding.place.channel, one.finding.place.detail) for one in result.shown}
    assert places == {("log", "shop.orders")}
