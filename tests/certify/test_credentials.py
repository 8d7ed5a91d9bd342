"""What a user is known by: kept as browsers do, forgotten when they sign out, shown nowhere."""

import pytest

from ucm_middleware.certify.cast import Call, User
from ucm_middleware.certify.credentials import Credentials
from ucm_middleware.certify.lines.answer import Answer

IN = Call("/login", body={"user": "alice"}, token="access_token")


def cookies_after(*texts: str, target: str = "/") -> str | None:
    credentials = Credentials(User("alice"), [])
    credentials.keep([(b"Set-Cookie", text.encode("latin-1")) for text in texts])
    return dict(credentials.headers(target)).get("Cookie")


@pytest.mark.parametrize(
    ("texts", "sent"),
    [
        (["a=1; Path=/; HttpOnly", "b=2"], "a=1; b=2"),
        (["a=1", "a=2"], "a=2"),
        (['a={"x": [1]}; Secure; Partitioned; Priority=High'], 'a={"x": [1]}'),
        (["a:b[c]=1"], "a:b[c]=1"),
        (["a=", "b=x=y=="], "a=; b=x=y=="),
        (["nothing", "=x"], None),
        (["a=1", "a=; Max-Age=0"], None),
        (["a=1", "a=1; max-age=-5"], None),
        (["a=1", "a=x; Expires=Thu, 01 Jan 1970 00:00:00 GMT"], None),
        (["a=1", "a=x; Expires=Wed, 05-Apr-2000 10:00:00 GMT"], None),
        (["a=1; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=60"], "a=1"),
        (["a=1; Expires=Fri, 01 Jan 2199 00:00:00 GMT"], "a=1"),
        (["a=1; Expires=sometime; Max-Age=soon"], "a=1"),
    ],
)
def test_cookies_are_kept_and_forgotten(texts: list[str], sent: str | None) -> None:
    assert cookies_after(*texts) == sent


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/", "all=0"),
        ("/admin", "sid=2; all=0"),
        ("/admin?next=/shop/1", "sid=2; all=0"),
        ("/admin/users", "sid=2; all=0"),
        ("/administration", "all=0"),
        ("/shop/1", "sid=1; all=0"),
        ("/shop", "all=0"),
    ],
)
def test_cookies_are_sent_where_their_path_is(target: str, sent: str) -> None:
    texts = (
        "all=0",
        "sid=1; Path=/shop/",
        "sid=2; path=/admin",
        "gone=3; Path=/admin",
        "gone=; Path=/admin; Max-Age=0",
    )
    assert cookies_after(*texts, target=target) == sent


def test_a_token_is_sent_in_place_of_the_header_and_cookies_with_the_user_s_own() -> None:
    given: list[str] = []
    credentials = Credentials(User("alice", {"authorization": "Basic x", "cookie": "lang=en", "X-Tenant": "1"}), given)
    cookie = ((b"set-cookie", b"sid=s"),)
    assert credentials.signed_in(IN, Answer("complete", 200, cookie, b'{"access_token": "t"}')) is None
    assert credentials.headers("/") == (
        ("Authorization", "Bearer t"),
        ("Cookie", "lang=en; sid=s"),
        ("X-Tenant", "1"),
    )
    assert given == ["s", "t"]


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/live", "/live?token=a%26b&v=2"),
        ("/live?room=x", "/live?room=x&token=a%26b&v=2"),
        ("/live?token=made+up&%74oken=too&room=x&v=", "/live?room=x&token=a%26b&v=2"),
    ],
)
def test_the_user_s_own_query_goes_in_place_of_what_the_schema_makes_up(target: str, sent: str) -> None:
    assert Credentials(User("alice", query={"token": "a&b", "v": "2"}), []).target(target) == sent
    assert Credentials(User("bob"), []).target(target) == target


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer("complete", 401), "is answered with 401"),
        (Answer("dropped"), "is answered with nothing"),
        (Answer("complete", 200, (), b"<html>"), "has no 'access_token' in its answer"),
        (Answer("complete", 200, (), b'["hush"]'), "has no 'access_token' in its answer"),
        (Answer("complete", 200, (), b'{"access_token": {"hush": 1}}'), "something else than a text"),
        (Answer("complete", 200, (), b'{"access_token": "hush\\r\\nX: y"}'), "something else than a text"),
    ],
)
def test_a_sign_in_that_fails_is_told_without_what_it_said(answer: Answer, said: str) -> None:
    wrong = Credentials(User("alice"), []).signed_in(IN, answer)
    assert wrong is not None
    assert said in wrong
    assert "hush" not in wrong


def test_a_form_is_sent_as_one() -> None:
    request = Credentials(User("alice"), []).call(Call("/login", form={"user": "alice", "password": "a&b"}), ())
    assert request.body == b"user=alice&password=a%26b"
    assert dict(request.headers)["Content-Type"] == "application/x-www-form-urlencoded"
