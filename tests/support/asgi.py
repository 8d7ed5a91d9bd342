"""One exchange with an ASGI app, message by message, without a server."""

import asyncio
from collections.abc import Iterable
from typing import Any

from ucm_middleware.types import ASGIApp, Message, Scope

DENIAL: dict[str, dict[str, object]] = {"websocket.http.response": {}}
"""The extension with which a server offers to answer a handshake with an HTTP response."""


def http_scope(path: str = "/", headers: Iterable[tuple[str, str]] = (), **more: Any) -> Scope:
    """What a server makes of a GET request."""
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    return {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": encoded, **more}


def websocket_scope(path: str = "/", headers: Iterable[tuple[str, str]] = (), **more: Any) -> Scope:
    """What a server makes of a WebSocket handshake."""
    return {**http_scope(path, headers, **more), "type": "websocket"}


async def exchange(app: ASGIApp, scope: Scope, *messages: Message) -> list[Message]:
    """Run the app to its end and return what it sent.

    ``messages`` is what it can receive; without any, an empty body or the handshake. After them nothing comes any
    more: an app that waits for more fails after a second.
    """
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    first: Message = {"type": "http.request"} if scope["type"] == "http" else {"type": "websocket.connect"}
    for message in messages or (first,):
        inbox.put_nowait(message)
    sent: list[Message] = []

    async def receive() -> Message:
        async with asyncio.timeout(1):
            return await inbox.get()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def status_of(sent: list[Message]) -> int:
    """The status of the one HTTP response, or denial response, that was sent."""
    [status] = [message["status"] for message in sent if message["type"].endswith("response.start")]
    assert isinstance(status, int)
    return status
