"""Runs an ASGI app in this process, without a server and without the test's own ContextVars."""

import json as jsonlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from ucm_middleware.testing.conversation import Conversation
from ucm_middleware.testing.exchange import Exchange, Response
from ucm_middleware.testing.websocket import WebSocket
from ucm_middleware.types import ASGIApp, Scope


class Drive:
    """Sends requests to an app, each in a task with an empty ``contextvars.Context``, on the test's own event loop.

    Starlette's TestClient and httpx's ASGITransport start the app in a copy of the test's Context: what the test has
    set, the app sees, which no server would show it. ``async with Drive(app) as drive:`` runs the app's lifespan around
    the block; without the block there is none.

    What this cannot show is isolation itself: here each request gets an empty Context from the drive, whether or not
    the app sees to it. That one request of a connection sees nothing of another is proved on a real server only: see
    ``start_server``.

    ``headers`` are sent with every request. It is for asyncio; a request costs one task.
    """

    def __init__(self, app: ASGIApp, *, headers: Mapping[str, str] | None = None) -> None:
        self.app = app
        self.headers = dict(headers or {})
        self.state: dict[str, Any] = {}
        self._lifespan: Conversation | None = None

    async def __aenter__(self) -> Self:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._lifespan = Conversation(self.app, scope).begin({"type": "lifespan.startup"})
        await self._step(self._lifespan, "startup")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lifespan, self._lifespan = self._lifespan, None
        if lifespan is not None:
            lifespan.begin({"type": "lifespan.shutdown"})
            await self._step(lifespan, "shutdown")
            await lifespan.ended()

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        json: Any = None,
    ) -> Response:
        """One whole request: the response, once the app has ended, its background tasks included.

        ``json`` is a body in the place of ``body``. Raises what the app raised, as ``Exchange.response`` says.
        """
        if json is not None:
            body = jsonlib.dumps(json).encode()
            headers = {"content-type": "application/json", **(headers or {})}
        exchange = self.start(method, path, headers=headers)
        exchange.feed(body)
        return await exchange.response()

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> Response:
        """``request("GET", path)``."""
        return await self.request("GET", path, headers=headers)

    async def post(
        self, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", json: Any = None
    ) -> Response:
        """``request("POST", path)``."""
        return await self.request("POST", path, headers=headers, body=body, json=json)

    def start(self, method: str, path: str, *, headers: Mapping[str, str] | None = None) -> Exchange:
        """Begin a request, for a test that streams, disconnects or cancels. Its body comes from ``Exchange.feed``."""
        return Exchange(self.app, self._scope("http", path, headers, method=method.upper(), http_version="1.1"))

    def websocket(
        self, path: str, *, headers: Mapping[str, str] | None = None, subprotocols: Sequence[str] = ()
    ) -> WebSocket:
        """A connection, to be used in an ``async with`` block. The app may answer with a denial response."""
        more: dict[str, Any] = {"subprotocols": list(subprotocols), "extensions": {"websocket.http.response": {}}}
        return WebSocket(self.app, self._scope("websocket", path, headers, **more))

    def _scope(self, kind: str, path: str, headers: Mapping[str, str] | None, **more: Any) -> Scope:
        path, _, query = path.partition("?")
        given = {"host": "test"} | {
            name.lower(): value for name, value in (*self.headers.items(), *(headers or {}).items())
        }
        return {
            "type": kind,
            # As uvicorn: over HTTP a client that has gone is announced by receive(), over WebSocket by send() as well.
            "asgi": {"version": "3.0", "spec_version": "2.3" if kind == "http" else "2.4"},
            "scheme": "http" if kind == "http" else "ws",
            "path": unquote(path),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("test", 80),
            "state": dict(self.state),
            **more,
        }

    async def _step(self, lifespan: Conversation, step: str) -> None:
        message = await lifespan.next()
        if message is None:
            await lifespan.ended()
            raise AssertionError(f"the app ended its lifespan without an answer to {step}")
        if message["type"] != f"lifespan.{step}.complete":
            raise AssertionError(f"the app answered {step} with {message['type']}: {message.get('message', '')}")
