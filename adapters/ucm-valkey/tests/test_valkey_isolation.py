"""Nobody reads or writes another's, with prefixes and with server users, on one to three connections."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import Context
from typing import Any

import pytest

from support.valkey import GATE, SECRET, LibraryName, ValkeyServer, async_pool
from ucm_middleware import (
    ContextClosedError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_valkey import UserCache, ValkeyCache

# What patterns, separators and quotes are made of, and pairs that only differ where texts are put together.
STRANGE_USERS = [
    "*",
    "?",
    "[a]",
    "\\",
    "a:b",
    "a",
    "a:",
    "{a}",
    "}:",
    "~*",
    "'",
    '"',
    "ucm",
    "é",
    "alice",
    "Alice",
    "alice:x",
]


@pytest.fixture(params=[1, 2, 3])
def connections(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(params=["prefixes", "server users"])
async def cache(
    request: pytest.FixtureRequest, valkey_server: ValkeyServer, library: LibraryName, connections: int
) -> AsyncIterator[ValkeyCache]:
    with_users = request.param == "server users"
    admin = async_pool(library, valkey_server.port, connections)
    gate = async_pool(library, valkey_server.port, connections, username="gate", password=GATE)
    yield ValkeyCache(gate, admin=admin) if with_users else ValkeyCache(admin)
    for pool in (admin, gate):
        await pool.disconnect()


@pytest.fixture
def manager(cache: ValkeyCache) -> UserContextManager:
    return UserContextManager(plugins=[cache], secret=SECRET)


async def busy(cache: UserCache, user_id: str) -> None:
    """Write, read, count, look around; everything that is found must be the user's own."""
    mine = user_id.encode()
    for number in range(4):
        name = f"note {number}"
        assert await cache.set(name, user_id)
        assert await cache.get(name) == mine
        assert await cache.incr("count") == number + 1
    found = await cache.get_many(*(f"note {number}" for number in range(10)))
    assert set(found.values()) == {mine}
    assert sorted([name async for name in cache.scan()]) == ["count", *(f"note {number}" for number in range(4))]
    assert not await cache.delete_if("note 0", user_id + "'")
    assert await cache.delete("note 3") == 1


async def test_fifty_users_at_once(manager: UserContextManager, cache: ValkeyCache) -> None:
    users = [*STRANGE_USERS, *(f"user-{number}" for number in range(50 - len(STRANGE_USERS)))]

    async def serve(user_id: str) -> None:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            await busy(cache.current(), user_id)

    await asyncio.gather(*map(serve, users))

    async def clear(user_id: str) -> int:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            return await cache.current().clear()

    assert [await clear(user_id) for user_id in users] == [4] * 50


async def test_nothing_of_a_user_is_on_the_server_in_clear(
    manager: UserContextManager, cache: ValkeyCache, valkey_server: ValkeyServer
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice@example.com")):
        await cache.current().set("color", b"blue")
    admin = valkey_server.admin
    seen = repr([admin.keys("*"), admin.acl_list(), admin.acl_users(), admin.slowlog_get(), admin.acl_log()])
    assert "color" in seen
    assert "alice" not in seen
    assert "example" not in seen
    assert SECRET not in seen


@pytest.mark.parametrize("user_id", ["a\nb", "a\r\nGET x", "\x00", " a", "a" * 257, ""])
def test_ids_that_could_be_more_than_a_name_come_nowhere_near(user_id: str, manager: UserContextManager) -> None:
    with pytest.raises(InvalidContextError):
        manager.create_isolated_context(user_id)


async def test_a_handle_works_for_its_user_and_until_its_context_closes(
    cache: ValkeyCache,
) -> None:
    ledger = RecordingLedger()
    manager = UserContextManager(plugins=[cache], secret=SECRET, ledger=ledger)
    alice, bob = map(manager.create_isolated_context, ("alice", "bob"))

    async def bob_tries(hers: UserCache, names: AsyncGenerator[str]) -> None:
        async with managed_user_context(bob):
            calls: list[Any] = [hers.get, hers.delete, hers.ttl, hers.incr, hers.expire]
            for call in calls:
                with pytest.raises(CrossUserAccessError):
                    await call("a")
            with pytest.raises(CrossUserAccessError):
                await anext(names)
            with pytest.raises(CrossUserAccessError):
                await hers.clear()
            assert await cache.current().get("a") is None

    async with managed_user_context(alice):
        hers = cache.current()
        await hers.set("a", b"1")
        names = hers.scan()
        await asyncio.create_task(bob_tries(hers, names), context=Context())
        assert await anext(names) == "a"
        await names.aclose()
        pending = hers.get("a")
    with pytest.raises(ContextClosedError):
        await hers.get("a")
    with pytest.raises(ContextClosedError):
        await pending
    denied = ledger.select("denied")
    assert {record.user_id for record in denied} == {"bob"}
    assert len(denied) >= 7
    assert "handle cache" in str(denied[0].data)


async def test_a_user_finds_their_entries_again_after_the_logout_and_nobody_else_does(
    manager: UserContextManager, cache: ValkeyCache
) -> None:
    async def ask(user_id: str) -> bytes | None:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            return await cache.current().get("a")

    alice = manager.create_isolated_context("alice")
    async with managed_user_context(alice):
        hers = cache.current()
        await hers.set("a", b"hers")
    assert await ask("bob") is None
    assert await ask("alice") == b"hers"

    async with managed_user_context(manager.create_isolated_context("alice")):
        hers = cache.current()
        assert await hers.get("a") == b"hers"
        manager.revoke("alice", "lost her phone")
        with pytest.raises(ContextClosedError):
            await hers.get("a")
    assert await ask("bob") is None
    assert await ask("alice") == b"hers"


async def test_children_and_agents_have_their_user_s_cache(manager: UserContextManager, cache: ValkeyCache) -> None:
    context = manager.create_isolated_context("alice")
    async with managed_user_context(context):
        await cache.current().set("a", b"1")
        async with managed_user_context(context.create_child_context("search")):
            child = cache.current()
            assert await child.get("a") == b"1"
        with pytest.raises(ContextClosedError):
            await child.get("a")
        assert await cache.current().get("a") == b"1"


class EveryKeyIsAPattern:
    """Derives keys that would break out of any prefix or rule that they were put into as they are."""

    UCM_HOOK_API = 1

    @hookimpl
    def ucm_derive_key(self, context: UserExecutionContext) -> str:
        return {"alice": "*", "bob": "* ~* +@all"}.get(context.user_id, "*:")


async def test_keys_that_a_plugin_derives_break_out_of_nothing(cache: ValkeyCache) -> None:
    manager = UserContextManager(plugins=[cache, EveryKeyIsAPattern()], secret=SECRET)
    for user_id in ("alice", "bob", "carol"):
        async with managed_user_context(manager.create_isolated_context(user_id)):
            await busy(cache.current(), user_id)


async def test_another_secret_and_another_namespace_have_other_keys(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    pool = async_pool(library, valkey_server.port)
    caches = [ValkeyCache(pool), ValkeyCache(pool, namespace="prices"), ValkeyCache(pool)]
    for cache, secret in zip(caches, (SECRET, SECRET, SECRET[::-1]), strict=True):
        manager = UserContextManager(plugins=[cache], secret=secret)
        async with managed_user_context(manager.create_isolated_context("alice")):
            assert await cache.current().set("a", b"1", only_if_missing=True)
    await pool.disconnect()
