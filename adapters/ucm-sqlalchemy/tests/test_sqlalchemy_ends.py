"""What is put on record of a transaction's end is what became of it, also where SQL or the driver had a hand in it."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from sqlalchemy_notes import DRIVERS, async_engine, by_text, running, sync_engine
from support.contexts import events
from support.postgres import Database
from ucm_middleware import UserContextManager, managed_user_context
from ucm_sqlalchemy import SQLAlchemy

pytestmark = pytest.mark.parametrize("driver", DRIVERS)

INSERT = text("insert into notes (body) values ('a1')")
USER = text("select current_setting('app.user_id', true)")


@pytest.fixture
async def engine(database: Database, driver: str) -> AsyncGenerator[AsyncEngine]:
    async with async_engine(database.app, driver) as engine:
        yield engine


@pytest.fixture
def bound(engine: AsyncEngine) -> SQLAlchemy[AsyncSession]:
    return SQLAlchemy(engine)


@pytest.fixture
def manager(bound: SQLAlchemy[AsyncSession]) -> UserContextManager:
    return UserContextManager(plugins=[bound])


def phases(manager: UserContextManager) -> list[str]:
    return [each["phase"] for each in events(manager, "alice", "transaction")]


async def driver_connection(session: AsyncSession | AsyncConnection) -> Any:
    connection = await session.connection() if isinstance(session, AsyncSession) else session
    return (await connection.get_raw_connection()).driver_connection


async def fail(raw: Any) -> None:
    """Fail on the driver's own connection, and make nothing of it."""
    with pytest.raises(Exception, match="division by zero"):
        await raw.execute("select 1/0")


async def detach(connection: AsyncConnection) -> Any:
    """Take it from its pool. SQLAlchemy leaves psycopg's open, whoever closes it: close what this gives."""
    raw = await driver_connection(connection)
    await connection.run_sync(lambda detaching: detaching.detach())
    return raw


async def test_a_transaction_that_failed_on_the_drivers_connection_is_not_committed(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            async with bound.unit_of_work() as session:
                await session.execute(INSERT)
                await fail(await driver_connection(session))
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            async with engine.begin() as connection:
                await connection.execute(INSERT)
                await fail(await driver_connection(connection))
        assert await by_text(engine) == []
    assert phases(manager) == ["begin", "rollback", "begin", "rollback", "begin", "commit"]


async def test_what_failed_in_a_savepoint_of_the_drivers_can_be_committed(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with bound.unit_of_work() as session:
            await session.execute(INSERT)
            raw = await driver_connection(session)
            with pytest.raises(Exception, match="division by zero"):
                async with raw.transaction():
                    await raw.execute("select 1/0")
        assert await by_text(engine) == ["a1"]
    assert phases(manager) == ["begin", "commit", "begin", "commit"]


async def test_the_failure_of_one_transaction_is_not_that_of_the_next(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with engine.connect() as connection:
            await connection.execute(INSERT)
            await fail(await driver_connection(connection))
            await connection.rollback()
            await connection.execute(INSERT)
            await connection.commit()
        assert await by_text(engine) == ["a1"]
    assert phases(manager) == ["begin", "rollback", "begin", "commit", "begin", "commit"]


ENDINGS = pytest.mark.parametrize(
    ("statement", "kept"),
    [("rollback", []), ("commit", ["a1"]), ("rollback and chain", []), ("commit and chain", ["a1"])],
)


@ENDINGS
async def test_to_commit_what_a_statement_has_ended_is_an_error(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager, statement: str, kept: list[str]
) -> None:
    async with running(manager, "alice"):
        with pytest.raises(InvalidRequestError, match="ended"):
            async with bound.unit_of_work() as session:
                await session.execute(INSERT)
                await session.execute(text(statement))
        assert await by_text(engine) == kept
    assert phases(manager) == ["begin", "unknown", "begin", "commit"]


async def test_the_drivers_own_commit_is_noticed_too(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        with pytest.raises(InvalidRequestError, match="ended"):
            async with bound.unit_of_work() as session:
                await session.execute(INSERT)
                await (await driver_connection(session)).execute("commit")
        assert await by_text(engine) == ["a1"]
    assert phases(manager) == ["begin", "unknown", "begin", "commit"]


@ENDINGS
async def test_to_roll_back_what_a_statement_has_ended_is_unknown_on_record(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager, statement: str, kept: list[str]
) -> None:
    async with running(manager, "alice"):
        unit = bound.unit_of_work()
        with pytest.raises(LookupError):
            async with unit as session:
                await session.execute(INSERT)
                await session.execute(text(statement))
                raise LookupError
        assert unit.has_committed  # perhaps, so that nobody tries it again
        assert await by_text(engine) == kept
    assert phases(manager) == ["begin", "unknown", "begin", "commit"]


async def test_to_commit_what_failed_and_was_begun_anew_by_a_statement_is_an_error(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with engine.connect() as connection:
            with pytest.raises(DBAPIError, match="division by zero"):
                await connection.execute(text("select 1/0"))
            await connection.execute(text("rollback and chain"))
            with pytest.raises(InvalidRequestError, match="ended"):
                await connection.execute(INSERT)
            with pytest.raises(InvalidRequestError, match="ended"):
                await connection.commit()
        assert await by_text(engine) == []
    assert phases(manager) == ["begin", "unknown", "begin", "commit"]


async def test_a_failed_transaction_is_on_record_as_rolled_back(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """Though the server says no more of it than of one that a statement has ended."""
    async with running(manager, "alice"):
        with pytest.raises(DBAPIError, match="division by zero"):
            async with bound.unit_of_work() as session:
                await session.execute(text("select 1/0"))
        with pytest.raises(Exception, match="division by zero"):
            async with bound.unit_of_work() as session:
                await (await driver_connection(session)).execute("select 1/0")
    assert phases(manager) == ["begin", "rollback", "begin", "rollback"]


async def test_what_failed_in_a_statement_that_asyncpg_has_prepared_is_not_committed(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager, driver: str
) -> None:
    if driver != "asyncpg":
        return
    async with running(manager, "alice"):
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            async with bound.unit_of_work() as session:
                await session.execute(INSERT)
                prepared = await (await driver_connection(session)).prepare("select 1 / $1::int")
                with pytest.raises(Exception, match="division by zero"):
                    await prepared.fetch(0)
        assert await by_text(engine) == []
    assert phases(manager) == ["begin", "rollback", "begin", "commit"]


async def test_after_a_commit_in_sql_no_statement_runs_and_nothing_is_committed(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    """For they would run for nobody."""
    async with running(manager, "alice"):
        async with engine.connect() as connection:
            await connection.execute(text("commit"))
            for _ in range(2):
                with pytest.raises(InvalidRequestError, match="ended"):
                    await connection.execute(INSERT)
            await (await driver_connection(connection)).execute("select 1")  # with which psycopg begins another
            with pytest.raises(InvalidRequestError, match="ended"):
                await connection.commit()
        assert await by_text(engine) == []
    assert phases(manager) == ["begin", "unknown", "begin", "commit"]


async def test_the_transactions_of_a_detached_connection_end_on_record(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with engine.connect() as connection:
            await connection.execute(INSERT)
            raw = await detach(connection)
            await connection.commit()
            await connection.execute(INSERT)
            await connection.rollback()
            assert (await connection.execute(USER)).scalar() == "alice"
            await connection.commit()
        await raw.close()
        assert phases(manager) == ["begin", "commit", "begin", "rollback", "begin", "commit"]
        async with engine.connect() as connection:
            await connection.execute(INSERT)
            raw = await detach(connection)
        await raw.close()
        assert phases(manager)[6:] == ["begin", "rollback"]
        assert await by_text(engine) == ["a1"]


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_a_context_leaves_on_a_detached_connection_is_rolled_back_when_it_closes(
    engine: AsyncEngine, manager: UserContextManager, database: Database, *, is_kept: bool
) -> None:
    """Nobody gives it back, or closes it."""
    kept: list[AsyncConnection] = []
    async with running(manager, "alice"):
        connection = await engine.connect()
        kept.append(connection)
        await connection.execute(INSERT)
        await detach(connection)
        if not is_kept:
            kept.clear()
        del connection
    assert phases(manager) == ["begin", "rollback"]
    # Another's would wait for a lock of a transaction that is still under way.
    database.execute("set lock_timeout = '5s'; truncate notes", as_=database.superuser)
    for connection in kept:
        async with running(manager, "alice"):
            with pytest.raises(DBAPIError):
                await connection.execute(INSERT)
        await connection.close()


async def test_a_commit_on_a_detached_connection_that_nobody_closes_is_on_record_when_the_context_closes(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        connection = await engine.connect()
        await connection.execute(INSERT)
        raw = await detach(connection)
        await connection.commit()
        await connection.execute(INSERT)
        await connection.commit()
    assert phases(manager) == ["begin", "commit", "begin", "commit"]
    await connection.close()
    await raw.close()
    async with running(manager, "alice"):
        assert await by_text(engine) == ["a1", "a1"]


async def test_a_commit_before_the_connection_is_detached_is_on_record(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with engine.connect() as connection:
            await connection.execute(INSERT)
            await connection.commit()
            raw = await detach(connection)
        assert phases(manager) == ["begin", "commit"]
        await raw.close()


# Without asyncio.


async def test_sync_engines_do_the_same(database: Database, driver: str) -> None:
    if driver != "psycopg":
        return
    with sync_engine(database.app) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])

        def work() -> None:
            with managed_user_context(manager.create_isolated_context("alice")):
                with pytest.raises(DBAPIError, match="transaction is aborted"), bound.unit_of_work() as session:
                    raw: Any = session.connection().connection.driver_connection
                    with pytest.raises(Exception, match="division by zero"):
                        raw.execute("select 1/0")
                with pytest.raises(InvalidRequestError, match="ended"), bound.unit_of_work() as session:
                    session.execute(text("rollback"))
                with engine.connect() as connection:
                    connection.execute(INSERT)
                    connection.detach()
                    connection.commit()
                left = engine.connect()
                left.execute(INSERT)
                left.detach()
            left.invalidate()

        await asyncio.to_thread(work)
        assert phases(manager) == ["begin", "rollback", "begin", "unknown", "begin", "commit", "begin", "rollback"]
        database.execute("set lock_timeout = '5s'; truncate notes", as_=database.superuser)
