"""What a client is told, row by row: over HTTP, before a WebSocket is accepted, and after."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from starlette.requests import HTTPConnection

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from support.contexts import MakeManager
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextIsolationError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    ManagerDrainingError,
    Principal,
    UnauthenticatedError,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
)
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

HEAD: Final = {"http": "http.response", "websocket": "websocket.http.response"}

# What is raised -> the status, the close code, and a header that goes with the status.
ROWS: dict[str, tuple[Exception, int, int, str | None]] = {
    "no identity": (UnauthenticatedError("who are you"), 401, 1008, "www-authenticate"),
    "another user's": (CrossUserAccessError("not yours"), 403, 1008, None),
    "two identities": (IdentityConflictError("two users"), 409, 1008, None),
    "bad id": (InvalidContextError("user_id", "is empty", "give the id"), 400, 1008, None),
    "bad ids to follow": (InvalidContextError("ids", "are too many", "leave some out"), 400, 1008, None),
    "bad connection": (InvalidContextError("connection_id", "is empty", "give the id"), 400, 1008, None),
    "limit": (ContextLimitError("user", 10, "close one"), 429, 1013, "retry-after"),
    "draining": (ManagerDrainingError("closing time"), 503, 1013, "retry-after"),
    "expired": (ContextClosedError("r-1", "app.py:7", "expired"), 504, 1008, None),
    "revoked": (ContextClosedError("r-1", "app.py:7", "revoked"), 401, 1008, "www-authenticate"),
    "shut down": (ContextClosedError("r-1", "app.py:7", "shutdown"), 503, 1013, "retry-after"),
}
EACH_ROW = pytest.mark.parametrize(("error", "status", "code", "header"), ROWS.values(), ids=ROWS)
# Mistakes of the application: nobody outside is told of them.
MISTAKES: list[Exception] = [
    LookupError("of the app"),
    ConfigurationError("a setting is wrong"),
    ContextNotFoundError("there is none"),
    ContextIsolationError("they share", ["secret path"]),
    ContextClosedError("r-1", "app.py:7", "finished"),
    InvalidContextError("agent_context['carol@example.com']", "lock cannot be copied", "make it copyable"),
    InvalidContextError("ttl_seconds", "is -1", "give seconds"),
    ExceptionGroup("", [CrossUserAccessError("not yours"), LookupError("of the app")]),
    ExceptionGroup("", [CrossUserAccessError("not yours"), UnauthenticatedError("who are you")]),
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was raised is raised again by the next test, and must not hold the frames of this one meanwhile."""
    yield
    for error in [*(row[0] for row in ROWS.values()), *MISTAKES]:
        error.__traceback__ = error.__context__ = None


def raising(error: Exception, *, accept: bool = False, receive_first: bool = False) -> ASGIApp:
    """An app that raises, as a handler would; before that it accepts the handshake, or reads what there is."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if receive_first or accept:
            await receive()
        if accept:
            await send({"type": "websocket.accept"})
        raise error

    return app


def resolving(error: Exception) -> Callable[[HTTPConnection], str]:
    def identify(connection: HTTPConnection) -> str:
        raise error

    return identify


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the app was reached")


def assert_response(sent: list[Message], kind: str, status: int, header: str | None) -> None:
    head, body = sent
    assert head["type"] == f"{kind}.start"
    assert head["status"] == status
    headers = {name.decode(): value.decode() for name, value in head["headers"]}
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    assert int(headers["content-length"]) == len(body["body"])
    assert ("retry-after" in headers, "www-authenticate" in headers) == (
        header == "retry-after",
        header == "www-authenticate",
    )
    assert body["type"] == f"{kind}.body"
    assert list(json.loads(body["body"])) == ["detail"]


class TestRaised:
    """By the resolver, or by the app."""

    @EACH_ROW
    @pytest.mark.parametrize("by", ["resolver", "app", "app that has read the request"])
    async def test_over_http(self, by: str, error: Exception, status: int, code: int, header: str | None) -> None:
        app = UserContextMiddleware(never, identify=resolving(error))
        if by != "resolver":
            app = UserContextMiddleware(raising(error, receive_first="read" in by))
        assert_response(await exchange(app, http_scope()), HEAD["http"], status, header)

    @EACH_ROW
    @pytest.mark.parametrize("by", ["resolver", "app", "app that has read the handshake"])
    async def test_before_accept(self, by: str, error: Exception, status: int, code: int, header: str | None) -> None:
        app = UserContextMiddleware(never, identify=resolving(error))
        if by != "resolver":
            app = UserContextMiddleware(raising(error, receive_first="read" in by))
        with_denial = await exchange(app, websocket_scope(extensions=DENIAL))
        assert_response(with_denial, HEAD["websocket"], status, header)
        [close] = await exchange(app, websocket_scope())
        assert (close["type"], close["code"]) == ("websocket.close", code)

    @EACH_ROW
    async def test_after_accept(self, error: Exception, status: int, code: int, header: str | None) -> None:
        app = UserContextMiddleware(raising(error, accept=True))
        for scope in (websocket_scope(), websocket_scope(extensions=DENIAL)):
            _, close = await exchange(app, scope)
            assert (close["type"], close["code"]) == ("websocket.close", code)
            assert close["reason"]

    @EACH_ROW
    async def test_what_has_begun_is_not_answered_twice(
        self, error: Exception, status: int, code: int, header: str | None
    ) -> None:
        sent: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise error

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request"}

        with pytest.raises(type(error)) as caught:
            await UserContextMiddleware(app)(http_scope(), receive, send)
        assert caught.value is error
        assert [message["type"] for message in sent] == ["http.response.start"]

    @pytest.mark.parametrize(
        "error",
        [
            ExceptionGroup("", [CrossUserAccessError("not yours")]),
            ExceptionGroup("", [CrossUserAccessError("a"), ExceptionGroup("", [CrossUserAccessError("b")])]),
        ],
        ids=["one", "groups"],
    )
    async def test_a_group_is_answered_as_all_that_is_in_it(self, error: Exception) -> None:
        assert status_of(await exchange(UserContextMiddleware(raising(error)), http_scope())) == 403

    @pytest.mark.parametrize("scope", [http_scope(), websocket_scope()], ids=["http", "websocket"])
    @pytest.mark.parametrize("error", MISTAKES, ids=repr)
    async def test_a_mistake_of_the_application_goes_out_as_it_is(self, scope: Scope, error: Exception) -> None:
        for app in (UserContextMiddleware(raising(error)), UserContextMiddleware(never, identify=resolving(error))):
            with pytest.raises(type(error)) as caught:
                await exchange(app, dict(scope))
            assert caught.value is error

    async def test_a_reason_fits_into_a_close_frame(self) -> None:
        long = InvalidContextError("user_id", "é" * 100, "give the id")
        for app in (UserContextMiddleware(raising(long, accept=True)), UserContextMiddleware(raising(long))):
            close = (await exchange(app, websocket_scope()))[-1]
            assert 120 <= len(close["reason"].encode()) <= 123


class TestCauses:
    """The rows brought about as they come about."""

    async def test_no_identity_where_one_is_required(self) -> None:
        app = UserContextMiddleware(never, identify=lambda connection: None, require_identity=True)
        assert status_of(await exchange(app, http_scope())) == 401

    async def test_credentials_that_have_expired(self) -> None:
        over = Principal("alice", datetime.now(UTC) - timedelta(seconds=1))
        app = UserContextMiddleware(never, identify=lambda connection: over)
        assert status_of(await exchange(app, http_scope())) == 401

    @pytest.mark.parametrize("found", ["", "nobody\n", "None", "a" * 257])
    async def test_a_bad_id(self, found: str) -> None:
        app = UserContextMiddleware(never, identify=lambda connection: found)
        assert status_of(await exchange(app, http_scope())) == 400

    async def test_an_id_that_is_no_text_is_the_applications_mistake(self) -> None:
        number: Any = 4711
        with pytest.raises(ConfigurationError, match="int"):
            await exchange(UserContextMiddleware(never, identify=lambda connection: number), http_scope())

    async def test_a_limit(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        manager.create_isolated_context("alice")
        app = UserContextMiddleware(never, manager=manager, identify=lambda connection: "alice")
        assert status_of(await exchange(app, http_scope())) == 429

    async def test_draining(self) -> None:
        app = UserContextMiddleware(never)
        await app.manager.drain(0)
        assert status_of(await exchange(app, http_scope())) == 503

    @pytest.mark.parametrize(
        "use",
        [
            lambda context, number: context.bind(number),
            lambda context, number: context.derive_key("thread", number),
            lambda context, number: context.host.get_context(number),
            lambda context, number: context.host.get_context((context.user_id, "r-1", number)),
        ],
        ids=["bind", "derive_key", "a key", "a key of three"],
    )
    async def test_what_is_no_text_is_the_applications_mistake(
        self, use: Callable[[UserExecutionContext, Any], object]
    ) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            use(current_context(), 7)

        with pytest.raises(InvalidContextError) as raised:
            await exchange(UserContextMiddleware(app, identify=lambda connection: "alice"), http_scope())
        assert raised.value.is_wrong_type

    @pytest.mark.parametrize(("late", "status"), [("bob", 409), ("", 400)])
    async def test_a_late_identity(self, late: str, status: int) -> None:
        async def bind(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().bind(late)

        app = UserContextMiddleware(bind, identify=lambda connection: "alice")
        assert status_of(await exchange(app, http_scope())) == status

    async def test_foreign_and_missing_are_the_same_answer(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        manager.set_context("bob", manager.create_isolated_context("bob"))

        async def take(scope: Scope, receive: Receive, send: Send) -> None:
            manager.get_context(scope["path"])

        app = UserContextMiddleware(take, manager=manager, identify=lambda connection: "alice")
        foreign, missing = [await exchange(app, http_scope(path)) for path in ("bob", "dan")]
        assert foreign == missing
        assert status_of(foreign) == 403


class Held:
    """An app whose handler never ends by itself, and the context that it runs in."""

    def __init__(self, *first: Message) -> None:
        self.first = first
        self.begun: asyncio.Future[UserExecutionContext] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self.first:
            await send(message)
        self.begun.set_result(current_context())
        await asyncio.Event().wait()


BY_REASON: list[tuple[CloseReason, int, int]] = [
    ("expired", 504, 1008),
    ("revoked", 401, 1008),
    ("shutdown", 503, 1013),
]


class TestInMidRequest:
    """The context ends under a handler that waits: the handler is stopped, and the client told."""

    async def interrupted(self, scope: Scope, reason: CloseReason, *first: Message) -> list[Message]:
        held = Held(*first)
        serving = asyncio.create_task(exchange(UserContextMiddleware(held), scope))
        context = await held.begun
        context.close(reason)
        sent = await serving
        assert context.is_open is False
        return sent

    @pytest.mark.parametrize(("reason", "status", "code"), BY_REASON)
    async def test_with_nothing_sent_yet(self, reason: CloseReason, status: int, code: int) -> None:
        assert status_of(await self.interrupted(http_scope(), reason)) == status
        assert status_of(await self.interrupted(websocket_scope(extensions=DENIAL), reason)) == status
        [close] = await self.interrupted(websocket_scope(), reason)
        assert close["code"] == code

    @pytest.mark.parametrize(("reason", "status", "code"), BY_REASON)
    async def test_after_accept(self, reason: CloseReason, status: int, code: int) -> None:
        accept = {"type": "websocket.accept"}
        for first in ([accept], [accept, {"type": "websocket.send", "text": "hello"}]):
            close = (await self.interrupted(websocket_scope(), reason, *first))[-1]
            assert (close["type"], close["code"]) == ("websocket.close", code)

    async def test_nothing_is_added_to_what_was_closed_or_denied(self) -> None:
        for last in ("websocket.close", "websocket.http.response.body"):
            assert len(await self.interrupted(websocket_scope(extensions=DENIAL), "expired", {"type": last})) == 1

    async def test_a_response_that_has_begun_is_broken_off_for_the_server_to_see(self) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": []}
        sent = await self.interrupted(http_scope(), "expired", start)
        assert sent == [start]

    async def test_a_client_that_has_gone_is_no_error(self) -> None:
        async def gone(message: Message) -> None:
            raise OSError("the client has gone")

        async def receive() -> Message:
            return {"type": "websocket.disconnect", "code": 1006}

        refused = UserContextMiddleware(never, identify=resolving(UnauthenticatedError("who are you")))
        await refused(websocket_scope(), receive, gone)
