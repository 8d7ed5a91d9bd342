"""Handlers of the websockets library, of both of its servers: what they send, whole and in fragments."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_asyncio
from websockets.sync.client import connect as connect_sync
from websockets.sync.server import ServerConnection as SyncConnection
from websockets.sync.server import serve as serve_sync

from support.contexts import MakeManager, running_as
from ucm_middleware import EVERYONE, EgressPolicy, UserContextManager
from ucm_middleware.websocket.websockets import wrap_handler

pytestmark = pytest.mark.security

TOKEN = "9f3c1a7be85d20c46fa17d39b2e80c54"
HALVES = (TOKEN[:9], TOKEN[9:])


def identify(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-user")


@pytest.fixture(params=[False, True], ids=["report", "block"])
def manager(request: pytest.FixtureRequest, make_manager: MakeManager) -> UserContextManager:
    manager = make_manager(egress=EgressPolicy(block=request.param))
    with running_as(manager, "alice") as alice:
        alice.protect(TOKEN)
    return manager


def receivers(manager: UserContextManager) -> list[object]:
    with manager.privileged(reason="test", users=EVERYONE):
        return [record["receiver"] for record in manager.get_system_trail() if record["event"] == "egress"]


async def test_asyncio(manager: UserContextManager) -> None:
    async def fragments() -> AsyncIterator[str]:
        for half in HALVES:
            yield half

    async def handle(connection: ServerConnection) -> None:
        await connection.send(TOKEN)
        await connection.send(HALVES)
        await connection.send(fragments())
        await connection.send(str(await connection.recv()))
        await connection.send(TOKEN)
        await connection.send("end")

    handler = wrap_handler(handle, manager=manager, identify=identify)
    async with (
        serve_asyncio(handler, "127.0.0.1", 0, create_connection=handler.create_connection) as server,
        connect(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", additional_headers={"x-user": "bob"}) as client,
    ):
        await client.send(TOKEN)
        got = [message async for message in client]
    assert manager.egress is not None
    assert got == ([TOKEN] * (2 if manager.egress.policy.block else 5)) + ["end"]
    assert receivers(manager) == ["bob"] * 3


@contextmanager
def serving(handler: Any) -> Iterator[int]:
    with serve_sync(handler, "127.0.0.1", 0, create_connection=handler.create_connection) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join()


def test_sync(manager: UserContextManager) -> None:
    def handle(connection: SyncConnection) -> None:
        connection.send(TOKEN)
        connection.send(HALVES)
        connection.send(str(connection.recv()))
        connection.send(TOKEN)
        connection.send("end")

    handler = wrap_handler(handle, manager=manager, identify=identify)
    with (
        serving(handler) as port,
        connect_sync(f"ws://127.0.0.1:{port}", additional_headers={"x-user": "bob"}) as client,
    ):
        client.send(TOKEN)
        got = list(client)
    assert manager.egress is not None
    assert got == ([TOKEN] * (2 if manager.egress.policy.block else 4)) + ["end"]
    assert receivers(manager) == ["bob"] * 2
