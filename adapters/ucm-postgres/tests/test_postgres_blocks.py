"""How blocks end that do not simply end, and blocks of several tasks inside of one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, of, open_pool
from support.contexts import running_as
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import ContextClosedError, UserContextManager, managed_user_context
from ucm_middleware.current import ambient
from ucm_middleware.testing import FakeClock, RecordingLedger
from ucm_postgres.leftovers import Leftovers

FAILED = (psycopg.errors.InFailedSqlTransaction, asyncpg.InFailedSQLTransactionError)
DEAD = (psycopg.OperationalError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError)
ENDED = (psycopg.ProgrammingError, asyncpg.InterfaceError)
SQL_ERRORS = (psycopg.Error, asyncpg.PostgresError)

ENDINGS = ("commit", "rollback", "commit and chain", "rollback and chain", "commit; begin", "rollback; begin")


@pytest.fixture(params=DRIVERS)
async def pool(request: pytest.FixtureRequest, emptied: Database, postgres_proxy: TcpProxy) -> AsyncIterator[Pool]:
    async with open_pool(request.param, emptied.app.at(postgres_proxy.port)) as pool:
        yield pool


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(pool: Pool, ledger: RecordingLedger) -> UserContextManager:
    return pool.manager(ledger=ledger)


def phases(ledger: RecordingLedger) -> list[object]:
    return [dict(record.data)["phase"] for record in ledger.select("transaction")]


async def bodies(pool: Pool) -> list[Any]:
    with running_as(pool.manager(), "alice"):
        async with pool.plugin.transaction() as connection:
            return of("alice", await pool.run(connection, BODIES))


class TestABlockThatCaughtAnError:
    """PostgreSQL answers its COMMIT with ROLLBACK, and the drivers say nothing of it."""

    async def test_is_not_committed_and_says_so(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        pids: list[Any] = []
        with running_as(manager, "alice"), pytest.raises(FAILED, match="a block of its own"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                pids = await pool.run(connection, "select pg_backend_pid()")
                with contextlib.suppress(*SQL_ERRORS):
                    await pool.run(connection, "select 1 / 0")
        assert phases(ledger) == ["begin", "rollback"]
        assert await bodies(pool) == []
        with running_as(pool.manager(), "bob"):
            async with pool.plugin.transaction() as connection:  # which is as good as new
                assert await pool.run(connection, "select pg_backend_pid()") == pids

    async def test_in_a_savepoint_is_committed(self, pool: Pool, manager: UserContextManager) -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                with contextlib.suppress(*SQL_ERRORS):
                    async with pool.plugin.transaction():
                        await pool.run(connection, "select 1 / 0")
        assert await bodies(pool) == ["milk"]

    async def test_of_the_manager_s_own_says_so_too(self, pool: Pool, manager: UserContextManager) -> None:
        with pytest.RaisesGroup(pytest.RaisesExc(FAILED)):
            async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
                await context.db_session.execute(pool.statement(INSERT), ["milk"])
                with contextlib.suppress(*SQL_ERRORS):
                    await context.db_session.execute("select 1 / 0")
        assert await bodies(pool) == []

    async def test_of_a_connection_that_died_is_not_committed(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger, postgres_proxy: TcpProxy
    ) -> None:
        with running_as(manager, "alice"), pytest.raises(DEAD, match="lost before COMMIT"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                postgres_proxy.cut()
                with contextlib.suppress(*DEAD):
                    await pool.run(connection, "select 1")
        assert phases(ledger) == ["begin", "rollback"]
        assert await bodies(pool) == []


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_block_whose_transaction_sql_has_ended_says_so(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger, ending: str
) -> None:
    with running_as(manager, "alice"), pytest.raises(ENDED, match="a statement has ended the transaction"):
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            await connection.execute(ending)
            assert await pool.run(connection, BODIES) == []  # for nobody
    assert phases(ledger) == ["begin", "unknown"]
    assert await bodies(pool) == (["milk"] if ending.startswith("commit") else [])


async def test_a_block_whose_failed_transaction_sql_has_ended_says_so(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger
) -> None:
    with running_as(manager, "alice"), pytest.raises(ENDED, match="a statement has ended the transaction"):
        async with pool.plugin.transaction() as connection:
            with contextlib.suppress(*SQL_ERRORS):
                await pool.run(connection, "select 1 / 0")
            await connection.execute("rollback and chain")
    assert phases(ledger) == ["begin", "unknown"]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_error_after_sql_has_ended_the_transaction_puts_no_rollback_on_record(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger, ending: str
) -> None:
    with running_as(manager, "alice"), pytest.raises(LookupError):
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            await connection.execute(ending)
            raise LookupError
    assert phases(ledger) == ["begin", "unknown"]
    assert await bodies(pool) == (["milk"] if ending.startswith("commit") else [])


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_context_that_closes_after_sql_has_ended_the_transaction_puts_no_rollback_on_record(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger, ending: str
) -> None:
    context = manager.create_isolated_context("alice")

    async def work() -> None:
        ambient.set(context)
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            await connection.execute(ending)
            await context.aclose()

    with pytest.raises(ContextClosedError):
        await asyncio.create_task(work())
    assert phases(ledger) == ["begin", "unknown"]
    assert await bodies(pool) == (["milk"] if ending.startswith("commit") else [])


@pytest.mark.parametrize("ended", [False, True])
async def test_a_failed_block_is_a_rollback_on_record(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger, ended: bool
) -> None:
    """Though the server says nothing else of it than of a transaction that has ended."""
    with running_as(manager, "alice"), pytest.raises(SQL_ERRORS):
        async with pool.plugin.transaction() as connection:
            if ended or pool.driver == "psycopg":
                await pool.run(connection, "select 1 / 0")
            else:
                await (await connection.prepare("select 1 / $1::int")).fetch(0)  # of which it hears nothing
    assert phases(ledger) == ["begin", "rollback"]


async def test_what_fails_in_a_statement_that_asyncpg_has_prepared_is_not_committed(emptied: Database) -> None:
    ledger = RecordingLedger()
    async with open_pool("asyncpg", emptied.app) as pool:
        with running_as(pool.manager(ledger=ledger), "alice"), pytest.raises(FAILED, match="a block of its own"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                prepared = await connection.prepare("select 1 / $1::int")
                with contextlib.suppress(*SQL_ERRORS):
                    await prepared.fetch(0)
        assert phases(ledger) == ["begin", "rollback"]
        assert await bodies(pool) == []


async def test_a_savepoint_that_was_rolled_back_ends_no_transaction(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger
) -> None:
    with running_as(manager, "alice"):
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            await connection.execute("savepoint here")
            with contextlib.suppress(*SQL_ERRORS):
                await pool.run(connection, "select 1 / 0")
            await connection.execute("rollback to here")
    assert phases(ledger) == ["begin", "commit"]
    assert await bodies(pool) == ["milk"]


@pytest.mark.parametrize("before", ["on", "off"])
async def test_how_transactions_begin_by_default_is_as_it_was(emptied: Database, before: str) -> None:
    """Where the server says that it has changed, a transaction has ended: for that it is turned over meanwhile."""
    emptied.execute(f"alter role {{app}} set default_transaction_read_only = {before}", as_=emptied.superuser)
    try:
        for driver in DRIVERS:
            async with open_pool(driver, emptied.app) as pool:
                with running_as(pool.manager(), "alice"):
                    async with pool.plugin.transaction() as connection:
                        assert await pool.run(connection, "show transaction_read_only") == [(before,)]
                    with pytest.raises(ENDED):
                        async with pool.plugin.transaction() as connection:
                            await connection.execute("rollback and chain")
                            assert await pool.run(connection, "show transaction_read_only") == [(before,)]
                async with pool.borrow() as connection:
                    assert await pool.run(connection, "show default_transaction_read_only") == [(before,)]
    finally:
        emptied.execute("alter role {app} reset default_transaction_read_only", as_=emptied.superuser)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_behind_pgbouncer_it_says_so_too(emptied: Database, driver: str) -> None:
    with start_pgbouncer(emptied) as pgbouncer:
        async with open_pool(driver, pgbouncer.login(emptied.app), reset="begin", prepares=False) as pool:
            with running_as(pool.manager(), "alice"), pytest.raises(ENDED, match="has ended the transaction"):
                async with pool.plugin.transaction() as connection:
                    await connection.execute("commit and chain")
            assert await bodies(pool) == []


async def test_a_commit_whose_answer_is_lost_is_on_record_as_unknown(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger, postgres_proxy: TcpProxy
) -> None:
    async def commit() -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                postgres_proxy.hold("replies")

    task = asyncio.create_task(commit())
    await postgres_proxy.until_held("replies")
    postgres_proxy.cut()
    with pytest.raises(DEAD):
        await task
    postgres_proxy.release("replies")
    assert phases(ledger) == ["begin", "unknown"]
    assert await bodies(pool) == ["milk"]


async def test_a_block_that_ends_in_another_users_code_gives_its_connection_back(
    pool: Pool, manager: UserContextManager, ledger: RecordingLedger
) -> None:
    """As a generator of alice's does that is collected while bob's code runs."""

    async def rows() -> AsyncGenerator[Any]:
        async with pool.plugin.transaction() as connection:
            yield await pool.run(connection, INSERT, "milk")

    async def as_user(user: str, step: Any) -> None:
        ambient.set(manager.create_isolated_context(user))
        await step()

    begun = rows()
    await asyncio.create_task(as_user("alice", begun.__anext__))
    await asyncio.create_task(as_user("bob", begun.aclose))
    assert phases(ledger) == ["begin", "rollback"]
    assert await bodies(pool) == []


async def test_a_block_past_the_deadline_is_not_committed_though_nothing_has_closed_its_context(
    pool: Pool, ledger: RecordingLedger
) -> None:
    clock = FakeClock()
    context = pool.manager(ledger=ledger, clock=clock).create_isolated_context("alice", ttl_seconds=10)

    async def work() -> None:
        ambient.set(context)
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            clock.advance(11)

    with pytest.raises(ContextClosedError):
        await asyncio.create_task(work())
    assert phases(ledger) == ["begin", "rollback"]
    assert await bodies(pool) == []


class TestBlocksOfTasksInsideOfOne:
    async def test_do_not_overlap(self, pool: Pool, manager: UserContextManager) -> None:
        """Else what the second has ended well would be undone with the first."""
        inside, tried = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                inside.set()
                await tried.wait()
                raise ZeroDivisionError

        async def second() -> None:
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "bread")

        with running_as(manager, "alice"):
            async with pool.plugin.transaction():
                failing = asyncio.create_task(first())
                await inside.wait()
                with pytest.raises(RuntimeError, match="savepoints cannot overlap"):
                    await second()
                tried.set()
                await asyncio.gather(failing, return_exceptions=True)
                await second()  # when it is its turn
        assert await bodies(pool) == ["bread"]

    async def test_end_before_it_does(self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger) -> None:
        """Else half of what they do would be committed."""
        inside, over = asyncio.Event(), asyncio.Event()

        async def late() -> None:
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "half")
                inside.set()
                await over.wait()

        tasks: list[asyncio.Task[None]] = []
        with running_as(manager, "alice"):
            with pytest.raises(RuntimeError, match="end before the block"):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, "milk")
                    tasks.append(asyncio.create_task(late()))
                    await inside.wait()
            over.set()
            [outcome] = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcome, Exception)
        assert phases(ledger) == ["begin", "rollback"]
        assert await bodies(pool) == []

    async def test_are_their_own_when_it_is_over(self, pool: Pool, manager: UserContextManager) -> None:
        over = asyncio.Event()

        async def late() -> None:
            await over.wait()
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "late")

        with running_as(manager, "alice"):
            async with pool.plugin.transaction():
                task = asyncio.create_task(late())
            over.set()
            await task
        assert await bodies(pool) == ["late"]


async def test_what_a_context_leaves_behind_is_given_back_at_once() -> None:
    """One that hangs takes no time from the others."""
    both = asyncio.Barrier(2)

    async def abandon(transaction: object) -> None:
        await both.wait()

    leftovers: Leftovers[object] = Leftovers(abandon)
    manager = UserContextManager()
    context = manager.create_isolated_context("alice")
    with leftovers.watch(context, object()), leftovers.watch(context, object()):
        async with asyncio.timeout(5):
            await context.aclose()
        assert both.n_waiting == 0


async def test_a_generator_that_is_closed_elsewhere_changes_nothing_there(emptied: Database) -> None:
    """The block of the task that closes it stays the one that its next block is inside of."""
    async with open_pool("psycopg", emptied.app, size=2) as pool:
        with running_as(pool.manager(), "alice"):

            async def rows() -> AsyncGenerator[None]:
                async with pool.plugin.transaction():
                    yield

            begun = rows()
            await asyncio.create_task(anext(begun))
            async with pool.plugin.transaction() as connection:
                await begun.aclose()
                async with pool.plugin.transaction() as same:
                    assert same is connection
