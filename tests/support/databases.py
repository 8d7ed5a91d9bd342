"""Fixtures of databases. A conftest makes them available by importing them by name."""

from collections.abc import Iterator

import pytest

from .postgres import Database, PostgresServer, start_postgres
from .tcp_proxy import TcpProxy, start_tcp_proxy


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The one PostgreSQL of the session."""
    with start_postgres() as server:
        yield server


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A fresh database with the table `notes`."""
    with postgres_server.database() as fresh:
        yield fresh


@pytest.fixture
def postgres_proxy(postgres_server: PostgresServer) -> Iterator[TcpProxy]:
    """A proxy in front of the server: connect with `database.app.at(postgres_proxy.port)`."""
    login = postgres_server.superuser
    with start_tcp_proxy(login.host, login.port) as proxy:
        yield proxy
