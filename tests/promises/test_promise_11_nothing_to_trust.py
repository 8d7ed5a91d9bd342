"""Promise 11: a client is who the app's own resolver says, whatever it says of itself, and bad ids are refused."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.observer import Observer, client, observing
from support.raw_http import RawConnection
from support.servers import Server

pytestmark = pytest.mark.security

Headers = dict[str, str]


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_trust:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def token(user: object = None, **issued: object) -> Headers:
    """The credentials that stand for this user."""
    return {"Authorization": f"Bearer {json.dumps({'user': user, **issued}).encode().hex()}"}


def who(desk: Observer, path: str, headers: Headers) -> dict[str, Any]:
    seen = desk.request(None, path, headers=headers)
    assert seen.status_code == 200, seen.text
    shown: dict[str, Any] = seen.json()
    return shown


def who_by_websocket(desk: Observer, path: str, headers: Headers) -> dict[str, Any]:
    with connect(desk.server.ws_url + path, additional_headers=headers) as websocket:
        shown: dict[str, Any] = json.loads(websocket.recv())
    return shown


FORGED = {
    "X-User-Id": "bob",
    "X-User": "bob",
    "User-Id": "bob",
    "Remote-User": "bob",
    "X-Remote-User": "bob",
    "X-Forwarded-User": "bob",
    "X-Forwarded-Email": "bob@example.org",
    "X-Auth-Request-User": "bob",
    "X-Authenticated-User": "bob",
    "X-WebAuth-User": "bob",
    "From": "bob@example.org",
    "Forwarded": "for=bob;by=bob",
    "X-Forwarded-For": "bob",
    "X-Request-Id": "request-of-bob",
    "X-Correlation-Id": "request-of-bob",
    "X-Thread-Id": "thread-of-bob",
    "X-Session-Id": "session-of-bob",
    "Cookie": "user_id=bob; session=bob; user=bob",
    "baggage": "user_id=bob,user.id=bob,enduser.id=bob",
    "traceparent": "00-0af7651916cd43dd8448eb211c80b0bb-00f067aa0ba902b0-00",
    "tracestate": "bob=00f067aa0ba902b0",
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("path", ["/open/who", "/unresolved/who"])
def test_what_a_client_says_of_itself_changes_nothing(desk: Observer, path: str, name: str) -> None:
    forged = {name: FORGED[name]}
    for seen in (
        who(desk, f"{path}?user_id=bob&user=bob", forged),
        who_by_websocket(desk, f"{path}?user_id=bob&user=bob", forged),
    ):
        assert seen["is_anonymous"] is True
        assert "bob" not in json.dumps(seen)
        assert FORGED[name] not in json.dumps(seen)


@pytest.mark.parametrize("name", FORGED)
def test_nor_does_it_change_a_user_into_another(desk: Observer, name: str) -> None:
    forged = {name: FORGED[name], **token("alice")}
    for seen in (who(desk, "/open/who?user_id=bob", forged), who_by_websocket(desk, "/open/who?user_id=bob", forged)):
        assert seen["user_id"] == "alice"
        assert "bob" not in json.dumps(seen)
        assert FORGED[name] not in json.dumps(seen)


def assert_refused(desk: Observer, path: str, headers: Headers, status: int) -> str:
    """The same refusal of a request and of a WebSocket; nothing is opened for them. Returns the text."""
    refused = desk.request(None, path, headers=headers)
    assert refused.status_code == status
    with pytest.raises(InvalidStatus) as denied, connect(desk.server.ws_url + path, additional_headers=headers):
        pass
    assert denied.value.response.status_code == status
    if status == 401:
        assert refused.headers["www-authenticate"] == denied.value.response.headers["www-authenticate"] == "Bearer"
    assert desk.journal("called") == []
    assert desk.active() == []
    assert json.loads(denied.value.response.body) == refused.json()
    text: str = refused.json()["detail"]
    return text


def test_where_a_user_is_required_strangers_are_refused(desk: Observer) -> None:
    assert_refused(desk, "/strict/who", {}, 401)
    assert desk.system_events("refused")[-1]["outcome"] == "denied"
    assert who(desk, "/strict/who", token("alice"))["user_id"] == "alice"


def test_what_an_inner_one_requires_holds_inside_of_another(desk: Observer) -> None:
    assert_refused(desk, "/inside-unresolved/who", {}, 401)
    assert_refused(desk, "/inside-unresolved/who", {"Authorization": "Bearer 00ff"}, 401)
    assert who(desk, "/inside-unresolved/who", token("alice"))["user_id"] == "alice"
    assert who_by_websocket(desk, "/inside-unresolved/who", token("alice"))["user_id"] == "alice"


def test_an_inner_one_goes_by_its_own_resolver(desk: Observer) -> None:
    def also(user: str) -> Headers:
        return {"X-Token": token(user)["Authorization"].removeprefix("Bearer ")}

    assert_refused(desk, "/inside-open/who", token("alice"), 401)
    assert_refused(desk, "/inside-open/who", token("alice") | also("bob"), 409)
    assert who(desk, "/inside-open/who", token("alice") | also("alice"))["user_id"] == "alice"
    assert who(desk, "/inside-open/who", also("alice"))["user_id"] == "alice"


def test_where_a_handshake_cannot_be_answered_it_is_closed(desk: Observer) -> None:
    with pytest.raises(InvalidStatus) as denied, connect(desk.server.ws_url + "/without-denial/who"):
        pass
    assert denied.value.response.status_code == 403
    assert desk.journal("called") == []
    assert who_by_websocket(desk, "/without-denial/who", token("alice"))["user_id"] == "alice"


BROKEN = {
    "unknown": "Bearer 00ff",
    "empty": "Bearer",
    "basic": "Basic Ym9iOmJvYg==",
    "bare": "bob",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("path", ["/open/who", "/strict/who"])
def test_broken_credentials_are_not_the_absence_of_credentials(desk: Observer, path: str, name: str) -> None:
    assert_refused(desk, path, {"Authorization": BROKEN[name]}, 401)


def test_two_credentials_are_none(desk: Observer) -> None:
    alice, bob = token("alice")["Authorization"], token("bob")["Authorization"]
    with RawConnection(desk.server) as connection:
        # A mapping has no two fields of the same name: one travels in the value of another.
        headers = {"X-Any": f"any\r\nAuthorization: {bob}", "Authorization": alice}
        doubled = connection.request("/open/who", headers=headers)
    assert doubled.status == 401
    assert desk.journal("called") == []


BAD = {
    "empty": "",
    "blank": " ",
    "long": "x" * 257,
    "newline": "alice\nbob",
    "crlf": "alice\r\nX-User: bob",
    "nul": "alice\0",
    "escape": "alice\x1b[2J",
    "bidirectional": "alice\u202eecila",
    "zero-width": "ali\u200bce",
    "no-break-space": "ali\u00a0ce",
    "filler": "alice\u3164",
    "blank-before": " alice",
    "blank-after": "alice ",
    "none": "None",
    "null": "null",
    "undefined": "UNDEFINED",
    "object": "[object Object]",
    "placeholder": "ChangeMe",
    "temporary": "temp_7",
    "mock": "mock_user",
    "ours": "anonymous_0123456789abcdef0123456789abcdef",
    "number": 42,
    "boolean": True,
    "list": ["alice"],
    "mapping": {"id": "alice"},
}


@pytest.mark.parametrize("name", [name for name in BAD if isinstance(BAD[name], str)])
def test_a_bad_id_is_refused_by_field_and_rule_and_not_repeated(desk: Observer, name: str) -> None:
    bad = BAD[name]
    assert isinstance(bad, str)
    text = assert_refused(desk, "/open/who", token(bad), 400)
    field, _, rule = text.partition(": ")
    assert field == "user_id"
    assert rule
    if len(bad) > 4:
        assert bad not in text
        assert json.dumps(bad).strip('"') not in text


@pytest.mark.parametrize("name", [name for name in BAD if not isinstance(BAD[name], str)])
def test_what_is_no_id_at_all_opens_nothing(desk: Observer, name: str) -> None:
    assert desk.request(None, "/open/who", headers=token(BAD[name])).status_code >= 400
    with (
        pytest.raises(InvalidStatus),
        connect(desk.server.ws_url + "/open/who", additional_headers=token(BAD[name])),
    ):
        pass
    assert desk.journal("called") == []
    assert desk.active() == []


GOOD = [
    "alice@example.org",
    "auth0|5f7c0ec0",
    "9f1b7d0e-2f3c-4b55-8f6a-0f2a4f6f9d11",
    "O'Brien",
    "J\u00fcrgen M\u00fcller",
    "\u674e\u5c0f\u9f99",
    "Test-Hausen",
    "x" * 256,
    "0",
]


@pytest.mark.parametrize("user", GOOD)
def test_an_ordinary_id_passes_unchanged(desk: Observer, user: str) -> None:
    assert who(desk, "/open/who", token(user))["user_id"] == user
    assert who_by_websocket(desk, "/open/who", token(user))["user_id"] == user


def test_a_test_id_is_one_in_a_test_only(server_factory: ServerFactory) -> None:
    for environment, status in (("testing", 200), ("production", 400), (None, 400)):
        server = server_factory("uvicorn-h11", "promise_trust:app", env={"UCM_ENVIRONMENT": environment})
        with observing(server) as desk:
            assert desk.request(None, "/open/who", headers=token("test_alice")).status_code == status


def test_a_resolver_may_refuse_in_its_own_words(desk: Observer) -> None:
    refused = desk.request(None, "/open/who", headers=token(error="teapot"))
    assert (refused.status_code, refused.headers["x-reason"]) == (418, "tea")
    assert refused.json()["detail"] == "not my kind of token"
    assert_refused(desk, "/open/who", token(error="teapot"), 418)
    assert_refused(desk, "/open/who", token(error="expired"), 401)


def test_a_resolver_that_fails_lets_nobody_in(desk: Observer) -> None:
    with RawConnection(desk.server) as connection:
        assert connection.request("/open/who", headers=token(error="crash")).status == 500
    assert desk.journal("called") == []
    assert desk.active() == []
    assert who(desk, "/open/who", token("alice"))["user_id"] == "alice"


def test_a_session_counts_when_the_server_has_signed_it(desk: Observer) -> None:
    with client(desk.server) as browser:
        assert browser.get("/session/who").json()["is_anonymous"] is True
        assert browser.post("/session/login?user=alice").status_code == 200
        signed = browser.cookies["session"]
        assert browser.get("/session/who").json()["user_id"] == "alice"
    forged_data = base64.b64encode(b'{"user_id": "bob"}').decode()
    for forged in (forged_data, signed.replace(signed.partition(".")[0], forged_data), f"{forged_data}.aaaaaa.bbbb"):
        seen = who(desk, "/session/who", {"Cookie": f"session={forged}"})
        assert seen["is_anonymous"] is True
        assert "bob" not in json.dumps(seen)


def test_the_user_of_starlettes_authentication_counts(desk: Observer) -> None:
    assert who(desk, "/login/who", token("alice"))["user_id"] == "alice"
    assert who_by_websocket(desk, "/login/who", token("alice"))["user_id"] == "alice"
    assert who(desk, "/login/who", {"X-User-Id": "bob"})["is_anonymous"] is True
