"""The operations of a user's cache, on both clients, asynchronous and blocking, with prefixes and with server users."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from support.valkey import ADMIN, GATE, SECRET, LibraryName, ValkeyServer, async_pool, sync_pool
from ucm_middleware import (
    ConfigurationError,
    ContextNotFoundError,
    InvalidContextError,
    UserContextManager,
    managed_user_context,
)
from ucm_valkey import SyncValkeyCache, UserCache, ValkeyCache


@pytest.fixture(params=["prefixes", "server users"])
async def cache(
    request: pytest.FixtureRequest, valkey_server: ValkeyServer, library: LibraryName
) -> AsyncIterator[ValkeyCache]:
    port = valkey_server.port
    if request.param == "prefixes":
        pools = [async_pool(library, port)]
        made = ValkeyCache(pools[0], default_ttl=60, longest_ttl=120, largest_value=1000)
    else:
        pools = [async_pool(library, port, username="gate", password=GATE), async_pool(library, port)]
        made = ValkeyCache(pools[0], admin=pools[1], default_ttl=60, longest_ttl=120, largest_value=1000)
    yield made
    for pool in pools:
        await pool.disconnect()


@pytest.fixture
async def alice(cache: ValkeyCache) -> AsyncIterator[UserCache]:
    manager = UserContextManager(plugins=[cache], secret=SECRET)
    async with managed_user_context(manager.create_isolated_context("alice")):
        yield cache.current()


async def test_values_are_kept_and_forgotten(alice: UserCache) -> None:
    assert await alice.get("color") is None
    assert await alice.set("color", "blä")
    assert await alice.get("color") == "blä".encode()
    assert await alice.set("size", b"\x00\xff")
    assert await alice.get_many("color", "size", "weight") == {"color": "blä".encode(), "size": b"\x00\xff"}
    assert await alice.delete("color", "weight") == 1
    assert await alice.get("color") is None
    assert await alice.get_many() == {}
    assert await alice.delete() == 0


async def test_a_value_can_be_kept_only_where_there_is_none(alice: UserCache) -> None:
    assert await alice.set("lock", b"mine", only_if_missing=True)
    assert not await alice.set("lock", b"other", only_if_missing=True)
    assert not await alice.delete_if("lock", b"other")
    assert await alice.get("lock") == b"mine"
    assert await alice.delete_if("lock", b"mine")
    assert await alice.get("lock") is None


async def test_every_entry_has_a_time_to_live(alice: UserCache) -> None:
    await alice.set("a", b"1")
    await alice.set("b", b"1", ttl=100)
    await alice.set_many({"c": b"1", "d": b"2"})
    await alice.incr("e")
    lives = {name: await alice.ttl(name) for name in "abcdef"}
    assert {
        name: left is not None and 50 < left <= 60 for name, left in lives.items() if name in "acde"
    } == dict.fromkeys("acde", True)
    assert lives["b"] is not None
    assert 90 < lives["b"] <= 100
    assert lives["f"] is None
    assert await alice.expire("a", 120)
    assert (await alice.ttl("a") or 0) > 110
    assert not await alice.expire("f")


async def test_numbers_are_added_up_and_live_from_their_beginning(alice: UserCache) -> None:
    assert [await alice.incr("n"), await alice.incr("n", -2), await alice.incr("n", 5, ttl=120)] == [1, -1, 4]
    assert (await alice.ttl("n") or 0) <= 60
    await alice.set("text", b"hello")
    with pytest.raises(InvalidContextError, match="no whole number"):
        await alice.incr("text")
    assert await alice.get("text") == b"hello"
    for by in (1.5, 2**63, True):
        with pytest.raises(InvalidContextError, match="by: "):
            await alice.incr("n", by)  # type: ignore[arg-type]


async def test_names_are_found_by_how_they_begin_and_patterns_mean_nothing(alice: UserCache) -> None:
    names = ["a*", "ab", "a[b]", "a?", "a\\", "*", "a^", "ü"]
    await alice.set_many(dict.fromkeys(names, b"1"))
    assert sorted([name async for name in alice.scan()]) == sorted(names)
    for name in names:
        expected = [other for other in names if other.startswith(name)]
        assert sorted([found async for found in alice.scan(name)]) == sorted(expected), name
    assert await alice.clear() == len(names)
    assert [name async for name in alice.scan()] == []


async def test_scan_and_clear_go_through_many_pages(alice: UserCache) -> None:
    await alice.set_many({f"n{number}": b"" for number in range(2500)})
    assert len([name async for name in alice.scan("n")]) == 2500
    assert await alice.clear() == 2500


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("", b"1"), "name: is empty"),
        (("n" * 1025, b"1"), "name: is empty or longer"),
        ((7, b"1"), "name: is not text but int"),
        (("\ud800", b"1"), "name: is not valid"),
        (("n", 7), "value: is neither"),
        (("n", b"1" * 1001), "value: is larger"),
    ],
)
async def test_what_breaks_a_rule_is_refused(alice: UserCache, arguments: tuple[Any, Any], rule: str) -> None:
    with pytest.raises(InvalidContextError, match=rule):
        await alice.set(*arguments)


@pytest.mark.parametrize("ttl", [0, -1, 121, float("inf"), float("nan"), "60", timedelta(seconds=1)])
async def test_times_to_live_are_bounded(alice: UserCache, ttl: Any) -> None:
    with pytest.raises(InvalidContextError, match="ttl: "):
        await alice.set("n", b"1", ttl=ttl)


async def test_outside_of_a_context_there_is_no_cache(cache: ValkeyCache) -> None:
    with pytest.raises(ContextNotFoundError):
        cache.current()


@pytest.mark.parametrize("mode", ["prefixes", "server users"])
def test_blocking_code_has_the_same(valkey_server: ValkeyServer, library: LibraryName, mode: str) -> None:
    port = valkey_server.port
    admin = sync_pool(library, port)
    gate = sync_pool(library, port, username="gate", password=GATE)
    cache = SyncValkeyCache(admin) if mode == "prefixes" else SyncValkeyCache(gate, admin=admin)
    manager = UserContextManager(plugins=[cache], secret=SECRET)
    with managed_user_context(manager.create_isolated_context("alice")):
        alice = cache.current()
        assert alice.set("a", "1")
        assert not alice.set("a", "2", only_if_missing=True)
        alice.set_many({"b": "2", "c": "3"})
        assert alice.get("a") == b"1"
        assert alice.get_many("a", "b", "x") == {"a": b"1", "b": b"2"}
        assert alice.incr("a") == 2
        assert alice.expire("a", 10)
        assert 0 < (alice.ttl("a") or 0) <= 10
        assert sorted(alice.scan()) == ["a", "b", "c"]
        assert not alice.delete_if("b", "3")
        assert alice.delete("a") == 1
        assert alice.clear() == 2
    assert cache.remove_unused_users() == 0
    for pool in (admin, gate):
        pool.disconnect()


def test_only_pools_and_clients_of_the_right_kind_are_taken(library: LibraryName) -> None:
    asynchronous, blocking = async_pool(library, 1), sync_pool(library, 1)
    for source in ("redis://localhost", None, blocking, object()):
        with pytest.raises(ConfigurationError, match="source is a"):
            ValkeyCache(source)
    with pytest.raises(ConfigurationError, match="source is a"):
        SyncValkeyCache(asynchronous)
    with pytest.raises(ConfigurationError, match="admin is a"):
        ValkeyCache(asynchronous, admin=blocking)
    for namespace in ("", "Über", "a" * 33, "a:b"):
        with pytest.raises(ConfigurationError, match="namespace must"):
            ValkeyCache(asynchronous, namespace=namespace)
    wrong: list[dict[str, Any]] = [
        {"default_ttl": 0},
        {"longest_ttl": 1},
        {"largest_value": 0},
        {"default_ttl": float("nan")},
        {"longest_ttl": float("inf")},
        {"longest_ttl": 1e16},  # more than a server can count
    ]
    for limits in wrong:
        with pytest.raises(ConfigurationError, match="must be"):
            ValkeyCache(asynchronous, **limits)
    for keep in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="keep_users"):
            ValkeyCache(async_pool(library, 1, username="gate", password=GATE), admin=asynchronous, keep_users=keep)
    with pytest.raises(ConfigurationError, match="must have a username"):
        ValkeyCache(asynchronous, admin=asynchronous)


def test_the_client_of_all_users_is_no_user_s_session(library: LibraryName) -> None:
    pool, admin, other = (async_pool(library, 1, username="gate") for _ in range(3))
    manager = UserContextManager(plugins=[ValkeyCache(pool, admin=admin)], secret=SECRET)
    context = manager.create_isolated_context("alice")
    for session in (pool, admin):
        with pytest.raises(ConfigurationError, match="all users share"):
            context.bind_session(session)
    assert context.bind_session(other) is other


async def test_a_client_is_as_good_as_its_pool(valkey_server: ValkeyServer) -> None:
    from redis.asyncio import Redis

    client = Redis.from_url(f"redis://:{ADMIN}@127.0.0.1:{valkey_server.port}", decode_responses=True)
    cache = ValkeyCache(client)
    async with managed_user_context(
        UserContextManager(plugins=[cache], secret=SECRET).create_isolated_context("alice")
    ):
        await cache.current().set("a", "1")
        assert await cache.current().get("a") == b"1"
    await client.aclose()
