"""One PostgreSQL and one database for all tests, emptied between them; others where a test changes more."""

from collections.abc import Iterator

import pytest

from support.databases import database as own_database
from support.databases import postgres_proxy, postgres_server
from support.postgres import Database, PostgresServer

__all__ = ["own_database", "postgres_proxy", "postgres_server"]


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("UCM_ENVIRONMENT", "testing")  # in which a secret is made where none is given
    config.add_cleanup(patch.undo)


@pytest.fixture(scope="session")
def shared_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """Made once."""
    with postgres_server.database() as shared:
        yield shared


@pytest.fixture
def database(shared_database: Database) -> Database:
    """The same for all, with the table ``notes`` empty."""
    shared_database.execute("truncate notes restart identity", as_=shared_database.superuser)
    return shared_database
