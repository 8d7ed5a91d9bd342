"""Blocks that end while something is under way on psycopg's connection: none hangs, and nothing is lost in silence."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from postgres_drivers import BODIES, INSERT, open_pool
from support.contexts import running_as
from support.postgres import Database
from ucm_middleware import UserContextManager
from ucm_middleware.testing import RecordingLedger
from ucm_postgres import psycopg as ucm_psycopg
from ucm_postgres import psycopg_threads as ucm_threads

ROWS = "select generate_series(1, 100000)"

refused = pytest.raises(psycopg.ProgrammingError, match="something is still under way where its block ends")


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ucm_psycopg, ucm_threads):
        monkeypatch.setattr(module, "GRACE", 0.2)


def phases(ledger: RecordingLedger) -> list[object]:
    return [dict(record.data)["phase"] for record in ledger.select("transaction")]


async def rows_left(connection: Any) -> Any:
    rows = connection.cursor().stream(ROWS)
    await anext(rows)
    return rows


async def notifications_left(connection: Any) -> Any:
    await connection.execute("select pg_notify('news', 'x')")
    connection._notifies_backlog.append("x")
    notifications = connection.notifies()
    await anext(notifications)
    return notifications


async def pipeline_left(connection: Any) -> Any:
    pipeline = connection.pipeline()
    await pipeline.__aenter__()
    await connection.execute(INSERT, ["wine"])
    return pipeline


async def copy_left(connection: Any) -> Any:
    copy = connection.cursor().copy("copy (select generate_series(1, 100000)) to stdout")
    await copy.__aenter__()
    return copy


LEFT: dict[str, Callable[[Any], Any]] = {
    "rows": rows_left,
    "notifications": notifications_left,
    "pipeline": pipeline_left,
    "copy": copy_left,
}


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
async def test_a_block_that_ends_too_early_is_rolled_back_and_says_so(
    emptied: Database, what: str, error: type[Exception] | None
) -> None:
    ledger = RecordingLedger()
    async with open_pool("psycopg", emptied.app) as pool:
        manager = pool.manager(ledger=ledger)
        with running_as(manager, "alice"), refused if error is None else pytest.raises(error):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                left = await LEFT[what](connection)
                if error is not None:
                    raise error
        assert phases(ledger) == ["begin", "rollback"]
        with running_as(manager, "alice"):
            async with asyncio.timeout(10), pool.plugin.transaction() as connection:
                assert await pool.run(connection, BODIES) == []
        del left


async def test_a_context_closes_whose_rows_nobody_reads(emptied: Database) -> None:
    kept: list[Any] = []
    async with open_pool("psycopg", emptied.app) as pool:
        manager = pool.manager()
        with running_as(manager, "alice") as context, pytest.raises(Exception, match="closed"):
            async with pool.plugin.transaction() as connection:
                kept.append(await rows_left(connection))
                await context.aclose()
        with running_as(manager, "bob"):
            async with asyncio.timeout(10), pool.plugin.transaction() as connection:
                assert await pool.run(connection, BODIES) == []


def in_threads(connection: Any, what: str) -> Any:
    if what == "rows":
        rows = connection.cursor().stream(ROWS)
        next(rows)
        return rows
    pipeline = connection.pipeline()
    pipeline.__enter__()
    connection.execute(INSERT, ["wine"])
    return pipeline


@pytest.fixture
def raw(emptied: Database) -> Iterator[ConnectionPool[Any]]:
    with ConnectionPool(
        emptied.app.dsn, min_size=1, max_size=1, open=False, reset=ucm_threads.reset, timeout=10
    ) as pool:
        yield pool


@pytest.mark.parametrize("what", ["rows", "pipeline"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_block_of_a_thread_that_ends_too_early_is_rolled_back_and_says_so(
    raw: ConnectionPool[Any], what: str, error: type[Exception] | None
) -> None:
    ledger = RecordingLedger()
    pool, manager = ucm_threads.PsycopgThreadPool(raw), UserContextManager(ledger=ledger)
    with running_as(manager, "alice"), refused if error is None else pytest.raises(error):  # noqa: SIM117
        with pool.transaction() as connection:
            connection.execute(INSERT, ["milk"])
            left = in_threads(connection, what)
            if error is not None:
                raise error
    assert phases(ledger) == ["begin", "rollback"]
    with running_as(manager, "alice"), pool.transaction() as connection:
        assert connection.execute(BODIES).fetchall() == []
    del left
