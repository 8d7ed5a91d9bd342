"""Who takes part can be mixed up, can be sent, and is really several."""

from collections.abc import Callable

import pytest

from ucm_middleware.certify.cast import Call, Cast, Given, User, strangers
from ucm_middleware.errors import ConfigurationError

VALUE = "hush-hush-value"

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no name": (lambda: User(""), "a name must be printable and not empty"),
    "a name of control characters": (lambda: User("a\n"), "a name must be printable"),
    "a short secret": (lambda: User("alice", secrets=("short",)), "alice has a secret of less than 8 characters"),
    "a header's name": (lambda: User("alice", {"X Key": VALUE}), "headers of alice: 'X Key' is no header's name"),
    "a line more in a header": (lambda: User("alice", {"X-Key": f"{VALUE}\r\nX: y"}), "the value of X-Key must be"),
    "a header beyond ASCII": (lambda: User("alice", {"X-Key": f"{VALUE}é"}), "the value of X-Key must be"),
    "a header with spaces around": (lambda: User("alice", {"X-Key": f" {VALUE}"}), "the value of X-Key must be"),
    "a header of the line's": (
        lambda: User("alice", {"Content-Length": "3"}),
        "Content-Length is made for each request",
    ),
    "a call's path": (lambda: Call("login"), "path of a sign-in or sign-out begins with a slash"),
    "a line more in a call's path": (lambda: Call("/login\r\nX: y"), "has visible ASCII characters only"),
    "a call's method": (lambda: Call("/login", "FETCH"), "method must be one of GET, POST"),  # type: ignore[arg-type]
    "a call's body": (lambda: Call("/login", body={VALUE: {1}}), "must be what JSON can say"),
    "a call of two bodies": (lambda: Call("/login", body={}, form={}), "has body or form, not both"),
    "a route's path": (lambda: Given("orders"), "a path begins with a slash"),
    "a query in a route's path": (lambda: Given("/orders?x=1"), "has no query"),
    "control characters in a route's path": (lambda: Given("/orders\x1b[2J"), "a path is printable"),
    "a route's method": (lambda: Given("/orders", "HEAD"), "method must be one of"),  # type: ignore[arg-type]
    "a route's parameter": (lambda: Given("/x", parameters={"n": 3}), "parameters.n of GET /x must be a JSON schema"),  # type: ignore[dict-item]
    "one user": (lambda: Cast((User("alice"),)), "there must be two or more to mix up, not 1"),
    "two of one name": (lambda: Cast((User("alice"), User("alice"))), "two are called 'alice'"),
    "too many": (lambda: strangers(257), "there may be 256 at most"),
    "one secret": (
        lambda: Cast((User("alice", secrets=(VALUE,)), User("bob", secrets=(VALUE,)))),
        "a secret of alice is one of bob too",
    ),
    "a secret in a secret": (
        lambda: Cast((User("alice", secrets=(VALUE,)), User("bob", secrets=(f"{VALUE}-2",)))),
        "a secret of alice is one of bob too, or part of it",
    ),
    "one credential": (
        lambda: Cast((User("alice", {"Authorization": VALUE}), User("bob", {"authorization": VALUE}))),
        "alice and bob have the same Authorization, so they are one user",
    ),
    "one credential in the query": (
        lambda: Cast((User("alice", query={"token": VALUE}), User("bob", query={"token": VALUE}))),
        "alice and bob have the same token, so they are one user",
    ),
    "a number in the query": (
        lambda: User("alice", query={VALUE: 1}),  # type: ignore[dict-item]
        "query of alice: names and values must be texts",
    ),
    "a header of the certifier's": (lambda: User("alice", {"X-UCM-Certify-User": "1"}), "is made for each request"),
    "one sign-in": (
        lambda: Cast((User("alice", sign_in=Call("/in", body=VALUE)), User("bob", sign_in=Call("/in", body=VALUE)))),
        "alice and bob sign in as the same user",
    ),
}


@pytest.mark.parametrize(("make", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_and_what_is_secret_is_not(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert said in str(caught.value)
    assert VALUE not in str(caught.value)


def test_nothing_secret_is_shown() -> None:
    calls = Call("/in", body=VALUE), Call("/out", form={"a": VALUE})
    user = User("alice", {"X-Key": VALUE}, (VALUE,), *calls, {"token": VALUE})
    assert VALUE not in repr(Cast((user, User("bob"))))


def test_users_may_have_headers_in_common_that_say_nothing_of_who_they_are() -> None:
    assert Cast((User("alice", {"X-Version": "1"}), User("bob", {"X-Version": "1"}))).names == ("alice", "bob")
