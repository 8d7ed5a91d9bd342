"""A fresh database for each test that asks for one, on one server for all; or one for all of a module's, emptied."""

from collections.abc import Iterator

import pytest

from support.databases import database, postgres_proxy, postgres_server
from support.postgres import Database, PostgresServer

__all__ = ["database", "postgres_proxy", "postgres_server"]


@pytest.fixture(scope="module")
def module_database(postgres_server: PostgresServer) -> Iterator[Database]:
    with postgres_server.database() as fresh:
        yield fresh


@pytest.fixture
def emptied(module_database: Database) -> Database:
    """The module's database, with no notes in it."""
    module_database.execute("truncate notes restart identity")
    return module_database
