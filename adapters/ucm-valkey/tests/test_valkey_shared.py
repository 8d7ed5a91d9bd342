"""What two users share whose clients are on one pool: nothing, unless somebody gives them the same."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from typing import Any

import pytest

from support.sharing import report_of_two, report_of_two_threads, shown
from support.valkey import GATE, SECRET, LibraryName, ValkeyServer, async_pool, sync_pool
from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_valkey import SyncValkeyCache, ValkeyCache

CLIENTS = {"redis": "Redis", "valkey": "Valkey"}


@pytest.fixture
async def pool(valkey_server: ValkeyServer, library: LibraryName) -> AsyncIterator[Any]:
    pool = async_pool(library, valkey_server.port, 8)
    yield pool
    await pool.disconnect()


@pytest.fixture
async def gate(valkey_server: ValkeyServer, library: LibraryName) -> AsyncIterator[Any]:
    pool = async_pool(library, valkey_server.port, 4, username="gate", password=GATE)
    yield pool
    await pool.disconnect()


@pytest.mark.parametrize("with_users", [False, True])
async def test_caches_and_clients_on_one_pool_share_nothing(
    pool: Any, gate: Any, library: LibraryName, with_users: bool
) -> None:
    cache = ValkeyCache(gate, admin=pool) if with_users else ValkeyCache(pool)
    client_of = getattr(import_module(f"{library}.asyncio"), CLIENTS[library])

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        keep = context.agent_context
        keep["cache"] = mine = cache.current()
        await mine.set("name", context.user_id)
        keep["names"] = names = mine.scan()
        assert await anext(names) == "name"
        keep["client"] = client = client_of(connection_pool=pool)
        await client.set(context.user_id, "own")
        keep["pipeline"] = client.pipeline().set(context.user_id, "own")
        keep["messages"] = messages = client.pubsub()
        await messages.subscribe("news")
        async with client.lock(f"lock of {context.user_id}"):
            keep["connection"] = messages.connection
            yield
        await messages.aclose()
        await names.aclose()

    assert shown(await report_of_two(UserContextManager(plugins=[cache], secret=SECRET), work)) == []


async def test_a_client_that_both_have_is_found(pool: Any, library: LibraryName) -> None:
    cache = ValkeyCache(pool)
    client = getattr(import_module(f"{library}.asyncio"), CLIENTS[library])(connection_pool=pool)

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        context.agent_context["client"] = client
        yield

    found = shown(await report_of_two(UserContextManager(plugins=[cache], secret=SECRET), work))
    assert found == [f"alice.agent_context['client'] is bob.agent_context['client'] ({CLIENTS[library]})"]


async def test_a_cache_that_both_have_is_found(pool: Any) -> None:
    cache = ValkeyCache(pool)
    first: list[Any] = []

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        first.append(cache.current())
        context.agent_context["cache"] = first[0]
        yield

    found = shown(await report_of_two(UserContextManager(plugins=[cache], secret=SECRET), work))
    assert any("is bob.agent_context['cache']<target> (UserCache)" in one for one in found), found


def test_in_threads(valkey_server: ValkeyServer, library: LibraryName) -> None:
    pool = sync_pool(library, valkey_server.port, 4)
    cache = SyncValkeyCache(pool)
    client_of = getattr(import_module(library), CLIENTS[library])

    @contextmanager
    def work(context: UserExecutionContext) -> Generator[None]:
        keep = context.agent_context
        keep["cache"] = cache.current()
        keep["cache"].set("name", context.user_id)
        keep["messages"] = messages = client_of(connection_pool=pool).pubsub()
        messages.subscribe("news")
        keep["connection"] = messages.connection
        yield
        messages.close()

    assert shown(report_of_two_threads(UserContextManager(plugins=[cache], secret=SECRET), work)) == []
    pool.disconnect()
