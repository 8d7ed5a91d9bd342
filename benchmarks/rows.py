"""What is compared: the apps, and what is put around them."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ucm_middleware import ContextFirewall, UserContextManager, UserContextMiddleware
from ucm_middleware.audit import MemoryLedger
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

Wrap = Callable[[ASGIApp], ASGIApp]

_SCOPE: ContextVar[Scope] = ContextVar("scope")

_START: Final[dict[str, Any]] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"5")],
}
_BODY: Final[dict[str, Any]] = {"type": "http.response.body", "body": b"hello"}
_ACCEPT: Final[dict[str, Any]] = {"type": "websocket.accept", "subprotocol": None, "headers": []}


async def raw_app(scope: Scope, receive: Receive, send: Send) -> None:
    """The least an app can do, so that what is around it stands out: two sends, or an echo until the disconnect."""
    if scope["type"] == "http":
        await send(_START.copy())
        await send(_BODY.copy())
        return
    await receive()
    await send(_ACCEPT.copy())
    while (message := await receive())["type"] != "websocket.disconnect":
        echo: Message = {"type": "websocket.send", "text": message["text"]}
        await send(echo)


async def _json(request: Request) -> Response:
    return JSONResponse({"id": 7, "name": "benchmark", "ok": True})


def json_app(wrap: Wrap) -> ASGIApp:
    """A Starlette app with one JSON endpoint at ``/`` and the row as its middleware."""
    app = Starlette(routes=[Route("/", _json)])
    app.add_middleware(wrap)
    return app


class Floor:
    """Sets and resets one ContextVar: the least that a middleware with a context of any kind does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self.app(scope, receive, send)
            return
        token = _SCOPE.set(scope)
        try:
            await self.app(scope, receive, send)
        finally:
            _SCOPE.reset(token)


def _bare(app: ASGIApp) -> ASGIApp:
    return app


def _as_it_comes(app: ASGIApp) -> ASGIApp:
    return UserContextMiddleware(app)


def _everything_on(app: ASGIApp) -> ASGIApp:
    def identify(connection: HTTPConnection) -> str:
        return "alice"

    manager = UserContextManager(max_contexts_per_user=10, max_contexts=100_000, ttl=300, ledger=MemoryLedger())
    return UserContextMiddleware(app, manager=manager, identify=identify)


BARE: Final = "bare"
FLOOR: Final = "floor"
EVERYTHING: Final = "everything on"

ROWS: Final[dict[str, Wrap]] = {
    BARE: _bare,
    FLOOR: Floor,
    "firewall": ContextFirewall,
    "as it comes": _as_it_comes,
    EVERYTHING: _everything_on,
}
"""``everything on``: a resolver, a time to live, limits and the ledger."""
