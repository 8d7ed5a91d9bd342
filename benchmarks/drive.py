"""Drives an ASGI app in-process, as a server would, without a server."""

import asyncio
from typing import Final

from ucm_middleware.types import ASGIApp, Message, Scope

HEADERS: Final = (
    (b"host", b"benchmark.local:8000"),
    (b"user-agent", b"benchmark/1.0"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"authorization", b"Bearer 0123456789abcdef0123456789abcdef"),
    (b"x-tenant-id", b"tenant-17"),
)


def http_scope() -> Scope:
    """A GET of ``/``, with a state as servers give it after a lifespan."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": list(HEADERS),
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "extensions": {},
        "state": {},
    }


def websocket_scope() -> Scope:
    """A handshake at ``/``."""
    scope: Scope = {**http_scope(), "type": "websocket", "scheme": "ws", "subprotocols": []}
    del scope["method"]
    return scope


class Exchange:
    """One request's ``receive`` and ``send``: no body, then a client that stays and says nothing."""

    __slots__ = ("asked", "status")

    def __init__(self) -> None:
        self.asked = False
        self.status = 0

    async def receive(self) -> Message:
        if self.asked:
            await asyncio.get_running_loop().create_future()
        self.asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]


class Conversation:
    """One connection's ``receive`` and ``send``: connect, some texts, disconnect."""

    __slots__ = ("echoes", "left", "opened")

    def __init__(self, texts: int) -> None:
        self.left = texts
        self.opened = False
        self.echoes = 0

    async def receive(self) -> Message:
        if not self.opened:
            self.opened = True
            return {"type": "websocket.connect"}
        if self.left:
            self.left -= 1
            return {"type": "websocket.receive", "text": "ping"}
        return {"type": "websocket.disconnect", "code": 1000, "reason": ""}

    async def send(self, message: Message) -> None:
        if message["type"] == "websocket.send":
            self.echoes += 1


async def requests(app: ASGIApp, count: int) -> None:
    """So many requests one after another in one task. Raises AssertionError for an answer other than 200."""
    template = http_scope()
    for _ in range(count):
        exchange = Exchange()
        await app({**template, "state": {}}, exchange.receive, exchange.send)
        assert exchange.status == 200, exchange.status


async def connections(app: ASGIApp, count: int, texts: int) -> None:
    """So many connections one after another in one task. Raises AssertionError when a text was not echoed."""
    template = websocket_scope()
    for _ in range(count):
        conversation = Conversation(texts)
        await app({**template, "state": {}}, conversation.receive, conversation.send)
        assert conversation.echoes == texts, conversation.echoes
