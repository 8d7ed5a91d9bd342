"""Which pages may open a WebSocket with a user's cookies."""

import pytest

from support.asgi import exchange, websocket_scope
from support.contexts import MakeManager
from ucm_middleware import ConfigurationError, OriginError, UserContextManager, UserContextMiddleware
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import Receive, Scope, Send
from ucm_middleware.websocket.origins import Origins

pytestmark = pytest.mark.security

ALLOWED = ["https://app.example.com", "http://localhost:3000", "capacitor://localhost"]


def headers(origin: str | None, host: str = "api.example.com", cookie: str | None = "a=b") -> list[tuple[bytes, bytes]]:
    given = [("host", host), ("origin", origin), ("cookie", cookie)]
    return [(name.encode(), value.encode("latin-1")) for name, value in given if value is not None]


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "api.example.com"),  # a program: browsers send it with every handshake
        ("https://api.example.com", "api.example.com"),
        ("https://api.example.com", "api.example.com:443"),
        ("http://api.example.com", "api.example.com:80"),
        ("https://API.example.com", "api.EXAMPLE.com"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://app.example.com", "api.example.com"),
        ("https://app.example.com:443", "api.example.com"),
        ("http://localhost:3000", "localhost:8000"),
        ("capacitor://localhost", "localhost"),
    ],
)
def test_these_may(origin: str | None, host: str) -> None:
    Origins(ALLOWED).require(headers(origin, host))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "api.example.com"),
        ("http://app.example.com", "api.example.com"),  # a page that was fetched in the clear may be anybody's
        ("https://app.example.com:8443", "api.example.com"),
        ("https://app.example.com.evil.example", "api.example.com"),
        ("https://evil.example/app.example.com", "api.example.com"),
        ("https://app.example.com@evil.example", "api.example.com"),
        ("https://api.example.com:8000", "api.example.com:8001"),
        ("http://api.example.com", "api.example.com:443"),
        ("null", "api.example.com"),
        ("", "api.example.com"),
        ("https://", ""),
        ("ionic://localhost", "localhost"),
        ("https://[::1", "[::1"),
        ("https://api.example.com:99999999", "api.example.com:99999999"),
        ("https://app.ex\xe4mple.com", "api.example.com"),
    ],
)
def test_these_may_not(origin: str, host: str) -> None:
    with pytest.raises(OriginError, match="allowed_origins"):
        Origins(ALLOWED).require(headers(origin, host))


def test_two_of_them_are_none() -> None:
    origin = (b"origin", b"https://app.example.com")
    with pytest.raises(OriginError):
        Origins(ALLOWED).require([origin, *headers("https://app.example.com")])
    for more in (
        [(b"host", b"evil.example"), *headers("https://api.example.com")],
        [*headers("https://api.example.com"), (b"host", b"evil.example")],
    ):
        with pytest.raises(OriginError):
            Origins().require(more)


def test_where_no_cookies_are_it_does_not_matter() -> None:
    Origins().require(headers("https://evil.example", cookie=None))


def test_over_tls_a_page_that_came_in_the_clear_may_be_anybodys() -> None:
    for origin in ("https://api.example.com", "http://localhost:3000"):
        Origins(ALLOWED).require(headers(origin), is_secure=True)
    with pytest.raises(OriginError):
        Origins(ALLOWED).require(headers("http://api.example.com", host="api.example.com:80"), is_secure=True)


@pytest.mark.parametrize(("scheme", "sent"), [("ws", "websocket.accept"), ("wss", "websocket.close")])
async def test_the_middleware_knows_which_came_over_tls(make_manager: MakeManager, scheme: str, sent: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})

    given = [("host", "api.example.com"), ("origin", "http://api.example.com"), ("cookie", "a=b")]
    messages = await exchange(
        UserContextMiddleware(app, manager=make_manager()), websocket_scope(headers=given, scheme=scheme)
    )
    assert messages[0]["type"] == sent


def test_what_it_says_is_bounded() -> None:
    with pytest.raises(OriginError) as caught:
        Origins().require(headers("https://" + "e" * 5000))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("wrong", ["app.example.com", "https://app.example.com/", "*", "", "https://", 7])
def test_what_is_no_origin_is_no_setting(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed_origins"):
        Origins([wrong])


def test_one_text_is_no_list() -> None:
    with pytest.raises(ConfigurationError, match="a list"):
        Origins("https://app.example.com")


def test_a_refusal_is_on_record_as_such(ucm_manager: UserContextManager, ucm_ledger: RecordingLedger) -> None:
    with pytest.raises(OriginError) as caught:
        Origins().require(headers("https://evil.example"))
    ucm_manager.record_refusal(caught.value, str(caught.value))
    [record] = ucm_ledger.select("refused")
    assert (record.outcome, record.reason) == ("denied", "origin")
