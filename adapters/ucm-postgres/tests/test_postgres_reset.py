"""What the next borrower of a connection finds of the one before: without the adapter, and with it."""

from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, crowd, open_pool
from support.contexts import running_as
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from ucm_middleware import ConfigurationError
from ucm_postgres import RESET, Binding
from ucm_postgres.asyncpg import AsyncpgPool
from ucm_postgres.psycopg import PsycopgPool
from ucm_postgres.psycopg_threads import PsycopgThreadPool

# What alice leaves behind, and a question that tells whether it is still there.
LEFT: dict[str, tuple[str, str]] = {
    "setting": ("set app.user_id = 'alice'", "select coalesce(current_setting('app.user_id', true), '') = 'alice'"),
    "search path": ("set search_path = pg_catalog", "select current_setting('search_path') = 'pg_catalog'"),
    "role": ("set role {other}", "select current_user = '{other}'"),
    "temporary table": (
        "create temporary table notes as select 'alice' as secret",
        "select exists (select from pg_class where relname = 'notes' and relpersistence = 't')",
    ),
    "cursor": (
        "declare hers cursor with hold for select 1",
        "select exists (select from pg_cursors where name = 'hers')",
    ),
    "channel": ("listen news", "select exists (select from pg_listening_channels())"),
    "lock": (
        "select pg_advisory_lock(1)",
        "select exists (select from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())",
    ),
    "sequence": ("select nextval('hers')", "select lastval() > 0"),
}

# In a transaction, UNLISTEN takes effect when it commits.
AT_THE_COMMIT = {"channel"}

# What each driver's pool keeps by itself. (No connection of psycopg's is ever reset.)
LEAKS = {
    "psycopg": set(LEFT),
    "asyncpg": {"role", "temporary table", "sequence"},
}


@pytest.fixture(scope="module")
def other(module_database: Database) -> str:
    """A role that the login may take on; and a sequence."""
    login = module_database.login("other", "nologin")
    module_database.execute(
        f"grant {login.user} to {{app}} with set true, inherit false", as_=module_database.superuser
    )
    module_database.execute("create sequence hers; grant usage on sequence hers to {app}")
    module_database.execute(
        f"grant temporary on database {module_database.name} to {{app}}", as_=module_database.superuser
    )
    return login.user


async def asked(pool: Pool, connection: Any, question: str) -> bool:
    """The answer. In a savepoint, so that a question that fails, as lastval() does when all is well, spoils nothing."""
    try:
        async with connection.transaction():
            [(answer,)] = await pool.run(connection, question)
    except (psycopg.errors.ObjectNotInPrerequisiteState, asyncpg.ObjectNotInPrerequisiteStateError):
        return False
    return bool(answer)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("what", LEFT)
class TestWhatIsLeftBehind:
    async def test_reaches_the_next_borrower_by_itself(
        self, emptied: Database, other: str, driver: str, what: str
    ) -> None:
        leave, question = (part.replace("{other}", other) for part in LEFT[what])
        async with open_pool(driver, emptied.app, reset="none") as pool:
            async with pool.borrow() as connection:
                await pool.run(connection, leave)
            async with pool.borrow() as connection:
                assert await asked(pool, connection, question) is (what in LEAKS[driver])

    async def test_does_not_with_a_reset_at_the_return(
        self, emptied: Database, other: str, driver: str, what: str
    ) -> None:
        leave, question = (part.replace("{other}", other) for part in LEFT[what])
        async with open_pool(driver, emptied.app) as pool:
            manager = pool.manager()
            with running_as(manager, "alice"):
                async with pool.plugin.transaction() as connection:
                    [before] = await pool.run(connection, "select pg_backend_pid()")
                    await pool.run(connection, leave)
            async with pool.borrow() as connection:
                assert not await asked(pool, connection, question)
            with running_as(manager, "bob"):
                async with pool.plugin.transaction() as connection:
                    assert not await asked(pool, connection, question)
            async with pool.borrow() as connection:
                assert await pool.run(connection, "select pg_backend_pid()") == [before]  # reset, and not replaced

    async def test_does_not_with_a_reset_at_the_beginning(
        self, emptied: Database, other: str, driver: str, what: str
    ) -> None:
        leave, question = (part.replace("{other}", other) for part in LEFT[what])
        async with open_pool(driver, emptied.app, reset="begin") as pool:
            manager = pool.manager()
            with running_as(manager, "alice"):
                async with pool.plugin.transaction() as connection:
                    [before] = await pool.run(connection, "select pg_backend_pid()")
                    await pool.run(connection, leave)
            with running_as(manager, "bob"):
                with pytest.raises(ZeroDivisionError):  # the reset is rolled back too: the next one does it again
                    async with pool.plugin.transaction() as connection:
                        assert await asked(pool, connection, question) is (what in AT_THE_COMMIT)
                        raise ZeroDivisionError
                for number in range(2):
                    async with pool.plugin.transaction() as connection:
                        assert await asked(pool, connection, question) is (what in AT_THE_COMMIT and number == 0)
            async with pool.borrow() as connection:
                assert await pool.run(connection, "select pg_backend_pid()") == [before]


@pytest.mark.parametrize("driver", DRIVERS)
class TestBehindPgBouncer:
    async def test_what_is_set_reaches_other_clients_by_itself(self, emptied: Database, driver: str) -> None:
        with start_pgbouncer(emptied) as pgbouncer:
            login = pgbouncer.login(emptied.app)
            async with (
                open_pool(driver, login, reset="none", prepares=False) as alice,
                open_pool(driver, login, reset="none", prepares=False) as bob,
                alice.borrow() as connection,
            ):
                await alice.run(connection, "set app.user_id = 'alice'")
                if driver == "psycopg":
                    await connection.commit()
                async with bob.borrow() as another:
                    assert await bob.run(another, "select current_setting('app.user_id', true)") == [("alice",)]

    async def test_a_reset_at_the_beginning_keeps_it_from_them(
        self, emptied: Database, other: str, driver: str
    ) -> None:
        kept = {what: question for what, (_, question) in LEFT.items() if what not in AT_THE_COMMIT}
        questions = [question.replace("{other}", other) for question in kept.values()]
        with start_pgbouncer(emptied) as pgbouncer:
            login = pgbouncer.login(emptied.app)
            async with (
                open_pool(driver, login, reset="begin", prepares=False) as first,
                open_pool(driver, login, reset="begin", prepares=False) as second,
            ):
                manager, others = first.manager(), second.manager()
                with running_as(manager, "alice"):
                    async with first.plugin.transaction() as connection:
                        for what, (leave, _) in LEFT.items():
                            if what not in {"search path", "role", *AT_THE_COMMIT}:  # these would keep it from the rest
                                await first.run(connection, leave)
                        [before] = await first.run(connection, "select pg_backend_pid()")
                for _ in range(3):  # psycopg would begin to prepare what it sees often
                    with running_as(others, "bob"):
                        async with second.plugin.transaction() as connection:
                            assert await second.run(connection, "select pg_backend_pid()") == [before]
                            assert not any([await asked(second, connection, each) for each in questions])
                            await second.run(connection, INSERT, "beer")
                            assert {user for user, _ in await second.run(connection, BODIES)} == {"bob"}

    async def test_users_side_by_side_see_their_own(self, emptied: Database, driver: str) -> None:
        with start_pgbouncer(emptied) as pgbouncer:
            login = pgbouncer.login(emptied.app)
            async with open_pool(driver, login, size=3, reset="begin", prepares=False) as pool:
                await crowd(pool, users=20, rounds=2)


class TestPreparedStatements:
    @pytest.mark.parametrize(("reset", "survive"), [("; ".join(RESET), True), ("DISCARD ALL", False)])
    async def test_of_asyncpg_under_sqlalchemy_survive_the_reset(
        self, emptied: Database, reset: str, survive: bool
    ) -> None:
        engine = create_async_engine(emptied.app.url("postgresql+asyncpg"), pool_size=1, max_overflow=0)
        try:
            async with engine.connect() as connection:
                await connection.execute(text("select body from notes where user_id = :user"), {"user": "alice"})
                raw = (await connection.get_raw_connection()).driver_connection
                await connection.rollback()
                await raw.execute(reset)  # type: ignore[union-attr]
                again = connection.execute(text("select body from notes where user_id = :user"), {"user": "alice"})
                if survive:
                    assert (await again).all() == []
                else:
                    with pytest.raises(DBAPIError, match=r"prepared statement .* does not exist"):
                        await again
        finally:
            await engine.dispose()

    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_of_a_pool_survive_it(self, emptied: Database, driver: str) -> None:
        async with open_pool(driver, emptied.app) as pool:
            manager = pool.manager()
            prepared: list[tuple[Any, ...]] = []
            for number in range(12):  # psycopg prepares what it has seen five times
                with running_as(manager, "alice"):
                    async with pool.plugin.transaction() as connection:
                        await pool.run(connection, "select %s::int", number)
                        prepared = await pool.run(
                            connection,
                            "select count(*) from pg_prepared_statements where statement ^@ 'select $1::int'",
                        )
            assert prepared == [(1,)]


class TestAPoolThatResetsNothing:
    async def test_is_refused(self, emptied: Database) -> None:
        for driver in DRIVERS:
            async with open_pool(driver, emptied.app, reset="none") as pool:
                kind: Any = PsycopgPool if driver == "psycopg" else AsyncpgPool
                with pytest.raises(ConfigurationError, match=rf"reset=ucm_postgres\.{driver}\.reset"):
                    kind(pool.raw)
                with pytest.raises(ConfigurationError, match="'return', or 'begin'"):
                    kind(pool.raw, reset="never")
        threads: ConnectionPool[Any] = ConnectionPool(emptied.app.dsn, open=False)
        with pytest.raises(ConfigurationError, match=r"reset=ucm_postgres\.psycopg_threads\.reset"):
            PsycopgThreadPool(threads)

    async def test_that_fails_has_its_connection_closed(self, emptied: Database) -> None:
        async def fails(connection: psycopg.AsyncConnection[Any]) -> None:
            raise OSError("no")

        raw: AsyncConnectionPool[Any] = AsyncConnectionPool(
            emptied.app.dsn, min_size=1, max_size=1, open=False, reset=fails
        )
        async with raw:
            pool = Pool("psycopg", raw, PsycopgPool(raw, Binding()))
            manager = pool.manager()
            pids = set()
            for _ in range(3):
                with running_as(manager, "alice"):
                    async with pool.plugin.transaction() as connection:
                        pids |= set(await pool.run(connection, "select pg_backend_pid()"))
            assert len(pids) == 3


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_reset_at_the_beginning_comes_after_how_the_transaction_begins(database: Database, driver: str) -> None:
    """Which the next one that commits puts right."""
    read_only: list[Any] = []
    async with open_pool(driver, database.app, reset="begin") as pool:
        manager = pool.manager()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await connection.execute("set session characteristics as transaction read only")
        with running_as(manager, "bob"):
            for _ in range(2):
                async with pool.plugin.transaction() as connection:
                    read_only += await pool.run(connection, "show transaction_read_only")
    assert read_only == [("on",), ("off",)]
