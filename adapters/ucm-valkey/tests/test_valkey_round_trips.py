"""How often an operation goes to the server and back: once, whoever used the connection before."""

from collections.abc import AsyncIterator

import pytest

from support.tcp_proxy import TcpProxy
from support.valkey import GATE, SECRET, LibraryName, ValkeyServer, async_pool
from ucm_middleware import UserContextManager, managed_user_context
from ucm_valkey import UserCache, ValkeyCache


@pytest.fixture(params=["prefixes", "server users"])
async def cache(
    request: pytest.FixtureRequest, valkey_server: ValkeyServer, valkey_proxy: TcpProxy, library: LibraryName
) -> AsyncIterator[ValkeyCache]:
    """Its pool goes through the proxy; the admin's does not."""
    given = {} if request.param == "prefixes" else {"username": "gate", "password": GATE}
    pool = async_pool(library, valkey_proxy.port, 1, **given)
    admin = async_pool(library, valkey_server.port, 1)
    yield ValkeyCache(pool) if request.param == "prefixes" else ValkeyCache(pool, admin=admin)
    for each in (pool, admin):
        await each.disconnect()


async def test_an_operation_is_one_round_trip(cache: ValkeyCache, valkey_proxy: TcpProxy) -> None:
    manager = UserContextManager(plugins=[cache], secret=SECRET)

    async def trips(user_id: str) -> list[int]:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            mine: UserCache = cache.current()
            await mine.get("a")  # connects, and makes the server's user
            counted = []
            for operation in (
                mine.get("a"),
                mine.set("a", b"1"),
                mine.set_many({"b": b"1", "c": b"2"}),
                mine.get_many("a", "b", "c"),
                mine.incr("n"),
                mine.ttl("n"),
                mine.delete_if("a", b"1"),
                mine.delete("b", "c"),
            ):
                before = valkey_proxy.round_trips
                await operation
                counted.append(valkey_proxy.round_trips - before)
            return counted

    for user_id in ("alice", "bob", "alice"):
        assert await trips(user_id) == [1] * 8
