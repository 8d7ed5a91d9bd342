"""Users who sign in and out: what they are answered is looked at, and nobody goes on as a guest."""

from dataclasses import replace

from support.apps.certify_signing import ACCOUNTS
from support.certifying import certified
from ucm_middleware.certify.cast import Call, Cast, User
from ucm_middleware.certify.certifying import Options, Result

APPS = "support.apps.certify_signing"


def user(name: str) -> User:
    return User(name, sign_in=Call("/login", body={"user": name}, token="access_token"))


CAST = Cast(
    tuple(
        replace(user(name), secrets=(account,), sign_out=Call("/logout?from=here"))
        for name, account in ACCOUNTS.items()
    )
)


def tried(app: str, cast: Cast = CAST, *, seconds: float = 3.0, shorten: float = 0.0) -> Result:
    return certified(Options(f"{APPS}:{app}", cast, factory=True, seconds=seconds, shorten=shorten, seed=1))


def test_what_signing_in_and_out_is_answered_with_is_looked_at() -> None:
    result = tried("welcoming_others", shorten=30.0)
    found = {str(one.finding.place): one.shortest for one in result.shown}
    assert found.keys() == {
        "body of POST /login at $.account",
        "header of POST /login at x-account",
        "log of POST /login at shop.login",
        "body of POST /logout at $.bye",
    }
    for shortest in found.values():
        assert shortest.reproduced
        assert len(shortest.steps) <= 2
    assert "signs in" in str(found["body of POST /login at $.account"].steps[-1])
    assert "signs out" in str(found["body of POST /logout at $.bye"].steps[-1])


def failed(user: str) -> str:
    return f"the sign-in of {user} (POST /login) is answered with 429"


def test_who_cannot_sign_in_again_goes_on_as_they_were() -> None:
    result = tried("never_leaving", Cast(tuple(map(user, ACCOUNTS))), seconds=5.0)
    assert result.shown == ()
    said = result.coverage.without["sign out and in"].removeprefix("in the middle of the run ")
    assert {*said.split("; ")} == {failed(name) for name in ACCOUNTS}
    assert result.notes == ()


def test_who_cannot_sign_in_again_once_they_are_signed_out_takes_no_part() -> None:
    cast = Cast(tuple(replace(user(name), sign_out=Call("/logout")) for name in ACCOUNTS))
    result = tried("leaving", cast, seconds=20.0)
    assert result.shown == ()
    said = result.coverage.without["sign out and in"]
    for name in ACCOUNTS:
        assert f"{failed(name)}; signed out, {name} took no part in what followed" in said
    assert result.notes == ("it was given up before its time: nobody is signed in any more, nor can sign in",)


def test_who_is_shown_their_own_as_they_sign_in_is_not_accused() -> None:
    result = tried("welcoming_each")
    assert result.shown == ()
    for route in ("POST /login", "POST /logout"):
        assert result.coverage.routes[route].own > 0
        assert result.coverage.routes[route].answers.keys() == {"2xx"}
        assert result.coverage.routes[route].problem == "users sign in or out by it, and that is tried as such"
