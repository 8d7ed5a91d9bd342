"""A pool without a working reset is found by trying, whatever its library. The doctor undoes what it tried."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.event
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import ucm_postgres.asyncpg
import ucm_postgres.psycopg
import ucm_postgres.psycopg_threads
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from ucm_middleware import ConfigurationError
from ucm_postgres import RESET
from ucm_postgres.doctor import Finding, examine, examine_async_pool, examine_pool, require_healthy

ALL_THREE = "SET, SET ROLE, temporary tables"

LEFT = (
    "select current_setting('role'), coalesce(current_setting('app.user_id', true), ''),"
    " (select count(*) from pg_class where relpersistence = 't')"
)


def listen_for_reset(engine: sqlalchemy.Engine) -> None:
    """What an application may do by itself."""

    def reset(connection: Any, record: object, state: object) -> None:
        connection.rollback()
        cursor = connection.cursor()
        for statement in RESET:
            cursor.execute(statement)
        connection.commit()

    sqlalchemy.event.listen(engine, "reset", reset)


@contextmanager
def threads_pool(database: Database, size: int, **options: Any) -> Generator[ConnectionPool[Any]]:
    with ConnectionPool(database.app.dsn, min_size=size, max_size=size, open=False, **options) as pool:
        pool.wait()
        yield pool


@contextmanager
def engine_of(database: Database, *, resets: bool, **options: Any) -> Generator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(database.app.url("postgresql+psycopg"), **options)
    if resets:
        listen_for_reset(engine)
    yield engine
    engine.dispose()


@asynccontextmanager
async def async_pool(database: Database, kind: str, *, resets: bool) -> AsyncGenerator[Any]:
    if kind == "psycopg":
        reset = ucm_postgres.psycopg.reset if resets else None
        async with AsyncConnectionPool(database.app.dsn, min_size=2, open=False, reset=reset) as pool:
            yield pool
    elif kind == "asyncpg":
        reset = ucm_postgres.asyncpg.reset if resets else None
        async with asyncpg.create_pool(database.app.dsn, min_size=2, max_size=3, reset=reset) as pool:
            yield pool
    else:
        engine = create_async_engine(database.app.url(f"postgresql+{kind.partition('-')[2]}"))
        if resets:
            listen_for_reset(engine.sync_engine)
        yield engine
        await engine.dispose()


def told(found: tuple[Finding, ...]) -> str:
    (finding,) = found
    assert (finding.code, finding.severity) == ("pool", "serious")
    assert finding.sql.startswith("CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; ")
    return finding.problem


class TestThreads:
    @pytest.mark.parametrize("size", [1, 3])
    def test_a_pool_of_psycopg(self, database: Database, size: int) -> None:
        with threads_pool(database, size) as pool:
            assert ALL_THREE in told(examine_pool(pool))
        with threads_pool(database, size, reset=ucm_postgres.psycopg_threads.reset) as pool:
            assert examine_pool(pool) == ()

    @pytest.mark.parametrize(
        ("statements", "what"),
        [
            (("RESET ALL", "DISCARD TEMP"), "SET ROLE;"),
            (("SET SESSION AUTHORIZATION DEFAULT", "RESET ALL"), "temporary tables;"),
            (("RESET ROLE", "DISCARD TEMP"), "SET;"),
        ],
    )
    def test_a_reset_that_forgets_something(self, database: Database, statements: tuple[str, ...], what: str) -> None:
        def reset(connection: psycopg.Connection[Any]) -> None:
            for statement in statements:
                connection.execute(statement.encode())
            connection.commit()

        with threads_pool(database, 1, reset=reset) as pool:
            assert f"the next: {what}" in told(examine_pool(pool))

    def test_an_engine(self, database: Database) -> None:
        with engine_of(database, resets=False) as engine:
            assert ALL_THREE in told(examine_pool(engine))
        with engine_of(database, resets=True) as engine:
            # An adapter binds what begins, and refuses without a user.
            sqlalchemy.event.listen(engine, "begin", lambda connection: pytest.fail("a transaction began"))
            assert examine_pool(engine) == ()
        with engine_of(database, resets=False, poolclass=NullPool) as engine:
            assert examine_pool(engine) == ()  # it closes what comes back

    def test_through_pgbouncer(self, database: Database) -> None:
        with start_pgbouncer(database) as pgbouncer:
            dsn = pgbouncer.login(database.app).dsn
            options = {"prepare_threshold": None}
            with ConnectionPool(dsn, min_size=1, open=False, kwargs=options) as pool:
                assert ALL_THREE in told(examine_pool(pool))

    def test_what_was_tried_is_undone_and_nothing_else(self, database: Database) -> None:
        def configure(connection: psycopg.Connection[Any]) -> None:
            connection.execute("set app.tenant = 'acme'")
            connection.commit()

        with threads_pool(database, 2, configure=configure) as pool:
            examine_pool(pool)
            with pool.connection() as first, pool.connection() as second:
                for connection in first, second:
                    assert connection.execute(LEFT.encode()).fetchone() == ("none", "", 0)
                    assert connection.execute("show app.tenant").fetchone() == ("acme",)

    def test_a_login_that_may_make_no_temporary_tables(self, database: Database) -> None:
        database.execute(
            "revoke temporary on database {} from public".format(f'"{database.name}"'), as_=database.superuser
        )
        with threads_pool(database, 1) as pool:
            assert "the next: SET, SET ROLE;" in told(examine_pool(pool))

    def test_what_is_found_is_judged_at_the_start(self, database: Database) -> None:
        with (
            threads_pool(database, 1) as pool,
            psycopg.connect(database.app.dsn) as connection,
            pytest.raises(ConfigurationError, match=r"pool:psycopg_pool\.ConnectionPool: .*\n  CLOSE ALL"),
        ):
            require_healthy(connection, also=examine_pool(pool))

    def test_what_is_no_pool_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"the pool is a builtins\.int; give a psycopg_pool"):
            examine_pool(7)


class TestAsynchronous:
    @pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy-asyncpg", "sqlalchemy-psycopg"])
    async def test_without_a_reset_all_is_left(self, database: Database, kind: str) -> None:
        async with async_pool(database, kind, resets=False) as pool:
            assert ALL_THREE in told(await examine_async_pool(pool))

    async def test_asyncpgs_own_reset_forgets_the_role_and_tables(self, database: Database) -> None:
        async with async_pool(database, "asyncpg", resets=False) as pool:
            assert "the next: SET ROLE, temporary tables;" in told(await examine_async_pool(pool))
            async with pool.acquire() as first, pool.acquire() as second:
                for connection in first, second:
                    assert tuple(await connection.fetchrow(LEFT)) == ("none", "", 0)

    @pytest.mark.parametrize("kind", ["psycopg", "asyncpg", "sqlalchemy-asyncpg", "sqlalchemy-psycopg"])
    async def test_with_one_nothing_is(self, database: Database, kind: str) -> None:
        async with async_pool(database, kind, resets=True) as pool:
            assert await examine_async_pool(pool) == ()

    async def test_what_is_no_asynchronous_pool_is_refused(self, database: Database) -> None:
        complaint = r"a psycopg_pool\.ConnectionPool; .* to examine_pool"
        with threads_pool(database, 1) as pool, pytest.raises(ConfigurationError, match=complaint):
            await examine_async_pool(pool)
        async with async_pool(database, "psycopg", resets=False) as pool:
            with pytest.raises(ConfigurationError, match="asynchronous pool to examine_async_pool"):
                examine_pool(pool)


class TestPooler:
    @pytest.mark.parametrize("mode", ["transaction", "session"])
    def test_one_in_between_is_noticed(self, database: Database, mode: str) -> None:
        with start_pgbouncer(database, mode=mode) as pgbouncer:
            dsn = pgbouncer.login(database.app).dsn
            with psycopg.connect(dsn, prepare_threshold=0) as careless:
                careless.execute("select 'left behind'")  # a prepared statement, on the connection of the next one
            with psycopg.connect(dsn, prepare_threshold=1) as connection:
                (finding,) = examine(connection)
        assert finding.key == f"pooler:127.0.0.1:{pgbouncer.port}"
        assert finding.severity == "warning"
        assert "reset='begin'" in finding.problem
