"""What is found out before anything is served: a clear error for what can never work, another for what may pass."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from support.old_server import start_old_server
from support.processes import HOST, held_port
from support.valkey import ADMIN, LibraryName, ValkeyServer, start_valkey
from support.valkey_cluster import PREFIX, SEAL, order, session_at, slot, start_cluster, url_of, user
from support.waiting import wait_until
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError
from ucm_valkey.cluster import open_store

WRONG = "wrong-password"
SECRETS = (WRONG, ADMIN, SEAL)


@pytest.fixture(autouse=True)
def nothing_private_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert_is_public(caplog.text)


def assert_is_public(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text]


def assert_tells_nothing(caught: pytest.ExceptionInfo[Exception]) -> None:
    error = caught.value
    assert_is_public(f"{error!r} {error} {error.__dict__}")
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    for frame in caught.traceback:  # what a reporter of errors would show of the adapter's own variables
        if "ucm_valkey" in str(frame.path):
            shown = repr({name: value for name, value in frame.frame.f_locals.items() if name != "url"})
            assert not [secret for secret in (WRONG, ADMIN) if secret in shown], frame


async def attempt(url: str, *, timeout: float = 10.0) -> None:
    session = session_at(url, timeout=timeout)
    try:
        await session.inspect()
    finally:
        await session.aclose()


async def unfit(url: str, *words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await attempt(url)
    assert_tells_nothing(caught)
    for word in words:
        assert word in str(caught.value)


async def unavailable(url: str, reason: str, *words: str, timeout: float = 10.0) -> None:
    with pytest.raises(ClusterUnavailableError) as caught:
        await attempt(url, timeout=timeout)
    assert_tells_nothing(caught)
    assert caught.value.reason == reason
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (f"memcached://:{WRONG}@host", "scheme"),
        (f"valkey://:{WRONG}@", "host"),
        (f"valkey://:{WRONG}@host:70000", "port"),
        (f"valkey://:{WRONG}@host:0", "port"),
        (f"valkey://:{WRONG}@host:{WRONG}", "port"),
        (f"valkey://:{WRONG}@host/{WRONG}", "database"),
        (f"valkey://:{WRONG}@host/-1", "database"),
        (f"valkey://:{WRONG}@host/1?cluster=true", "databases"),
        (f"valkey://:{WRONG}@host?cluster=yes", "cluster must be true or false"),
        (f"valkey://:{WRONG}@host?{WRONG}=1", "not known"),
        (f"valkey://:{WRONG}@host?ssl_ca_certs=/etc/passwd", "valkeys://"),
        (f"valkeys://:{WRONG}@host?ssl_ca_certs=/{WRONG}", "ssl_ca_certs names no file"),
        (f"valkeys://:{WRONG}@host?ssl_certfile={__file__}", "belong together"),
        (f"valkey://:{WRONG}#1@host", "port"),
        (f"valkey://host/#{WRONG}", "%23"),
        (f"valkey://[{WRONG}", "read"),
    ],
)
def test_a_url_that_cannot_be_taken_is_told_and_not_shown(url: str, word: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store(url, prefix=PREFIX, seals=[SEAL], timeout=1)
    assert word in str(caught.value)
    assert_is_public(str(caught.value) + repr(caught.value))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_a_password_with_special_characters(valkey_server: ValkeyServer, library: LibraryName) -> None:
    valkey_server.admin.execute_command("ACL", "SETUSER", "sh@p", "on", ">a:b/c@d#%", "~*", "&*", "+@all")
    await attempt(url_of(library, valkey_server.port, login="sh%40p:a%3Ab%2Fc%40d%23%25"))
    await attempt(url_of(library, valkey_server.port, rest="/3"))


async def test_a_login_that_is_not_taken(valkey_server: ValkeyServer, library: LibraryName) -> None:
    for login in (f":{WRONG}", f"nobody:{WRONG}"):
        await unfit(url_of(library, valkey_server.port, login=login), "neither the url's user nor its password")
    bare = f"{library}://{HOST}:{valkey_server.port}"
    await unfit(bare, "wants a password")
    # Once it serves, it is an outage: somebody may have changed the password and change it back.
    session = session_at(url_of(library, valkey_server.port, login=f":{WRONG}"))
    with pytest.raises(ClusterUnavailableError) as caught:
        await session.acquire(order(slot(user(), 1)))
    assert (caught.value.reason, caught.value.is_unknown) == ("login", False)
    assert_tells_nothing(caught)
    await session.aclose()


async def test_nothing_listens(library: LibraryName) -> None:
    with held_port() as port:
        await unavailable(url_of(library, port), "down", "nothing listens", str(port))


async def test_a_name_without_an_address(library: LibraryName) -> None:
    await unavailable(f"{library}://:{WRONG}@nowhere.invalid:6379", "down", "no address of nowhere.invalid")


Reply = Callable[[bytes], bytes]


@asynccontextmanager
async def talking(reply: Reply) -> AsyncIterator[int]:
    """A server that answers whatever comes with something; on nothing it is silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(reply(data))
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    server.close()


async def test_something_else_on_that_port(library: LibraryName) -> None:
    async with talking(lambda _: b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as port:
        await unfit(url_of(library, port), "no Valkey or Redis", str(port))


async def test_a_server_that_says_nothing(library: LibraryName) -> None:
    async with talking(lambda _: b"") as port:
        await unavailable(url_of(library, port), "timeout", str(port), timeout=0.2)


@pytest.mark.parametrize("version", ["6.2.14", "5.0", ""])
async def test_a_server_that_is_too_old(library: LibraryName, version: str) -> None:
    with start_old_server(version) as port:
        await unfit(url_of(library, port), "oldest", version)


async def test_a_server_without_scripts(library: LibraryName) -> None:
    with start_valkey("--rename-command", "EVAL", "") as server:
        await unfit(url_of(library, server.port), "runs no scripts")


async def test_a_server_that_evicts(valkey_server: ValkeyServer, library: LibraryName) -> None:
    try:
        valkey_server.admin.config_set("maxmemory", "1gb")
        await attempt(url_of(library, valkey_server.port))
        valkey_server.admin.config_set("maxmemory-policy", "volatile-lru")
        await unfit(url_of(library, valkey_server.port), "volatile-lru", "noeviction")
        valkey_server.admin.config_set("maxmemory", "0")
        await attempt(url_of(library, valkey_server.port))
    finally:
        valkey_server.admin.config_set("maxmemory", "0")
        valkey_server.admin.config_set("maxmemory-policy", "noeviction")


async def test_a_replica(valkey_server: ValkeyServer, library: LibraryName) -> None:
    options = ("--replicaof", HOST, str(valkey_server.port), "--masterauth", ADMIN)
    with start_valkey(*options) as replica:
        wait_until(lambda: replica.admin.info("replication")["master_link_status"] == "up", "the replica follows")
        await unavailable(url_of(library, replica.port), "read-only", "primary")


async def test_a_database_that_is_not_there(valkey_server: ValkeyServer, library: LibraryName) -> None:
    await unfit(url_of(library, valkey_server.port, rest="/999"), "no database 999")


async def test_a_cluster_that_is_none_and_one_that_is_not_called_so(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    await unfit(url_of(library, valkey_server.port, rest="?cluster=true"), "is not in a cluster")
    with start_cluster(nodes=1) as (node,):
        await unfit(url_of(library, node.port), "?cluster=true")
        await attempt(url_of(library, node.port, rest="?cluster=true"))
        await unfit(url_of(library, node.port, login=f":{WRONG}", rest="?cluster=true"), "neither")
    with held_port() as port:
        await unavailable(url_of(library, port, rest="?cluster=true"), "down", "nothing listens")


async def test_another_application_on_the_same_prefix(valkey_server: ValkeyServer, library: LibraryName) -> None:
    url = url_of(library, valkey_server.port)

    async def inspect(*seals: str) -> int:
        session = session_at(url, seals=seals)
        try:
            return await session.inspect()
        finally:
            await session.aclose()

    assert await inspect("first") == 0
    assert await inspect("first") == 0
    assert await inspect("second", "first") == 1  # the secret is being rotated
    for seals in (("second",), ("third", "second")):
        with pytest.raises(ConfigurationError, match="two applications") as caught:
            await inspect(*seals)
        assert "first" not in str(caught.value)
        session = session_at(url, seals=seals)
        with pytest.raises(ConfigurationError, match="two applications"):
            await session.enroll(15)
        await session.aclose()
    key = f"{PREFIX}app"
    assert 86_000 < valkey_server.admin.ttl(key) <= 86_400
    valkey_server.admin.expire(key, 100)
    session = session_at(url, seals=("first",))
    await session.enroll(15)
    assert valkey_server.admin.ttl(key) > 86_000
    await session.aclose()


async def test_what_an_inspection_leaves(valkey_server: ValkeyServer, library: LibraryName) -> None:
    await attempt(url_of(library, valkey_server.port))
    wait_until(lambda: valkey_server.admin.keys("*") == [f"{PREFIX}app".encode()], "only the seal is left")


async def test_sessions_and_stores_show_no_password(valkey_server: ValkeyServer, library: LibraryName) -> None:
    store = open_store(url_of(library, valkey_server.port), prefix=PREFIX, seals=[SEAL], timeout=1)
    session = store.session()
    await session.inspect()
    shown = [repr(store), str(store), repr(session), repr(vars(store)), repr(vars(session))]
    assert_is_public(" ".join(shown).replace(SEAL, ""))
    await session.aclose()
