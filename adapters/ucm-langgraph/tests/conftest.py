"""Savers and stores of every kind that the tests run on: in memory, on SQLite and on one PostgreSQL."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from langgraph_stores import SAVERS, STORES, AnySaver, AnyStore, empty, open_saver, open_store, set_up
from support.databases import postgres_server
from support.postgres import Database, PostgresServer
from ucm_middleware.testing import RecordingLedger

__all__ = ["postgres_server"]


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("UCM_ENVIRONMENT", "testing")  # in which a secret is made where none is given
    patch.setenv("LANGSMITH_TRACING", "false")
    config.add_cleanup(patch.undo)


@pytest.fixture(scope="session")
def shared_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """Made once, with LangGraph's tables."""
    with postgres_server.database() as shared:
        set_up(shared)
        yield shared


@pytest.fixture(params=SAVERS)
async def saver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnySaver]:
    """A saver with nothing in it."""
    async with open_saver(request.param, tmp_path, lambda: _emptied(request)) as opened:
        yield opened


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyStore]:
    """A store with nothing in it."""
    async with open_store(request.param, tmp_path, lambda: _emptied(request)) as opened:
        yield opened


def _emptied(request: pytest.FixtureRequest) -> Database:
    shared: Database = request.getfixturevalue("shared_database")
    empty(shared)
    return shared


@pytest.fixture
def ledger() -> RecordingLedger:
    """What is put on record."""
    return RecordingLedger()
