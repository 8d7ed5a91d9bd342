"""What a connection holds on this side of the line: nothing of a user's stays, and the application's does."""

from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from postgres_drivers import open_pool
from support.contexts import running_as
from support.postgres import Database
from ucm_middleware import UserContextManager
from ucm_postgres import asyncpg as ucm_asyncpg
from ucm_postgres import psycopg as ucm_psycopg
from ucm_postgres import psycopg_threads as ucm_threads

NOTICE = "do $$ begin raise notice 'of bob'; end $$"
PID = "select pg_backend_pid()"


class Shouting(TextLoader):
    def load(self, data: Any) -> Any:
        return super().load(data).upper()


class Application(TextLoader):
    def load(self, data: Any) -> Any:
        return f"loaded {super().load(data)!s}"


def change(connection: Any, seen: list[Any]) -> None:
    """All that alice can set on a connection of psycopg's."""
    connection.add_notice_handler(seen.append)
    connection.add_notify_handler(seen.append)
    connection.row_factory = dict_row
    connection.cursor_factory = type("Hers", (connection.cursor_factory,), {})
    connection.server_cursor_factory = type("Hers", (connection.server_cursor_factory,), {})
    connection.prepare_threshold = None
    connection.prepared_max = 1
    connection.adapters.register_loader("text", Shouting)


def held(connection: Any) -> list[Any]:
    """What of it can be asked for: the handle keeps the functions and classes to itself."""
    factories = (connection.row_factory, connection.cursor_factory, connection.server_cursor_factory)
    return [connection.prepare_threshold, connection.prepared_max, *[each.__name__ for each in factories]]


@pytest.mark.parametrize("mode", ["return", "begin"])
async def test_nothing_of_a_users_stays_with_psycopgs_connection(emptied: Database, mode: Any) -> None:
    async with open_pool("psycopg", emptied.app, reset=mode) as pool:
        manager, seen = pool.manager(), list[Any]()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                before, pids = held(connection), await pool.run(connection, PID)
                change(connection, seen)
        with running_as(manager, "bob"):
            async with pool.plugin.transaction() as connection:
                assert held(connection) == before
                assert await pool.run(connection, "select 'of bob'") == [("of bob",)]
                await pool.run(connection, NOTICE)
                assert await pool.run(connection, PID) == pids
        assert seen == []


async def test_a_connection_whose_modes_a_user_set_is_closed(emptied: Database) -> None:
    async with open_pool("psycopg", emptied.app) as pool:
        manager = pool.manager()
        refused = pytest.raises(psycopg.ProgrammingError, match="ended the transaction")
        with running_as(manager, "alice"), refused:
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, "rollback")
                await connection.set_read_only(True)
        with running_as(manager, "bob"):
            async with pool.plugin.transaction() as connection:
                assert await pool.run(connection, "show transaction_read_only") == [("off",)]


def test_nothing_of_a_users_stays_with_psycopgs_connection_in_threads(emptied: Database) -> None:
    raw: ConnectionPool[Any] = ConnectionPool(
        emptied.app.dsn, min_size=1, max_size=1, open=False, reset=ucm_threads.reset
    )
    with raw:
        pool, manager, seen = ucm_threads.PsycopgThreadPool(raw), UserContextManager(), list[Any]()
        with running_as(manager, "alice"), pool.transaction() as connection:
            before, pids = held(connection), connection.execute(PID).fetchall()
            change(connection, seen)
        with running_as(manager, "bob"), pool.transaction() as connection:
            assert held(connection) == before
            assert connection.execute("select 'of bob'").fetchall() == [("of bob",)]
            connection.execute(NOTICE)
            assert connection.execute(PID).fetchall() == pids
        assert seen == []


async def test_what_the_application_configured_stays_with_psycopgs_connection(emptied: Database) -> None:
    seen: list[Any] = []

    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        connection.row_factory = namedtuple_row
        connection.add_notice_handler(lambda diagnostic: seen.append(diagnostic.message_primary))
        connection.adapters.register_loader("text", Application)

    raw: AsyncConnectionPool[Any] = AsyncConnectionPool(
        emptied.app.dsn, min_size=1, max_size=1, open=False, reset=ucm_psycopg.reset, configure=configure
    )
    async with raw:
        pool = ucm_psycopg.PsycopgPool(raw)
        manager = UserContextManager(plugins=[pool])
        for user in ("alice", "bob"):
            with running_as(manager, user):
                async with pool.transaction() as connection:
                    [row] = await (await connection.execute("select 'milk' as body")).fetchall()
                    assert row.body == "loaded milk"
                    await connection.execute(NOTICE)
                    change(connection, [])
        assert seen == ["of bob", "of bob"]


@pytest.mark.parametrize("mode", ["return", "begin"])
async def test_notifications_of_a_users_are_not_for_the_next(emptied: Database, mode: Any) -> None:
    async with open_pool("psycopg", emptied.app, reset=mode) as pool:
        manager = pool.manager()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, "listen hers")
                await pool.run(connection, "select pg_notify('hers', 'of alice')")
        await pool.settled()
        with running_as(manager, "bob"):
            async with pool.plugin.transaction() as connection:
                assert [each async for each in connection.notifies(timeout=0)] == []


async def test_notifications_of_a_users_are_not_for_who_borrows_without_the_adapter(emptied: Database) -> None:
    async with open_pool("psycopg", emptied.app) as pool:
        with running_as(pool.manager(), "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, "listen hers")
                await pool.run(connection, "select pg_notify('hers', 'of alice')")
        async with pool.borrow() as connection:
            assert [each async for each in connection.notifies(timeout=0)] == []


async def test_nothing_of_a_users_stays_with_asyncpgs_connection(emptied: Database) -> None:
    seen: list[Any] = []

    def see(*arguments: object) -> None:
        seen.append(arguments)

    async with open_pool("asyncpg", emptied.app) as pool:
        manager = pool.manager()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                pids = await pool.run(connection, PID)
                connection.add_query_logger(see)
                connection.add_log_listener(see)
                connection.add_termination_listener(see)
                await connection.add_listener("hers", see)
        with running_as(manager, "bob"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, NOTICE)
                assert await pool.run(connection, PID) == pids
    assert seen  # of alice's own block
    assert "of bob" not in str(seen)


@pytest.mark.parametrize(("schema", "name"), [("pg_catalog", "text"), ("public", "mood")])
async def test_a_connection_with_a_codec_of_a_users_is_closed(emptied: Database, schema: str, name: str) -> None:
    emptied.execute("drop type if exists mood; create type mood as enum ('fine')")
    async with open_pool("asyncpg", emptied.app) as pool:
        manager = pool.manager()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await connection.set_type_codec(name, schema=schema, encoder=str.upper, decoder=str.upper)
                assert await connection.fetchval(f"select 'fine'::{name}") == "FINE"
        with running_as(manager, "bob"):
            async with pool.plugin.transaction() as connection:
                assert await connection.fetchval(f"select 'fine'::{name}") == "fine"


async def test_what_the_application_configured_stays_with_asyncpgs_connection(emptied: Database) -> None:
    seen: list[str] = []

    async def configure(connection: Any) -> None:
        connection.add_query_logger(lambda query: seen.append(query.query))
        await connection.set_type_codec("text", schema="pg_catalog", encoder=str, decoder=str.upper)

    async with asyncpg.create_pool(
        emptied.app.dsn, min_size=1, max_size=1, reset=ucm_asyncpg.reset, init=configure
    ) as raw:
        pool = ucm_asyncpg.AsyncpgPool(raw)
        manager, pids = UserContextManager(plugins=[pool]), set[int]()
        for user in ("alice", "bob"):
            with running_as(manager, user):
                async with pool.transaction() as connection:
                    assert await connection.fetchval("select 'milk'::text") == "MILK"
                    pids.add(await connection.fetchval(PID))
    assert len(pids) == 1
    assert seen.count("select 'milk'::text") == 2
