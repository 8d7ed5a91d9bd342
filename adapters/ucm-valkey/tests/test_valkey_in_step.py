"""A reply that is on its way when its command is cancelled: the next borrower of the connection must not get it.

The incident of March 2023 (redis-py#2624): the client gave a connection back to the pool when the task that waited for
a reply was cancelled, and the next task took that reply for its own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import redis.asyncio
import valkey.asyncio

from support.tcp_proxy import TcpProxy
from support.valkey import GATE, SECRET, LibraryName, ValkeyServer, async_pool
from ucm_middleware import UserContextManager, managed_user_context
from ucm_valkey import CacheUnavailableError, UserCache, ValkeyCache

Use = Callable[[Any], Coroutine[Any, Any, Any]]


def faulty_connection(library: LibraryName) -> Any:
    """A connection as it was in March 2023: cancelled while it waits for a reply, it stays as it is."""
    current: Any = {"redis": redis.asyncio, "valkey": valkey.asyncio}[library].Connection

    class FaultyConnection(current):  # type: ignore[misc]
        async def read_response(self, *arguments: Any, **options: Any) -> Any:
            return await super().read_response(*arguments, **{**options, "disconnect_on_error": False})

    return FaultyConnection


def client_of(library: LibraryName, pool: Any) -> Any:
    return redis.asyncio.Redis.from_pool(pool) if library == "redis" else valkey.asyncio.Valkey.from_pool(pool)


@pytest.fixture(params=["as it is", "as in March 2023"])
async def pool(request: pytest.FixtureRequest, library: LibraryName, valkey_proxy: TcpProxy) -> AsyncIterator[Any]:
    """One connection for all, through the proxy."""
    given = {} if request.param == "as it is" else {"connection_class": faulty_connection(library)}
    made = async_pool(library, valkey_proxy.port, 1, **given)
    yield made
    valkey_proxy.release("replies")
    await made.disconnect()


async def cancelled_while_the_reply_is_held(
    proxy: TcpProxy, use: Coroutine[Any, Any, Any], cancellations: int = 1, turns: int = 0
) -> None:
    proxy.hold("replies")
    task = asyncio.create_task(use)
    await proxy.until_held("replies")
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(cancellations):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


async def answered_after_the_release(proxy: TcpProxy, use: Coroutine[Any, Any, Any]) -> Any:
    """What `use` comes to when it has asked before the late reply arrives."""
    task = asyncio.create_task(use)
    for _ in range(20):  # it asks, if it has a connection to ask on
        await asyncio.sleep(0)
    proxy.release("replies")
    return await task


async def get(client: Any) -> Any:
    return await client.get("alice's")


async def pipeline(client: Any) -> Any:
    return await client.pipeline(transaction=False).get("alice's").get("alice's").execute()


async def transaction(client: Any) -> Any:
    async with client.pipeline(transaction=True) as commands:
        return await commands.get("alice's").get("alice's").execute()


@pytest.mark.parametrize("use", [get, pipeline, transaction])
async def test_a_bare_client_is_safe_today_and_was_not(
    use: Use, library: LibraryName, pool: Any, valkey_proxy: TcpProxy, valkey_server: ValkeyServer
) -> None:
    valkey_server.admin.mset({"alice's": b"for alice", "bob's": b"for bob"})
    client = client_of(library, pool)
    await client.ping()
    # Some turns later, when it waits for the reply and sends no more: Python 3.11 swallows a cancellation before.
    await cancelled_while_the_reply_is_held(valkey_proxy, use(client), turns=20)
    reply = await answered_after_the_release(valkey_proxy, client.get("bob's"))
    if pool.connection_class.__name__ != "FaultyConnection":
        assert reply == b"for bob"
    else:
        # Of a transaction, the reply to its MULTI comes first.
        assert reply == (b"OK" if use is transaction else b"for alice")


class Both:
    """Caches of alice and bob, on a pool of one connection."""

    def __init__(self, cache: ValkeyCache) -> None:
        self.cache = cache
        self.manager = UserContextManager(plugins=[cache], secret=SECRET)

    async def as_user(self, user_id: str, use: Use) -> Any:
        async with managed_user_context(self.manager.create_isolated_context(user_id)):
            return await use(self.cache.current())

    async def fill(self) -> None:
        for user_id in ("alice", "bob"):
            values = {name: f"{user_id} {name}" for name in "ab"}
            await self.as_user(user_id, partial(UserCache.set_many, values=values))

    async def get(self, user_id: str) -> Any:
        return await self.as_user(user_id, lambda cache: cache.get("a"))


USES: dict[str, Use] = {
    "get": lambda cache: cache.get("a"),
    "get_many": lambda cache: cache.get_many("a", "b"),
    "set": lambda cache: cache.set("x", b"1"),
    "set_many": lambda cache: cache.set_many({"x": b"1", "y": b"2"}),
    "delete": lambda cache: cache.delete("x", "y"),
    "delete_if": lambda cache: cache.delete_if("x", b"2"),
    "incr": lambda cache: cache.incr("n"),
    "expire": lambda cache: cache.expire("a"),
    "ttl": lambda cache: cache.ttl("a"),
    "scan": lambda cache: anext(cache.scan()),
}


@pytest.fixture(params=["prefixes", "server users"])
async def both(
    request: pytest.FixtureRequest, library: LibraryName, pool: Any, valkey_server: ValkeyServer
) -> AsyncIterator[Both]:
    if request.param == "prefixes":
        made = Both(ValkeyCache(pool))
        await made.fill()
        yield made
        return
    pool.connection_kwargs.update(username="gate", password=GATE)
    admin = async_pool(library, valkey_server.port, 1)
    made = Both(ValkeyCache(pool, admin=admin))
    await made.fill()
    yield made
    await admin.disconnect()


@pytest.mark.parametrize("cancellations", [1, 2])
@pytest.mark.parametrize("name", USES)
async def test_through_the_adapter_nobody_gets_another_s_reply(
    name: str, cancellations: int, both: Both, valkey_proxy: TcpProxy
) -> None:
    if name == "scan" and both.cache._users is not None:  # pyright: ignore[reportPrivateUsage]
        name = "get"  # it goes by the admin's pool
    await cancelled_while_the_reply_is_held(valkey_proxy, both.as_user("alice", USES[name]), cancellations)
    assert await answered_after_the_release(valkey_proxy, both.get("bob")) == b"bob a"
    assert await both.get("alice") == b"alice a"


async def test_wherever_it_is_cancelled_the_connection_comes_back_in_step(both: Both, valkey_proxy: TcpProxy) -> None:
    """At every turn of the loop, until the operation ends before it is cancelled."""
    valkey_proxy.delay("replies", 0.001)
    ended = 0
    for turns in range(2000):
        task = asyncio.create_task(both.as_user("alice", USES["get_many"]))
        for _ in range(turns % 500):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == {"a": b"alice a", "b": b"alice b"}
            ended += 1
        assert await both.get("bob") == b"bob a", turns
        if ended > 3:
            break
    assert ended


async def test_a_deadline_is_a_cancellation(both: Both, valkey_proxy: TcpProxy) -> None:
    valkey_proxy.hold("replies")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await both.get("alice")
    assert await answered_after_the_release(valkey_proxy, both.get("bob")) == b"bob a"


async def test_a_server_that_does_not_answer_in_time(library: LibraryName, valkey_proxy: TcpProxy) -> None:
    pool = async_pool(library, valkey_proxy.port, 1, socket_timeout=0.1)
    both = Both(ValkeyCache(pool))
    await both.fill()
    valkey_proxy.hold("replies")
    with pytest.raises(CacheUnavailableError) as caught:
        await both.get("alice")
    assert caught.value.reason == "timeout"
    valkey_proxy.release("replies")
    assert await both.get("bob") == b"bob a"
    await pool.disconnect()


async def test_a_connection_that_others_left_out_of_step_answers_nobody(
    library: LibraryName, valkey_proxy: TcpProxy
) -> None:
    """The adapter looks for itself: what it reads must follow on the word that it sent."""
    pool = async_pool(library, valkey_proxy.port, 1)
    both = Both(ValkeyCache(pool))
    await both.fill()
    arguments = () if library == "redis" else ("get",)
    connection = await pool.get_connection(*arguments)
    valkey_proxy.hold("replies")
    await connection.send_command("ECHO", "alice a")
    await pool.release(connection)

    async def ask() -> Any:
        with pytest.raises(CacheUnavailableError) as caught:
            await both.get("bob")
        return caught.value.reason

    assert await answered_after_the_release(valkey_proxy, ask()) == "out of step"
    assert await both.get("bob") == b"bob a"
    await pool.disconnect()


async def test_users_share_the_one_connection_in_turn(both: Both) -> None:
    async def use(cache: UserCache) -> Any:
        for _ in range(20):
            await cache.incr("n")
        return await cache.get("a")

    users = ["alice", "bob"] * 5
    assert await asyncio.gather(*(both.as_user(user_id, use) for user_id in users)) == [
        f"{user_id} a".encode() for user_id in users
    ]
    assert await both.as_user("alice", lambda cache: cache.get("n")) == b"100"
