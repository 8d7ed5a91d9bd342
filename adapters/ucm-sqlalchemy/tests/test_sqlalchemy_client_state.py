"""What a user leaves on the driver's connection, on this side of the line, does not reach the next borrower."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from sqlalchemy_notes import DRIVERS, async_engine, running, sync_engine
from support.postgres import Database
from ucm_middleware import UserContextManager, managed_user_context
from ucm_sqlalchemy import SQLAlchemy

NOTICE = text("do $$ begin raise notice 'of bob'; end $$")
PID = text("select pg_backend_pid()")

pytestmark = pytest.mark.parametrize("reset", ["return", "begin"])


@pytest.fixture(params=DRIVERS)
async def engine(database: Database, request: pytest.FixtureRequest) -> AsyncGenerator[AsyncEngine]:
    async with async_engine(database.app, request.param) as engine:
        yield engine


@pytest.fixture
def bound(engine: AsyncEngine, reset: Any) -> SQLAlchemy[AsyncSession]:
    return SQLAlchemy(engine, reset=reset)


@pytest.fixture
def manager(bound: SQLAlchemy[AsyncSession]) -> UserContextManager:
    return UserContextManager(plugins=[bound])


async def driver_connection(session: AsyncSession) -> Any:
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def test_handlers_and_factories_are_gone(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    seen: list[object] = []
    async with running(manager, "alice"), bound.unit_of_work() as session:
        mine = await session.scalar(PID)
        raw = await driver_connection(session)
        if engine.dialect.driver == "asyncpg":
            raw.add_query_logger(seen.append)
            raw.add_log_listener(lambda connection, message: seen.append(message))
        else:
            raw.add_notice_handler(seen.append)
            raw.row_factory = dict_row
            await raw.execute("listen gossip")
            await raw.execute("notify gossip, 'of alice'")
    seen.clear()
    async with running(manager, "bob"), bound.unit_of_work() as session:
        assert await session.scalar(PID) == mine  # the very same connection
        await session.execute(NOTICE)
        raw = await driver_connection(session)
        if engine.dialect.driver == "asyncpg":
            assert await raw.fetchval("select 1") == 1
        else:
            assert await (await raw.execute("select 1")).fetchone() == (1,)
            assert [each async for each in raw.notifies(timeout=0)] == []
    assert seen == []


async def test_isolation_levels_of_sqlalchemys_cost_no_connection(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        pids: set[object] = set()
        for level in ("SERIALIZABLE", None, "REPEATABLE READ"):
            async with bound.unit_of_work(cast("Any", level)) as session:
                pids.add(await session.scalar(PID))
    assert len(pids) == 1


async def test_how_transactions_begin_is_not_the_next_ones(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """psycopg has it on the connection, and SQLAlchemy knows only of what it has set itself."""
    async with running(manager, "alice"), engine.connect() as connection:
        if engine.dialect.driver == "psycopg":
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.set_read_only(True)
            await raw.set_isolation_level(IsolationLevel.SERIALIZABLE)
    async with running(manager, "bob"), bound.unit_of_work() as session:
        assert await session.scalar(text("show transaction_isolation")) == "read committed"
        assert await session.scalar(text("show transaction_read_only")) == "off"


async def test_a_connection_with_what_cannot_be_taken_back_is_thrown_away(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """asyncpg's codecs."""
    if engine.dialect.driver == "psycopg":
        return
    async with running(manager, "alice"), bound.unit_of_work() as session:
        mine = await session.scalar(PID)
        raw = await driver_connection(session)
        await raw.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=lambda found: "of alice")
    async with running(manager, "bob"), bound.unit_of_work() as session:
        assert await session.scalar(PID) != mine


async def test_sync_engines_do_the_same(database: Database, reset: Any) -> None:
    seen: list[object] = []
    with sync_engine(database.app) as engine:
        bound = SQLAlchemy(engine, reset=reset)
        manager = UserContextManager(plugins=[bound])

        def work() -> None:
            alice = manager.create_isolated_context("alice")
            with managed_user_context(alice), bound.unit_of_work("SERIALIZABLE") as session:
                mine = session.scalar(PID)
                cast("Any", session.connection().connection.driver_connection).add_notice_handler(seen.append)
            with managed_user_context(manager.create_isolated_context("bob")), bound.unit_of_work() as session:
                assert session.scalar(PID) == mine
                session.execute(NOTICE)

        await asyncio.to_thread(work)
    assert seen == []
