"""One PostgreSQL and one database for all tests, emptied between them; others where a test changes more."""

from collections.abc import Iterator

import pytest

from support.databases import database as own_database
from support.databases import postgres_proxy, postgres_server
from support.postgres import Database, PostgresServer

__all__ = ["own_database", "postgres_proxy", "postgres_server"]


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
