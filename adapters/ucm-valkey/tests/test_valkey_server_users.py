"""The server itself keeps users apart: even where the adapter were wrong about a key, and for whoever has a login."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import valkey
import valkey.exceptions

from support.valkey import GATE, SECRET, LibraryName, ValkeyServer, async_pool
from ucm_middleware import ConfigurationError, UserContextManager, managed_user_context
from ucm_middleware.testing import FakeClock
from ucm_valkey import CacheUnavailableError, ValkeyCache
from ucm_valkey.exchange import AsyncExchange
from ucm_valkey.keys import UserKeys, keys_of, login_of
from ucm_valkey.library import Fault, pool_of
from ucm_valkey.programs import Login, Step
from ucm_valkey.server_users import ServerUsers

README = Path(__file__).parents[1] / "README.md"


class Site:
    """One application with server users, with the logins that the README says are needed."""

    def __init__(self, library: LibraryName, server: ValkeyServer, **given: Any) -> None:
        for line in README.read_text().splitlines():
            if line.startswith("ACL SETUSER "):
                command, verb, name, *rules = line.replace("PASSWORD", GATE).split()
                server.admin.execute_command(command, verb, name, "reset", *rules)
        self.admin = async_pool(library, server.port, 2, username="cache-admin", password=GATE)
        self.gate = async_pool(library, server.port, 1, username="gate", password=GATE)
        self.cache = ValkeyCache(self.gate, admin=self.admin, **given)
        self.manager = UserContextManager(plugins=[self.cache], secret=SECRET)
        self.server = server

    async def set(self, user_id: str, value: str = "x") -> None:
        async with managed_user_context(self.manager.create_isolated_context(user_id)):
            await self.cache.current().set("a", value)

    async def get(self, user_id: str) -> bytes | None:
        async with managed_user_context(self.manager.create_isolated_context(user_id)):
            return await self.cache.current().get("a")

    def users(self) -> list[str]:
        return sorted(name for name in self.server.admin.acl_users() if name.startswith("ucm_"))

    def keys(self, user_id: str) -> UserKeys:
        return keys_of(self.manager.create_isolated_context(user_id), "cache")

    def login(self, user_id: str) -> Any:
        """A client of the driver's own that logs in as the user of the server."""
        group = self.users()[0].split("_")[1]
        login = login_of(self.keys(user_id), group, self.manager.subkeys("valkey users")[0])
        assert login.password not in repr(login)
        return valkey.Valkey(port=self.server.port, username=login.name, password=login.password)


@pytest.fixture
async def site(library: LibraryName, valkey_server: ValkeyServer) -> AsyncIterator[Site]:
    made = Site(library, valkey_server)
    yield made
    for pool in (made.admin, made.gate):
        await pool.disconnect()


async def test_a_login_reaches_its_own_keys_and_nothing_else(site: Site) -> None:
    await site.set("alice", "hers")
    await site.set("bob", "his")
    hers, his = site.keys("alice").key("a"), site.keys("bob").key("a")
    with site.login("alice") as alice:
        assert alice.get(hers) == b"hers"
        assert alice.mget(hers, site.keys("alice").key("b")) == [b"hers", None]
        steal = "return redis.call('get', KEYS[1])"
        tries: list[tuple[Any, ...]] = [
            ("GET", his), ("MGET", hers, his), ("SET", his, "x"), ("UNLINK", his), ("INCRBY", his, 1), ("PTTL", his),
            ("EVAL", steal, 1, his), ("EVAL", f"return redis.call('get', '{his.decode()}')", 0),
            ("EVAL", "return redis.call('keys', '*')", 0), ("KEYS", "*"), ("SCAN", 0), ("RANDOMKEY",), ("DBSIZE",),
            ("COPY", his, hers), ("RENAME", hers, his), ("SORT", hers, "BY", his), ("DUMP", his), ("OBJECT", "HELP"),
            ("SUBSCRIBE", "c"), ("PSUBSCRIBE", "*"), ("PUBLISH", "c", "m"), ("MONITOR",), ("FLUSHALL",), ("SELECT", 1),
            ("ACL", "LIST"), ("ACL", "WHOAMI"), ("CONFIG", "GET", "*"), ("CLIENT", "LIST"), ("FUNCTION", "LIST"),
            ("WATCH", his), ("MIGRATE", "127.0.0.1", "1", his, "0", "1"), ("INFO",),
        ]  # fmt: skip
        for command in tries:
            with pytest.raises(valkey.ResponseError, match=r"(?i)permission|the user executing the script can't"):
                alice.execute_command(*command)
        with pytest.raises(valkey.exceptions.NoPermissionError), alice.pipeline(transaction=True) as transaction:
            transaction.get(hers).get(his).execute()
    assert await site.get("bob") == b"his"


async def test_a_wrong_key_of_the_adapter_s_own_is_refused_by_the_server(
    site: Site, library: LibraryName, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mistake, planted, with prefixes alone: there it is a leak."""
    alone = async_pool(library, valkey_server.port, 1)
    prefixes = ValkeyCache(alone)
    await site.set("alice", "hers")
    await site.set("bob", "his")
    hers = site.keys("alice").key("a")
    monkeypatch.setattr(UserKeys, "key", lambda *_: hers)
    assert await site.get("alice") == b"hers"
    with pytest.raises(CacheUnavailableError) as caught:
        await site.get("bob")
    assert (caught.value.reason, caught.value.code) == ("refused", "NOPERM")
    async with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("bob")):
        assert await prefixes.current().get("a") == b"hers"
    await alone.disconnect()


async def test_an_idle_connection_is_nobody_s(site: Site) -> None:
    await site.set("alice")
    clients = site.server.admin.client_list()
    assert not [client for client in clients if client["user"].startswith("ucm_")]
    assert [client for client in clients if client["user"] == "gate"]


async def test_two_users_on_one_connection_at_once_are_never_each_other(site: Site) -> None:
    users = [f"user-{number}" for number in range(20)]
    await asyncio.gather(*(site.set(user_id, user_id) for user_id in users))
    for _ in range(5):
        assert await asyncio.gather(*map(site.get, users)) == [user_id.encode() for user_id in users]
    assert len(site.users()) == 20


@pytest.mark.parametrize("lost", ["the users", "one user", "the connections"])
async def test_what_the_server_lost_is_made_again(site: Site, lost: str) -> None:
    await site.set("alice", "1")
    admin = site.server.admin
    if lost == "the users":
        admin.acl_deluser(*site.users())
    elif lost == "one user":
        admin.execute_command("ACL", "SETUSER", site.users()[0], "off")
    else:
        admin.client_kill_filter(_type="normal", skipme=True)
        with contextlib.suppress(CacheUnavailableError):  # where the end of a connection has not arrived yet
            await site.get("alice")
    assert await site.get("alice") == b"1"
    assert len(site.users()) == 1


@pytest.mark.parametrize("rules", ["~* +@all", "~ucm:{* +echo +set", "~ucm:* +echo +unlink", "+echo +eval"])
async def test_the_login_of_the_pool_must_be_able_to_do_nothing(
    library: LibraryName, valkey_server: ValkeyServer, rules: str
) -> None:
    valkey_server.admin.execute_command("ACL", "SETUSER", "mighty", "on", ">mighty", *rules.split())
    pool = async_pool(library, valkey_server.port, 1, username="mighty", password="mighty")
    admin = async_pool(library, valkey_server.port, 1)
    cache = ValkeyCache(pool, admin=admin)
    async with managed_user_context(UserContextManager(secret=SECRET).create_isolated_context("alice")):
        with pytest.raises(ConfigurationError, match="may do more than ECHO"):
            await cache.current().get("a")
    assert valkey_server.admin.acl_users() == ["default", "gate", "mighty"]
    for each in (pool, admin):
        await each.disconnect()


async def test_users_that_nobody_uses_expire(site: Site, valkey_server: ValkeyServer) -> None:
    clock = FakeClock()
    users = site.cache._users = ServerUsers(site.cache._group, 3600, clock)  # pyright: ignore[reportPrivateUsage]
    assert users is not None
    await site.set("alice")
    await site.set("bob")
    alice, bob = (login for user_id in ("alice", "bob") for login in site.users() if site.keys(user_id).tag in login)
    admin = valkey_server.admin
    assert 3500 < admin.ttl(f"ucm:users:{alice}") <= 3600
    admin.acl_setuser("ucm_another0_user", enabled=True, nopass=True)
    admin.delete(f"ucm:users:{alice}")  # its time is over
    assert await site.cache.remove_unused_users() == 1
    assert site.users() == sorted([bob, "ucm_another0_user"])

    # By itself, when another user is made after as long a time; who was in use meanwhile stays.
    clock.advance(1801)
    await site.set("bob")
    admin.expire(f"ucm:users:{bob}", 100)
    clock.advance(1801)
    await site.set("bob")
    assert admin.ttl(f"ucm:users:{bob}") > 3500
    admin.delete(f"ucm:users:{bob}")
    clock.advance(3600)
    await site.set("alice")
    assert site.users() == sorted([alice, "ucm_another0_user"])


async def test_a_revoked_user_is_removed_from_the_server_at_the_next_occasion(site: Site) -> None:
    await site.set("bob")
    async with managed_user_context(site.manager.create_isolated_context("alice")):
        await site.cache.current().set("a", "1")
        (hers,) = (name for name in site.users() if site.keys("alice").tag in name)
        site.manager.revoke("alice", "lost her phone")
    await site.get("bob")
    assert hers not in site.users()
    assert await site.get("alice") == b"1"  # she logged in again
    assert hers in site.users()


async def test_a_removal_that_failed_is_done_later(site: Site) -> None:
    async with managed_user_context(site.manager.create_isolated_context("alice")):
        await site.cache.current().set("a", "1")
        (hers,) = site.users()
        site.manager.revoke("alice", "lost her phone")
    site.server.admin.execute_command("ACL", "SETUSER", "cache-admin", "-acl|deluser")
    with pytest.raises(CacheUnavailableError):
        await site.get("bob")
    assert hers in site.users()
    site.server.admin.execute_command("ACL", "SETUSER", "cache-admin", "+acl|deluser")
    await site.get("bob")
    assert hers not in site.users()


async def test_an_admin_on_another_database_is_refused(library: LibraryName, valkey_server: ValkeyServer) -> None:
    """Its SCAN would find nothing there, and clear() would say that all is gone."""
    gate = async_pool(library, valkey_server.port, 1, username="gate", password=GATE, db=3)
    with pytest.raises(ConfigurationError, match="selects database 3, and admin database 0"):
        ValkeyCache(gate, admin=async_pool(library, valkey_server.port, 1))


async def test_a_connection_that_is_perhaps_not_the_pool_s_own_again_is_out_of_step(site: Site) -> None:
    exchange = AsyncExchange(*pool_of(site.gate, "source", asynchronous=True))
    step = Step((("GET", "a"),), Login("alice", "x"))
    for replies in ([Fault("ERR"), b"word", None, b"OK"], [b"OK", b"word", None, Fault("ERR")]):
        with pytest.raises(CacheUnavailableError):
            exchange._answer(step, b"word", [*replies])  # pyright: ignore[reportPrivateUsage]


async def test_who_logs_out_is_not_removed(site: Site) -> None:
    await site.set("alice")
    await site.get("bob")
    assert len(site.users()) == 2
