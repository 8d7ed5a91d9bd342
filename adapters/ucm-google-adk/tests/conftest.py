"""Session services on memory, SQLite and PostgreSQL; one server for all tests, and an app of each test's own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from secrets import token_hex

import pytest
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.database_session_service import DatabaseSessionService
from google.adk.sessions.in_memory_session_service import InMemorySessionService

from support.databases import postgres_server
from support.postgres import Database, PostgresServer
from support.tracing import Sdk, installed

__all__ = ["postgres_server"]

SECRET = "a secret of thirty-two bytes or more, for tests"


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("UCM_ENVIRONMENT", "testing")
    config.add_cleanup(patch.undo)


@pytest.fixture
def app() -> str:
    """The name of an ADK app that no other test uses."""
    return f"app_{token_hex(6)}"


@pytest.fixture(scope="session")
def shared_database(postgres_server: PostgresServer) -> Iterator[Database]:
    with postgres_server.database(notes=False) as shared:
        yield shared


@pytest.fixture(scope="session")
def sdk() -> Iterator[Sdk]:
    """Once in the process: ADK's tracer stays with the first that it finds. A module's would be made anew when a worker
    comes back to the module.
    """
    with installed(Sdk()) as sdk:
        yield sdk


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BaseSessionService]:
    """A session service of ADK, bare."""
    if request.param == "memory":
        yield InMemorySessionService()
        return
    if request.param == "sqlite":
        # On several connections, ADK's own transactions lock one another out.
        database = DatabaseSessionService(
            f"sqlite+aiosqlite:///{tmp_path / 'sessions.db'}", pool_size=1, max_overflow=0
        )
    else:
        url = request.getfixturevalue("shared_database").owner.url("postgresql+asyncpg")
        database = DatabaseSessionService(url, pool_size=20)
    try:
        yield database
    finally:
        await database.close()
