"""What is refused: clearly, and before anything unbound reaches the server. And ids that look like SQL."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, of, open_pool
from support.contexts import running_as, visitor
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    InvalidContextError,
    LedgerUnavailableError,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.audit import Row
from ucm_middleware.testing import RecordingLedger
from ucm_postgres import Binding

DOWN = (psycopg.OperationalError, asyncpg.PostgresConnectionError, OSError)
READ_ONLY = (psycopg.errors.ReadOnlySqlTransaction, asyncpg.ReadOnlySQLTransactionError)


@pytest.fixture(params=DRIVERS)
async def pool(request: pytest.FixtureRequest, emptied: Database, postgres_proxy: TcpProxy) -> AsyncIterator[Pool]:
    async with open_pool(request.param, emptied.app.at(postgres_proxy.port)) as pool:
        yield pool


@contextlib.contextmanager
def nothing_said(proxy: TcpProxy) -> Iterator[None]:
    """In the block the server hears nothing, on connections that are open already."""
    before = proxy.round_trips
    yield
    assert proxy.round_trips == before


async def enter(pool: Pool) -> None:
    async with pool.plugin.transaction() as connection:
        await pool.run(connection, "select 1")


class TestNothingIsSaidToTheServer:
    async def test_outside_of_a_context(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        with nothing_said(postgres_proxy), pytest.raises(ContextNotFoundError):
            await enter(pool)

    async def test_in_an_anonymous_context(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        context = visitor(pool.manager())
        async with managed_user_context(context):
            with nothing_said(postgres_proxy), pytest.raises(UnauthenticatedError, match="identify the user first"):
                await enter(pool)
            context.bind("alice")  # nothing was done as nobody
            await enter(pool)

    async def test_in_a_closed_context(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        with running_as(pool.manager(), "alice") as context:
            context.close()
            with nothing_said(postgres_proxy), pytest.raises(ContextClosedError):
                await enter(pool)

    async def test_through_a_transaction_of_a_closed_context(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        context = pool.manager().create_context_with_transaction("alice")
        session = context.db_session
        context.close()
        with nothing_said(postgres_proxy), pytest.raises(ContextClosedError):
            await session.execute("select 1")

    @pytest.mark.parametrize("user_id", ["", "a\0b", "x" * 10_000, "a\nb", "null"])
    async def test_for_an_id_that_breaks_a_rule(self, pool: Pool, postgres_proxy: TcpProxy, user_id: str) -> None:
        with nothing_said(postgres_proxy), pytest.raises(InvalidContextError, match="user_id"):
            await pool.manager().execute_in_transaction(user_id, "select 1")

    async def test_that_cannot_be_recorded(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "transaction":
                    raise LedgerUnavailableError("disk full")
                super().append(row)

        manager = pool.manager(ledger=Full())
        with running_as(manager, "alice"), nothing_said(postgres_proxy), pytest.raises(LedgerUnavailableError):
            await enter(pool)
        with running_as(pool.manager(), "alice"):
            await enter(pool)

    async def test_when_another_plugin_refuses(self, pool: Pool, postgres_proxy: TcpProxy) -> None:
        class Refuses:
            @hookimpl
            def ucm_bind_session(self, session: object) -> None:
                raise PermissionError

        manager = UserContextManager(plugins=[pool.plugin, Refuses()])
        await pool.settled()
        with running_as(manager, "alice"):
            before = postgres_proxy.round_trips
            with pytest.raises(PermissionError):
                await enter(pool)
            await pool.settled()
        # Its reset is all that it is told.
        assert postgres_proxy.round_trips - before <= 1
        with running_as(pool.manager(), "alice"):
            await enter(pool)

    async def test_with_parameters_that_a_driver_does_not_take(self, pool: Pool) -> None:
        if pool.driver == "asyncpg":
            for wrong in ({"a": 1}, "abc"):
                with pytest.raises(ConfigurationError, match="asyncpg takes a list"):
                    await pool.manager().execute_in_transaction("alice", "select $1", wrong)
        else:
            read = await pool.manager().execute_in_transaction("alice", "select %(a)s::int as a", {"a": 1})
            assert read.rows == ({"a": 1},)


@pytest.mark.parametrize("driver", DRIVERS)
class TestARole:
    async def test_is_taken_on_for_the_transaction(self, emptied: Database, driver: str) -> None:
        role = emptied.login(f"reader_{driver}", "nologin").user
        emptied.execute(f"grant {role} to {{app}} with set true, inherit false", as_=emptied.superuser)
        emptied.execute(f"grant select on notes to {role}")
        for binding in (Binding(role=role), Binding(role_of=lambda context: role)):
            async with open_pool(driver, emptied.app, binding=binding) as pool:
                with running_as(pool.manager(), "alice"):
                    async with pool.plugin.transaction() as connection:
                        assert await pool.run(connection, "select current_user, session_user") == [
                            (role, emptied.app.user)
                        ]
                        assert await pool.run(connection, BODIES) == []
                    async with pool.borrow() as connection:
                        assert await pool.run(connection, "select current_user") == [(emptied.app.user,)]
        emptied.execute(f"revoke select on notes from {role}")

    async def test_of_a_child_is_its_own(self, emptied: Database, driver: str) -> None:
        """Else code that is given less would have what its parent's has."""
        more, less = (emptied.login(f"{name}_{driver}", "nologin").user for name in ("more", "less"))
        emptied.execute(f"grant {more}, {less} to {{app}} with set true, inherit false", as_=emptied.superuser)
        binding = Binding(role_of=lambda context: less if context.operation_depth else more)
        question = "select current_user"
        async with open_pool(driver, emptied.app, binding=binding, size=2) as pool:
            with running_as(pool.manager(), "alice") as context:
                async with pool.plugin.transaction() as connection:
                    child = context.create_child_context("part")
                    async with managed_user_context(child), pool.plugin.transaction() as own:
                        assert await pool.run(own, question) == [(less,)]
                    assert await pool.run(connection, question) == [(more,)]

    @pytest.mark.parametrize("role", ["nobody_is_called_so", 'quo"ted', "postgres"])
    async def test_that_cannot_be_taken_on_is_named_and_nothing_is_done(
        self, emptied: Database, driver: str, role: str
    ) -> None:
        async with open_pool(driver, emptied.app, binding=Binding(role=role)) as pool:
            manager = pool.manager()
            with running_as(manager, "alice"), pytest.raises(ConfigurationError, match=f"the role {role}: .*role"):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, "milk")
            with pytest.raises(ConfigurationError, match="GRANT role TO login"):
                await manager.execute_in_transaction("alice", pool.statement(INSERT), ["milk"])
        async with open_pool(driver, emptied.app, binding=Binding(role_of=lambda context: role)) as pool:
            with running_as(pool.manager(), "alice"), pytest.raises(ConfigurationError, match="that role_of gives"):
                await enter(pool)
        async with open_pool(driver, emptied.app) as pool, pool.borrow():
            with running_as(pool.manager(), "alice"):
                pass
        assert notes_of(emptied) == []

    async def test_that_cannot_be_found_out_is_an_error_of_its_own(self, emptied: Database, driver: str) -> None:
        def fails(context: UserExecutionContext) -> str:
            raise LookupError(context.user_id)

        async with open_pool(driver, emptied.app, binding=Binding(role_of=fails)) as pool:
            for _ in range(2):
                with running_as(pool.manager(), "alice"), pytest.raises(LookupError):
                    await enter(pool)


class TestTheServer:
    async def test_that_is_down_is_an_error_and_takes_nothing_along(
        self, emptied: Database, postgres_proxy: TcpProxy, pool: Pool
    ) -> None:
        ledger = RecordingLedger()
        manager = pool.manager(ledger=ledger)
        postgres_proxy.refuse()
        postgres_proxy.cut()
        if pool.driver == "psycopg":
            pool.raw.timeout = 0.2
        for _ in range(2):
            with running_as(manager, "alice"), pytest.raises(DOWN):
                await enter(pool)
        postgres_proxy.refuse(False)
        if pool.driver == "psycopg":
            pool.raw.timeout = 30
        with running_as(manager, "alice"):
            await enter(pool)
        ends = [(dict(record.data)["phase"], record.outcome) for record in ledger.select("transaction")]
        assert ends == [("begin", "ok"), ("rollback", "failed")] * 2 + [("begin", "ok"), ("commit", "ok")]

    async def test_that_only_reads_is_read_and_not_written(self, emptied: Database, pool: Pool) -> None:
        with running_as(pool.manager(), "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
            with pytest.raises(READ_ONLY):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, "set transaction read only")
                    assert of("alice", await pool.run(connection, BODIES)) == ["milk"]
                    await pool.run(connection, INSERT, "bread")
        assert notes_of(emptied) == [("alice", "milk")]


@pytest.mark.parametrize(
    "user_id",
    ["o'brien", 'a"b', "back\\slash", "x', true); drop table notes; --", "$1 %s {0}", "Zoë 用户", "ÿ" * 256, "*", "''"],
)
async def test_an_id_is_a_value_whatever_it_looks_like(pool: Pool, emptied: Database, user_id: str) -> None:
    with running_as(pool.manager(), user_id):
        async with pool.plugin.transaction() as connection:
            [(pid,)] = await pool.run(connection, "select pg_backend_pid()")
            await pool.run(connection, INSERT, "milk")
            assert of(user_id, await pool.run(connection, BODIES)) == ["milk"]
        async with pool.plugin.transaction():
            with psycopg.connect(emptied.superuser.dsn) as other:
                shown = other.execute("select query from pg_stat_activity where pid = %s", [pid]).fetchone()
    assert shown is not None
    assert "set_config" in shown[0]  # what the server shows of it is the statement, and not whom it is for
    assert user_id not in shown[0].replace("$1, $2, true", "")
    with running_as(pool.manager(), "bob"):
        async with pool.plugin.transaction() as connection:
            assert await pool.run(connection, BODIES) == []


def notes_of(database: Database) -> list[Any]:
    """All that is committed, of everybody."""
    with psycopg.connect(database.superuser.dsn) as connection:
        return connection.execute("select user_id, body from notes order by id").fetchall()
