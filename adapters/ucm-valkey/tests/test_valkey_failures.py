"""A server that is down, full, a replica, or takes no login: a clear error each time, without a password or a value."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import redis
import valkey

from support.valkey import ADMIN, GATE, SECRET, LibraryName, ValkeyServer, async_pool, start_valkey, sync_pool
from support.waiting import PATIENCE, wait_until
from ucm_middleware import UserContextError, UserContextManager, managed_user_context
from ucm_valkey import CacheUnavailableError, SyncValkeyCache, ValkeyCache

VALUE = "value-of-alice"
WRONG = "wrong-password"


@pytest.fixture(scope="module")
def full_server() -> Iterator[ValkeyServer]:
    """One that has no memory left."""
    with start_valkey("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        yield server


@pytest.fixture(scope="module")
def replica(valkey_process: ValkeyServer) -> Iterator[ValkeyServer]:
    """One that takes no writes."""
    with start_valkey("--replicaof", "127.0.0.1", str(valkey_process.port), "--masterauth", ADMIN) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_private_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert_is_public(caplog.text)


def assert_is_public(text: str) -> None:
    for private in (VALUE, WRONG, ADMIN, GATE, SECRET, "alice"):
        assert private not in text


async def attempt(cache: ValkeyCache, how: str) -> CacheUnavailableError:
    async with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("alice")):
        mine = cache.current()
        calls = {
            "get": lambda: mine.get("name"),
            "set": lambda: mine.set("name", VALUE),
            "set_many": lambda: mine.set_many({"name": VALUE, "other": VALUE}),
            "incr": lambda: mine.incr("name"),
            "scan": lambda: anext(mine.scan()),
        }
        with pytest.raises(CacheUnavailableError) as caught:
            await calls[how]()  # type: ignore[no-untyped-call]
        assert_is_public(repr(cache))
    error = caught.value
    assert isinstance(error, UserContextError)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    assert_is_public(f"{error!r} {error}")
    for frame in caught.traceback:  # what a reporter of errors would show of the adapter's own variables
        if "ucm_valkey" in str(frame.path):
            shown = repr(frame.frame.f_locals)
            assert not [secret for secret in (WRONG, ADMIN, GATE, SECRET) if secret in shown]
    return error


@pytest.fixture
async def pools(library: LibraryName) -> AsyncIterator[Any]:
    made: list[Any] = []

    def make(port: int, **given: Any) -> Any:
        made.append(async_pool(library, port, 1, **given))
        return made[-1]

    yield make
    for pool in made:
        await pool.disconnect()


@pytest.mark.parametrize("how", ["get", "set", "incr", "scan"])
async def test_a_server_that_is_down(how: str, pools: Any) -> None:
    with start_valkey() as server:
        cache = ValkeyCache(pools(server.port))
        async with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("alice")):
            await cache.current().set("name", VALUE)
    assert (await attempt(cache, how)).reason == "down"
    assert (await attempt(cache, how)).reason == "down"
    assert (await attempt(ValkeyCache(pools(server.port)), how)).reason == "down"


async def test_a_connection_that_was_closed_while_it_was_idle_is_made_anew(
    library: LibraryName, valkey_server: ValkeyServer, pools: Any
) -> None:
    pool = pools(valkey_server.port)
    cache = ValkeyCache(pool)
    async with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("alice")):
        for _ in range(3):
            await cache.current().set("name", VALUE)
            connection = await pool.get_connection(*(() if library == "redis" else ("get",)))
            await pool.release(connection)
            valkey_server.admin.client_kill_filter(_type="normal", skipme=True)
            looks: Any = connection.can_read if library == "redis" else connection.can_read_destructive
            async with asyncio.timeout(PATIENCE):
                with contextlib.suppress(ConnectionError, redis.ConnectionError, valkey.ConnectionError):
                    while not await looks():  # noqa: ASYNC110 - its end arrives, and tells nobody
                        await asyncio.sleep(0.001)


def has_ended(connection: Any) -> bool:
    try:
        return bool(connection.can_read())
    except (redis.ConnectionError, valkey.ConnectionError):
        return True


def test_the_same_for_blocking_code(library: LibraryName, valkey_server: ValkeyServer) -> None:
    pool = sync_pool(library, valkey_server.port, 1)
    cache = SyncValkeyCache(pool)
    with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("alice")):
        for _ in range(3):
            cache.current().set("name", VALUE)
            connection = pool.get_connection(*(() if library == "redis" else ("get",)))
            pool.release(connection)
            valkey_server.admin.client_kill_filter(_type="normal", skipme=True)
            wait_until(partial(has_ended, connection), "the end of the connection has arrived")
    pool.disconnect()


async def test_a_server_s_message_is_not_repeated(pools: Any) -> None:
    """It has the value in it: unknown command 'SET', with args beginning with ..."""
    with start_valkey("--rename-command", "SET", "") as server:
        error = await attempt(ValkeyCache(pools(server.port)), "set")
        assert (error.reason, error.code) == ("error", "ERR")


async def test_a_server_that_goes_down_under_a_server_user(pools: Any) -> None:
    with start_valkey() as server:
        gate = pools(server.port, username="gate", password=GATE)
        cache = ValkeyCache(gate, admin=pools(server.port))
        manager = UserContextManager(secret=SECRET)
        async with managed_user_context(manager.create_isolated_context("alice")):
            await cache.current().set("name", VALUE)
    assert (await attempt(cache, "get")).reason == "down"


@pytest.mark.parametrize("how", ["set", "set_many", "incr"])
async def test_a_server_without_memory(how: str, full_server: ValkeyServer, pools: Any) -> None:
    error = await attempt(ValkeyCache(pools(full_server.port)), how)
    assert (error.reason, error.code) == ("memory", "OOM")


@pytest.mark.parametrize("how", ["set", "set_many", "incr"])
async def test_a_replica(how: str, replica: ValkeyServer, pools: Any) -> None:
    error = await attempt(ValkeyCache(pools(replica.port)), how)
    assert (error.reason, error.code) == ("read-only", "READONLY")


@pytest.mark.parametrize("given", [{"password": WRONG}, {"username": "nobody"}, {"password": None}])
async def test_a_login_that_is_not_taken(given: dict[str, Any], valkey_server: ValkeyServer, pools: Any) -> None:
    assert (await attempt(ValkeyCache(pools(valkey_server.port, **given)), "get")).reason == "login"


async def test_a_login_that_may_not_do_it(valkey_server: ValkeyServer, pools: Any) -> None:
    error = await attempt(ValkeyCache(pools(valkey_server.port, username="gate", password=GATE)), "get")
    assert (error.reason, error.code) == ("refused", "NOPERM")


@pytest.mark.parametrize("given", [{"password": WRONG}, {"username": "gate", "password": GATE}])
async def test_an_admin_that_cannot_make_users(given: dict[str, Any], valkey_server: ValkeyServer, pools: Any) -> None:
    gate = pools(valkey_server.port, username="gate", password=GATE)
    error = await attempt(ValkeyCache(gate, admin=pools(valkey_server.port, **given)), "set")
    assert error.reason in ("login", "refused")
    assert valkey_server.admin.keys("*") == []


async def test_server_users_on_a_full_server_and_on_a_replica(
    full_server: ValkeyServer, replica: ValkeyServer, pools: Any
) -> None:
    for server, reason in ((full_server, "memory"), (replica, "read-only")):
        gate = pools(server.port, username="gate", password=GATE)
        assert (await attempt(ValkeyCache(gate, admin=pools(server.port)), "set")).reason == reason


async def test_a_pool_with_none_to_spare(library: LibraryName, valkey_server: ValkeyServer, pools: Any) -> None:
    pool = pools(valkey_server.port, timeout=0.05)
    taken = await pool.get_connection(*(() if library == "redis" else ("get",)))
    assert (await attempt(ValkeyCache(pool), "get")).reason == "down"
    await pool.release(taken)


def test_blocking_code_is_told_the_same(
    library: LibraryName, valkey_server: ValkeyServer, full_server: ValkeyServer, replica: ValkeyServer
) -> None:
    cases = [
        (sync_pool(library, 1), "down"),
        (sync_pool(library, full_server.port), "memory"),
        (sync_pool(library, replica.port), "read-only"),
        (sync_pool(library, valkey_server.port, password=WRONG), "login"),
        (sync_pool(library, valkey_server.port, username="gate", password=GATE), "refused"),
    ]
    for pool, reason in cases:
        context = UserContextManager(secret=SECRET).create_isolated_context("alice")
        with managed_user_context(context), pytest.raises(CacheUnavailableError) as caught:
            SyncValkeyCache(pool).current().set("name", VALUE)
        assert caught.value.reason == reason
        assert_is_public(str(caught.value))
        pool.disconnect()
