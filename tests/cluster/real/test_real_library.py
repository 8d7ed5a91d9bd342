"""Handlers of the websockets library, as tasks in one worker and as threads in another, share their users."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection
from websockets.sync.server import ServerConnection as SyncServerConnection

from support.library import client, ending_of, identify, refusal_of, serving, serving_threads
from support.restarts import Restarts
from support.valkey import SECRET
from support.waiting import PATIENCE
from support.witness import wait_until_free
from ucm_middleware import ClusterPolicy, UserContextManager
from ucm_middleware.websocket.websockets import wrap_handler

PER_USER = 5
CONNECTIONS = 4
"""What of it connections may take."""


async def stays(connection: ServerConnection) -> None:
    await connection.send("ready")
    await connection.wait_closed()


def stays_in_a_thread(connection: SyncServerConnection) -> None:
    connection.send("ready")
    for _ in connection:
        pass


class Two:
    """The managers of two workers, and where each serves."""

    def __init__(self, managers: tuple[UserContextManager, UserContextManager], urls: tuple[str, str]) -> None:
        self.of_tasks, self.of_threads = managers
        self.urls = urls
        self._clients = AsyncExitStack()

    async def connect(self, url: str, user: str) -> ClientConnection:
        connection = await self._clients.enter_async_context(client(url, user))
        assert await connection.recv() == "ready"
        return connection

    async def aclose(self) -> None:
        await self._clients.aclose()


def worker(store: Restarts) -> UserContextManager:
    policy = ClusterPolicy(url=store.url, application="library", lease=3.0)
    return UserContextManager(cluster=policy, secret=SECRET, max_contexts_per_user=PER_USER, guard="open")


@pytest.fixture
async def two(store: Restarts) -> AsyncIterator[Two]:
    managers = worker(store), worker(store)
    clusters = [manager.cluster for manager in managers if manager.cluster is not None]
    for cluster in clusters:
        await cluster.ready()
    of_tasks = wrap_handler(stays, manager=managers[0], identify=identify)
    of_threads = wrap_handler(stays_in_a_thread, manager=managers[1], identify=identify)
    async with serving(of_tasks) as url:
        with serving_threads(of_threads) as url_of_threads:
            both = Two(managers, (url, url_of_threads))
            yield both
            await both.aclose()
    await asyncio.to_thread(wait_until_free, store.server)
    for cluster in clusters:
        await cluster.stop()


async def test_a_limit_holds_over_both(two: Two) -> None:
    for url in two.urls:
        for _ in range(CONNECTIONS // 2):
            await two.connect(url, "alice")
    for url in two.urls:
        assert (await refusal_of(client(url, "alice")))[0] == 429
        await two.connect(url, "bob")


@pytest.mark.parametrize("by", ["of_tasks", "of_threads"])
async def test_a_revocation_closes_what_is_in_both(two: Two, by: str) -> None:
    mine = [await two.connect(url, "alice") for url in two.urls]
    others = [await two.connect(url, "bob") for url in two.urls]
    manager: UserContextManager = getattr(two, by)
    with manager.privileged(reason="the test", users=["alice"]):
        assert await asyncio.to_thread(manager.revoke, "alice", "the test") == 2
    assert [(await ending_of(connection))[0] for connection in mine] == [1008, 1008]
    assert [connection.close_code for connection in others] == [None, None]


@pytest.mark.parametrize("by", ["of_tasks", "of_threads"])
async def test_an_event_reaches_the_user_in_both_and_nobody_else(two: Two, by: str) -> None:
    mine = [await two.connect(url, "alice") for url in two.urls]
    others = [await two.connect(url, "bob") for url in two.urls]
    manager: UserContextManager = getattr(two, by)
    with manager.privileged(reason="the test", users=["alice", "bob"]):
        for text in ("for {}", "the last for {}"):
            for user in ("alice", "bob"):
                await manager.send_event(user, "message", text.format(user))
    for connections, user in ((mine, "alice"), (others, "bob")):
        for connection in connections:
            async with asyncio.timeout(PATIENCE):
                came = [json.loads(await connection.recv())["data"] for _ in range(2)]
            assert came == [f"for {user}", f"the last for {user}"]
