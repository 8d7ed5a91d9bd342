"""A real PostgreSQL, and Django on a fresh database of it."""

from collections.abc import Iterator

import pytest

from django_project import on_database
from support.databases import database, postgres_proxy, postgres_server
from support.postgres import Database
from ucm_middleware import UserContextManager

__all__ = ["database", "postgres_proxy", "postgres_server"]


@pytest.fixture
def manager() -> UserContextManager:
    """One that serves nothing: code outside of contexts may open them."""
    return UserContextManager()


@pytest.fixture
def notebook(database: Database) -> Iterator[Database]:
    """The project's database is a fresh one, and this thread has no connection to it yet."""
    with on_database(database.app):
        yield database
