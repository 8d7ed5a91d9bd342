"""Transactions of code in threads, on psycopg's ConnectionPool."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from postgres_drivers import BODIES, INSERT, of
from support.contexts import running_as, visitor
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    HandleRevokedError,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    managed_user_context,
)
from ucm_middleware.current import ambient
from ucm_middleware.testing import FakeClock, RecordingLedger
from ucm_postgres import Binding, psycopg_threads
from ucm_postgres.psycopg_connection import shut_down
from ucm_postgres.psycopg_threads import PsycopgThreadPool, reset

Raw = ConnectionPool[psycopg.Connection[Any]]


@pytest.fixture
def raw(emptied: Database, postgres_proxy: TcpProxy) -> Iterator[Raw]:
    login = emptied.app.at(postgres_proxy.port)
    pool: Raw = ConnectionPool(login.dsn, min_size=1, max_size=1, open=False, reset=reset, timeout=10)
    with pool:
        pool.wait()
        yield pool


@pytest.fixture
def pool(raw: Raw) -> PsycopgThreadPool[psycopg.Connection[Any]]:
    return PsycopgThreadPool(raw)


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(ledger: RecordingLedger) -> UserContextManager:
    return UserContextManager(ledger=ledger)


def bodies(pool: PsycopgThreadPool[Any], user: str) -> list[Any]:
    with running_as(UserContextManager(), user), pool.transaction() as connection:
        return of(user, connection.execute(BODIES).fetchall())


def phases(ledger: RecordingLedger) -> list[tuple[object, object]]:
    told = [dict(record.data) for record in ledger.select("transaction")]
    return [(data["phase"], data.get("statements")) for data in told]


def test_a_block_is_the_users_and_committed_at_its_end(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    with running_as(manager, "alice"):
        with pool.transaction(isolation_level="SERIALIZABLE") as connection:
            connection.execute(INSERT, ["milk"])
            assert connection.execute("show transaction_isolation").fetchone() == ("serializable",)
            with pool.transaction() as same:
                assert same is connection
            with pytest.raises(ZeroDivisionError), pool.transaction():
                connection.execute(INSERT, ["wine"])
                raise ZeroDivisionError
        with pytest.raises(HandleRevokedError):
            connection.execute(BODIES)
        with pool.transaction() as connection:
            assert connection.execute("show transaction_isolation").fetchone() == ("read committed",)
    assert phases(ledger) == [("begin", None), ("commit", 3), ("begin", None), ("commit", 1)]
    assert (bodies(pool, "alice"), bodies(pool, "bob")) == (["milk"], [])


def test_a_block_is_rolled_back_after_an_error(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    with running_as(manager, "alice"), pytest.raises(ZeroDivisionError), pool.transaction() as connection:
        connection.execute(INSERT, ["milk"])
        raise ZeroDivisionError
    assert phases(ledger) == [("begin", None), ("rollback", 1)]
    assert bodies(pool, "alice") == []


def test_a_block_of_which_a_statement_failed_is_not_taken_for_committed(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    refused = pytest.raises(psycopg.errors.InFailedSqlTransaction, match="a statement of this transaction failed")
    with running_as(manager, "alice"), refused, pool.transaction() as connection:
        connection.execute(INSERT, ["milk"])
        with contextlib.suppress(psycopg.errors.DivisionByZero):
            connection.execute("select 1 / 0")
    assert phases(ledger) == [("begin", None), ("rollback", 2)]
    assert bodies(pool, "alice") == []


def test_what_is_left_behind_is_reset(raw: Raw, pool: PsycopgThreadPool[Any], manager: UserContextManager) -> None:
    with running_as(manager, "alice"), pool.transaction() as connection:
        connection.execute("set app.user_id = 'alice'; set statement_timeout = 12345")
    with raw.connection() as plain:
        assert plain.execute("select current_setting('app.user_id', true)").fetchone() in ((None,), ("",))
        assert plain.execute("show statement_timeout").fetchone() != ("12345ms",)


def test_the_connection_is_nobody_elses(pool: PsycopgThreadPool[Any], manager: UserContextManager) -> None:
    def steal(connection: Any) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            connection.execute(BODIES)

    with running_as(manager, "alice"), pool.transaction() as connection:
        Context().run(steal, connection)


def test_nothing_unbound_is_said(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, postgres_proxy: TcpProxy
) -> None:
    before = postgres_proxy.round_trips
    with pytest.raises(ContextNotFoundError), pool.transaction():
        pass
    with managed_user_context(visitor(manager)) as context:
        with pytest.raises(UnauthenticatedError), pool.transaction():
            pass
        context.bind("alice")
        context.close()
        with pytest.raises(ContextClosedError), pool.transaction():
            pass
    with running_as(manager, "alice"):
        level: Any = "SNAPSHOT"
        with pytest.raises(ConfigurationError, match="isolation_level"), pool.transaction(isolation_level=level):
            pass
    assert postgres_proxy.round_trips == before


def test_binding_costs_no_round_trip(
    raw: Raw, pool: PsycopgThreadPool[Any], manager: UserContextManager, postgres_proxy: TcpProxy
) -> None:
    with running_as(manager, "alice"):
        before = postgres_proxy.round_trips
        with pool.transaction():
            assert postgres_proxy.round_trips - before == 1


def test_a_role_that_is_missing_is_named(raw: Raw, manager: UserContextManager) -> None:
    pool = PsycopgThreadPool(raw, Binding(role="nobody_is_called_so"))
    for _ in range(2):
        refused = pytest.raises(ConfigurationError, match="the role nobody_is_called_so")
        with running_as(manager, "alice"), refused, pool.transaction():
            pass
    assert bodies(PsycopgThreadPool(raw), "alice") == []


def test_a_block_that_ends_in_another_users_code_gives_its_connection_back(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    """As a generator of alice's does that is collected while bob's code runs."""

    def rows() -> Iterator[Any]:
        with pool.transaction() as connection:
            yield connection.execute(INSERT, ["milk"])

    begun = rows()
    as_user(manager.create_isolated_context("alice")).run(next, begun)
    with running_as(manager, "bob"):
        begun.close()  # type: ignore[attr-defined]
        with pool.transaction():
            pass
    assert phases(ledger)[:2] == [("begin", None), ("rollback", 1)]
    assert bodies(pool, "alice") == []


def test_a_block_that_closes_the_connection_is_not_committed_and_replaces_it(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    with running_as(manager, "alice"), pytest.raises(psycopg.OperationalError), pool.transaction() as connection:
        connection.execute(INSERT, ["milk"])
        connection.close()
    assert phases(ledger) == [("begin", None), ("rollback", 1)]
    assert bodies(pool, "alice") == []


def test_a_block_that_caught_an_error_is_not_committed(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
) -> None:
    refused = pytest.raises(psycopg.errors.InFailedSqlTransaction, match="a block of its own")
    with running_as(manager, "alice"), refused, pool.transaction() as connection:
        connection.execute(INSERT, ["milk"])
        with contextlib.suppress(psycopg.errors.DivisionByZero):
            connection.execute("select 1 / 0")
    assert phases(ledger) == [("begin", None), ("rollback", 2)]
    assert bodies(pool, "alice") == []


ENDINGS = ("commit", "rollback", "commit and chain", "rollback and chain", "commit; begin", "rollback; begin")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_block_whose_transaction_sql_has_ended_says_so(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger, ending: Any
) -> None:
    refused = pytest.raises(psycopg.ProgrammingError, match="a statement has ended the transaction")
    with running_as(manager, "alice"), refused, pool.transaction() as connection:
        connection.execute(ending)
    assert phases(ledger) == [("begin", None), ("unknown", 1)]
    assert bodies(pool, "alice") == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_error_after_sql_has_ended_the_transaction_puts_no_rollback_on_record(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger, ending: Any
) -> None:
    with running_as(manager, "alice"), pytest.raises(LookupError), pool.transaction() as connection:
        connection.execute(ending)
        raise LookupError
    assert phases(ledger) == [("begin", None), ("unknown", 1)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_context_that_closes_after_sql_has_ended_the_transaction_puts_no_rollback_on_record(
    pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger, ending: Any
) -> None:
    closed = pytest.raises(ContextClosedError)
    with running_as(manager, "alice") as context, closed, pool.transaction() as connection:
        connection.execute(ending)
        context.close()
    assert phases(ledger) == [("begin", None), ("unknown", 1)]


def test_a_block_past_the_deadline_is_not_committed(pool: PsycopgThreadPool[Any], ledger: RecordingLedger) -> None:
    clock = FakeClock()
    manager = UserContextManager(ledger=ledger, clock=clock)

    def work() -> None:
        with pool.transaction() as connection:
            connection.execute(INSERT, ["milk"])
            clock.advance(11)

    with pytest.raises(ContextClosedError):
        as_user(manager.create_isolated_context("alice", ttl_seconds=10)).run(work)
    assert phases(ledger) == [("begin", None), ("rollback", 1)]
    assert bodies(pool, "alice") == []


def test_savepoints_of_two_threads_do_not_overlap(pool: PsycopgThreadPool[Any], manager: UserContextManager) -> None:
    def nested() -> None:
        with pool.transaction():
            pass

    with ThreadPoolExecutor(1) as threads, running_as(manager, "alice"), pool.transaction() as connection:
        here = copy_context()
        with pool.transaction(), pytest.raises(RuntimeError, match="savepoints cannot overlap"):
            threads.submit(here.run, nested).result(10)
        threads.submit(here.run, nested).result(10)
        connection.execute(INSERT, ["milk"])
    assert bodies(pool, "alice") == ["milk"]


class TestTheContextCloses:
    """While a thread is inside of a block: nothing stops a thread."""

    async def test_as_it_waits_for_an_answer(
        self, emptied: Database, pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        def work() -> None:
            with pool.transaction() as connection:
                connection.execute(INSERT, ["milk"])
                connection.execute("select pg_sleep(30)")

        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(as_user(context := manager.create_isolated_context("alice")).run, work)
            wait_until(lambda: is_sleeping(emptied), "the thread asks")
            await manager.cleanup_context(("alice", context.request_id))
            with pytest.raises(psycopg.OperationalError):
                working.result(10)
        assert [phase for phase, _ in phases(ledger)] == ["begin", "rollback"]
        assert bodies(pool, "alice") == []
        wait_until(lambda: not is_sleeping(emptied), "the server has stopped it too")

    async def test_its_line_is_cut_in_nobody_elses_hands(
        self,
        emptied: Database,
        pool: PsycopgThreadPool[Any],
        manager: UserContextManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The statement is cancelled first, so that its block may have ended by then."""
        ended, cut = threading.Event(), threading.Event()

        def late(pgconn: Any) -> None:
            is_stopping = threading.current_thread().name == "ucm_postgres stops a statement"
            if is_stopping:
                assert ended.wait(10)
            shut_down(pgconn)
            if is_stopping:
                cut.set()

        monkeypatch.setattr(psycopg_threads, "shut_down", late)

        def work() -> None:
            with pool.transaction() as connection:
                connection.execute("select pg_sleep(30)")

        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(as_user(context := manager.create_isolated_context("alice")).run, work)
            wait_until(lambda: is_sleeping(emptied), "the thread asks")
            await manager.cleanup_context(("alice", context.request_id))
            with pytest.raises(psycopg.OperationalError):
                working.result(10)
            ended.set()
            assert cut.wait(10)
        assert bodies(pool, "alice") == []

    async def test_as_it_does_something_else(
        self, pool: PsycopgThreadPool[Any], manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        written, closed = threading.Event(), threading.Event()

        def work(use_it: bool) -> None:
            with pool.transaction() as connection:
                connection.execute(INSERT, ["milk"])
                written.set()
                assert closed.wait(10)
                if use_it:
                    connection.execute(INSERT, ["bread"])

        for use_it in (True, False):
            written.clear()
            closed.clear()
            with ThreadPoolExecutor(1) as threads:
                inside = as_user(context := manager.create_isolated_context("alice"))
                working = threads.submit(inside.run, work, use_it)
                assert written.wait(10)
                await manager.cleanup_context(("alice", context.request_id))
                assert bodies(pool, "bob") == []  # the only connection is free again already
                closed.set()
                with pytest.raises(ContextClosedError):
                    working.result(10)  # it is told that nothing of it is committed
        assert [phase for phase, _ in phases(ledger)] == ["begin", "rollback"] * 2
        assert bodies(pool, "alice") == []

    async def test_as_it_waits_for_a_connection(
        self, raw: Raw, pool: PsycopgThreadPool[Any], manager: UserContextManager
    ) -> None:
        def work() -> None:
            with pool.transaction():
                pass

        with ThreadPoolExecutor(1) as threads:
            with raw.connection():
                inside = as_user(context := manager.create_isolated_context("alice"))
                working = threads.submit(inside.run, work)
                wait_until(lambda: raw.get_stats()["requests_waiting"] == 1, "the thread waits")
                await manager.cleanup_context(("alice", context.request_id))
            with pytest.raises(ContextClosedError):
                working.result(10)
        assert bodies(pool, "alice") == []


def as_user(context: UserExecutionContext) -> Context:
    """What a thread runs in that works for this context, and that nobody waits for."""
    inside = Context()
    inside.run(ambient.set, context)
    return inside


def is_sleeping(database: Database) -> bool:
    with psycopg.connect(database.superuser.dsn) as connection:
        question = "select 1 from pg_stat_activity where query = 'select pg_sleep(30)' and state = 'active'"
        return connection.execute(question).fetchone() is not None
