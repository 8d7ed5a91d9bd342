"""Servers and clients of the websockets library, over loopback, and what tests of them have in common."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection as SyncClientConnection
from websockets.sync.client import connect as sync_connect
from websockets.sync.server import serve as sync_serve

from support.servers import HOST
from support.waiting import PATIENCE
from ucm_middleware import LedgerUnavailableError
from ucm_middleware.audit import MemoryLedger, Row
from ucm_middleware.secret import SecretRing
from ucm_middleware.websocket.websockets.asyncio_server import AsyncioHandler
from ucm_middleware.websocket.websockets.sync_server import SyncHandler


def identify(connection: HTTPConnection) -> str | None:
    """What the tests' applications believe: a header. No application should."""
    return connection.headers.get("x-user")


@asynccontextmanager
async def serving(handler: AsyncioHandler, **options: Any) -> AsyncIterator[str]:
    """An asyncio server of the library, by its URL."""
    options = {"create_connection": handler.create_connection, **options}
    async with serve(handler, HOST, 0, **options) as server:
        yield f"ws://{HOST}:{next(iter(server.sockets)).getsockname()[1]}"


def client(url: str, user: str | None = None, **options: Any) -> connect:
    headers = {**options.pop("headers", {}), **({} if user is None else {"x-user": user})}
    return connect(url, additional_headers=headers, proxy=None, **options)


@contextmanager
def serving_threads(handler: SyncHandler, **options: Any) -> Iterator[str]:
    """A sync server of the library, by its URL, accepting in a thread of its own."""
    options = {"create_connection": handler.create_connection, **options}
    with sync_serve(handler, HOST, 0, **options) as server:
        accepting = threading.Thread(target=server.serve_forever)
        accepting.start()
        try:
            yield f"ws://{HOST}:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            accepting.join(PATIENCE)


def sync_client(url: str, user: str | None = None, **options: Any) -> SyncClientConnection:
    headers = {**options.pop("headers", {}), **({} if user is None else {"x-user": user})}
    connection: SyncClientConnection = sync_connect(url, additional_headers=headers, proxy=None, **options)
    return connection


async def refusal_of(connecting: connect) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer to a handshake that is refused."""
    with pytest.raises(InvalidStatus) as refused:
        await connecting
    return _told(refused.value)


def sync_refusal_of(url: str, user: str | None = None, **options: Any) -> tuple[int, dict[str, str], Any]:
    with pytest.raises(InvalidStatus) as refused:
        sync_client(url, user, **options)
    return _told(refused.value)


def _told(refused: InvalidStatus) -> tuple[int, dict[str, str], Any]:
    response = refused.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    is_json = headers.get("content-type") == "application/json"
    return response.status_code, headers, json.loads(response.body) if is_json else bytes(response.body)


async def ending_of(connection: ClientConnection) -> tuple[int, str]:
    """The close code and reason that the server gives, whatever it sends before."""
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(PATIENCE):
            while True:
                await connection.recv()
    return connection.close_code or 0, connection.close_reason or ""


def sync_ending_of(connection: SyncClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed):
        while True:
            connection.recv(PATIENCE)
    return connection.close_code or 0, connection.close_reason or ""


async def eventually(condition: Any, what: str) -> None:
    """``wait_until`` for a test whose event loop must go on."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - any condition, not only an event of ours
            await asyncio.sleep(0.005)
    assert condition(), what


def handshake(url: str, user: str, *more: str, path: str = "/", version: str = "13") -> bytes:
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {url.removeprefix('ws://')}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        f"Sec-WebSocket-Version: {version}",
        f"x-user: {user}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def raw(url: str, data: bytes) -> Generator[socket.socket]:
    """A bare socket to a server, on which this has been sent."""
    host, _, port = url.removeprefix("ws://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as bare:
        bare.sendall(data)
        yield bare


def read_head(bare: socket.socket) -> bytes:
    """The head of the server's answer to a handshake."""
    head = b""
    while b"\r\n\r\n" not in head and (more := bare.recv(1)):
        head += more
    return head


BAD_FRAMES = {
    "not masked": b"\x81\x02hi",
    "reserved bits": b"\xf1\x80\x00\x00\x00\x00",
    "unknown opcode": b"\x83\x80\x00\x00\x00\x00",
    "fragmented ping": b"\x09\x80\x00\x00\x00\x00",
    "continuation of nothing": b"\x80\x80\x00\x00\x00\x00",
    "bad UTF-8": b"\x81\x81\x00\x00\x00\x00\xff",
    "length of 2**63 bytes": b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
    "noise": bytes(range(128, 256)),
}


class Diary(MemoryLedger):
    """A durable ledger that says in which order what happened, and can refuse, from some record on."""

    lag = 0
    has_room = True

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.problem: str | None = None
        self.fails_at: str | None = None

    def start(self, secrets: SecretRing) -> None:
        """There is nothing to open."""

    def append(self, row: Row) -> None:
        super().append(row)
        self.story.append(row[0])
        if row[0] == self.fails_at:
            self.problem = "the disk is full"

    def durable(self) -> Awaitable[None]:
        return self._durable()

    async def _durable(self) -> None:
        await asyncio.sleep(0)
        self.flush(0)

    def flush(self, timeout: float) -> None:
        if self.problem is not None:
            raise LedgerUnavailableError(self.problem)
        self.story.append("durable")
