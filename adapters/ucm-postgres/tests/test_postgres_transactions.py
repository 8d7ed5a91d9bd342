"""Transactions of a user's, on the pools of both drivers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextvars import Context
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, of, open_pool
from support.contexts import running_as
from support.postgres import Database
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    HandleRevokedError,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.current import ambient
from ucm_middleware.testing import FakeClock, RecordingLedger


@pytest.fixture(params=DRIVERS)
async def pool(request: pytest.FixtureRequest, emptied: Database) -> AsyncIterator[Pool]:
    async with open_pool(request.param, emptied.app) as pool:
        yield pool


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(pool: Pool, ledger: RecordingLedger) -> UserContextManager:
    return pool.manager(ledger=ledger)


def phases(ledger: RecordingLedger, user: str = "alice") -> list[tuple[object, object]]:
    told = [dict(record.data) for record in ledger.select("transaction", user=user)]
    return [(data["phase"], data.get("statements")) for data in told]


async def bodies(pool: Pool, manager: UserContextManager, user: str) -> list[Any]:
    """What is committed of a user's, as that user sees it."""
    with running_as(manager, user):
        async with pool.plugin.transaction() as connection:
            return of(user, await pool.run(connection, BODIES))


FAILED = (psycopg.errors.InFailedSqlTransaction, asyncpg.InFailedSQLTransactionError)


class TestABlock:
    async def test_is_the_users_and_committed_at_its_end(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        for user in ("alice", "bob"):
            with running_as(manager, user):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, f"of {user}")
                    assert await pool.run(connection, BODIES) == [(user, f"of {user}")]
        assert await bodies(pool, manager, "alice") == ["of alice"]
        assert phases(ledger)[:2] == [("begin", None), ("commit", 2)]
        assert "of alice" not in repr(ledger.records)
        told = [dict(record.data) for record in ledger.select("transaction")]
        assert {(data["bound_by"], data.get("role"), data.get("signed")) for data in told} == {
            ("app.user_id", None, None)
        }

    async def test_is_rolled_back_after_an_error(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        with running_as(manager, "alice"), pytest.raises(ZeroDivisionError):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                raise ZeroDivisionError
        assert phases(ledger) == [("begin", None), ("rollback", 1)]
        assert await bodies(pool, manager, "alice") == []

    async def test_of_which_a_statement_failed_is_not_taken_for_committed(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        """A server answers COMMIT with a rollback then, and drivers let that pass."""
        with running_as(manager, "alice"), pytest.raises(FAILED, match="a statement of this transaction failed"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                with contextlib.suppress(psycopg.errors.DivisionByZero, asyncpg.DivisionByZeroError):
                    await pool.run(connection, "select 1 / 0")
        assert phases(ledger) == [("begin", None), ("rollback", 2)]
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "bread")
                with contextlib.suppress(psycopg.errors.DivisionByZero, asyncpg.DivisionByZeroError):
                    async with pool.plugin.transaction():
                        await pool.run(connection, "select 1 / 0")
        assert await bodies(pool, manager, "alice") == ["bread"]

    async def test_that_commits_by_hand_has_no_user_any_more(self, pool: Pool, manager: UserContextManager) -> None:
        told = pytest.raises((psycopg.ProgrammingError, asyncpg.InterfaceError), match="has ended the transaction")
        with running_as(manager, "alice"), told:
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                await connection.execute("commit")
                assert await pool.run(connection, BODIES) == []
                [(user,)] = await pool.run(connection, "select current_setting('app.user_id', true)")
                assert not user
        assert await bodies(pool, manager, "alice") == ["milk"]

    async def test_inside_of_another_is_a_savepoint(self, pool: Pool, manager: UserContextManager) -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                async with pool.plugin.transaction() as same:
                    assert same is connection
                    await pool.run(same, INSERT, "bread")
                with pytest.raises(ZeroDivisionError):
                    async with pool.plugin.transaction():
                        await pool.run(connection, INSERT, "wine")
                        raise ZeroDivisionError
                assert of("alice", await pool.run(connection, BODIES)) == ["milk", "bread"]
        assert await bodies(pool, manager, "alice") == ["milk", "bread"]

    async def test_keeps_its_user_after_a_savepoint_is_rolled_back(
        self, pool: Pool, manager: UserContextManager
    ) -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                with pytest.raises(ZeroDivisionError):
                    async with connection.transaction():
                        raise ZeroDivisionError
                await pool.run(connection, INSERT, "milk")
                assert of("alice", await pool.run(connection, BODIES)) == ["milk"]

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    async def test_has_the_isolation_that_it_asks_for(
        self, pool: Pool, manager: UserContextManager, level: Any
    ) -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction(isolation_level=level) as connection:
                assert await pool.run(connection, "show transaction_isolation") == [(level.lower(),)]
                async with pool.plugin.transaction(isolation_level=level):
                    pass
            async with pool.plugin.transaction() as connection:
                assert await pool.run(connection, "show transaction_isolation") == [("read committed",)]

    async def test_with_a_wrong_isolation_is_refused(self, pool: Pool, manager: UserContextManager) -> None:
        level: Any = "SNAPSHOT"
        with running_as(manager, "alice"):
            with pytest.raises(ConfigurationError, match="isolation_level is 'SNAPSHOT'"):
                async with pool.plugin.transaction(isolation_level=level):
                    pass
            async with pool.plugin.transaction(isolation_level="SERIALIZABLE"):
                with pytest.raises(ConfigurationError, match="savepoint"):
                    async with pool.plugin.transaction(isolation_level="READ COMMITTED"):
                        pass

    async def test_of_each_task_is_its_own(self, emptied: Database, pool: Pool) -> None:
        async with open_pool(pool.driver, emptied.app, size=2) as two:
            manager = two.manager()
            both = asyncio.Barrier(2)

            async def work() -> Any:
                async with two.plugin.transaction() as connection:
                    await both.wait()
                    return await two.run(connection, "select pg_backend_pid()")

            with running_as(manager, "alice"):
                first, second = await asyncio.gather(work(), work())
            assert first != second

    async def test_of_a_task_that_outlives_the_block_is_another(self, pool: Pool, manager: UserContextManager) -> None:
        after = asyncio.Event()

        async def work() -> list[Any]:
            await after.wait()
            async with pool.plugin.transaction() as connection:
                return await pool.run(connection, BODIES)

        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                task = asyncio.create_task(work())
            after.set()
            assert await task == [("alice", "milk")]

    async def test_of_a_child_is_the_same(self, pool: Pool, manager: UserContextManager) -> None:
        with running_as(manager, "alice") as context:
            child = context.create_child_context("part")
            async with (
                pool.plugin.transaction() as connection,
                managed_user_context(child),
                pool.plugin.transaction() as same,
            ):
                assert same is connection
                await pool.run(same, INSERT, "milk")
        assert await bodies(pool, manager, "alice") == ["milk"]

    async def test_outside_of_a_context_is_refused(self, pool: Pool) -> None:
        with pytest.raises(ContextNotFoundError):
            async with pool.plugin.transaction():
                pass


class TestTheConnection:
    async def test_is_nobody_elses(self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger) -> None:
        async def steal(connection: Any) -> None:
            with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
                await pool.run(connection, BODIES)

        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await asyncio.create_task(steal(connection), context=Context())
        assert [record.user_id for record in ledger.select("denied")] == ["bob"]

    async def test_is_another_one_for_another_user(self, emptied: Database, pool: Pool) -> None:
        async with open_pool(pool.driver, emptied.app, size=2) as two:
            manager = two.manager()
            with running_as(manager, "alice"):
                async with two.plugin.transaction() as connection:
                    await two.run(connection, INSERT, "milk")
                    with manager.privileged(reason="support", users=["bob"]), running_as(manager, "bob"):
                        async with two.plugin.transaction() as of_bob:
                            assert await two.run(of_bob, BODIES) == []
                            await two.run(of_bob, INSERT, "beer")
                    async with two.plugin.transaction() as hers_again:
                        assert hers_again is connection
            assert await bodies(two, manager, "bob") == ["beer"]
            assert await bodies(two, manager, "alice") == ["milk"]

    async def test_is_not_of_use_after_the_block(self, pool: Pool, manager: UserContextManager) -> None:
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                use = connection.execute
            with pytest.raises(HandleRevokedError):
                await pool.run(connection, BODIES)
            with pytest.raises(HandleRevokedError):
                await use("select 1")

    @pytest.mark.parametrize("how", ["clear", "cleanup", "cleanup_all", "expiry", "revocation", "shutdown"])
    async def test_is_taken_from_whoever_hangs_on_to_it_when_the_context_closes(
        self, pool: Pool, ledger: RecordingLedger, how: str
    ) -> None:
        clock = FakeClock()
        manager = pool.manager(ledger=ledger, clock=clock)
        context = manager.create_isolated_context("alice", ttl_seconds=60)
        key = ("alice", context.request_id)
        block, connection = await asyncio.create_task(hang_on(pool, context))
        [(pid,)] = await pool.run(connection, "select pg_backend_pid()")
        match how:
            case "clear":
                assert manager.clear_context(key)
            case "cleanup":
                assert await manager.cleanup_context(key)
            case "cleanup_all":
                assert manager.cleanup_all_contexts() == 1
            case "expiry":
                clock.advance(61)
                manager.sweep()
            case "revocation":
                manager.revoke("alice", "stolen")
            case "shutdown":
                await manager.drain(0)
        await context.lifetime.wait_closed()
        with pytest.raises(ContextClosedError):
            await pool.run(connection, BODIES)
        assert phases(ledger) == [("begin", None), ("rollback", 2)]
        # It is the only one of the pool: who comes next waits for nothing, and gets another connection.
        others = pool.manager()
        with running_as(others, "bob"):
            async with pool.plugin.transaction() as next_one:
                assert await pool.run(next_one, "select pg_backend_pid() = %s::int", pid) == [(False,)]
        assert await bodies(pool, others, "alice") == []
        with pytest.raises(ContextClosedError):
            await block.__aexit__(None, None, None)


async def hang_on(pool: Pool, context: UserExecutionContext) -> Any:
    """Enter a block in the context, write, and leave without ending it."""
    ambient.set(context)  # for this task: nobody waits for it as for a handler
    block = pool.plugin.transaction()
    connection = await block.__aenter__()
    await pool.run(connection, INSERT, "milk")
    return block, connection


class TestTheManagersOwn:
    async def test_statement_is_the_users(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        insert = pool.statement(INSERT)
        for user in ("alice", "bob"):
            written = await manager.execute_in_transaction(user, insert, [f"of {user}"])
            assert (written.rows, written.rowcount) == ((), 1)
        read = await manager.execute_in_transaction("alice", BODIES, isolation_level="SERIALIZABLE")
        assert (read.rows, read.rowcount) == (({"user_id": "alice", "body": "of alice"},), 1)
        assert phases(ledger) == [("begin", None), ("commit", 1)] * 2
        assert not manager.get_active_contexts()

    async def test_context_is_committed_when_it_ends_well(self, pool: Pool, manager: UserContextManager) -> None:
        insert = pool.statement(INSERT)
        async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
            assert (await context.db_session.execute(insert, ["milk"])).rowcount == 1
            connection = await context.db_session.connection()
            await pool.run(connection, INSERT, "bread")
        assert await bodies(pool, manager, "alice") == ["milk", "bread"]
        with pytest.raises(ContextClosedError):
            await pool.run(connection, BODIES)

    async def test_context_is_rolled_back_after_an_error(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
                await context.db_session.execute(pool.statement(INSERT), ["milk"])
                raise ZeroDivisionError
        assert phases(ledger) == [("begin", None), ("rollback", 1)]
        assert await bodies(pool, manager, "alice") == []

    async def test_context_that_asks_nothing_takes_no_connection(
        self, pool: Pool, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async with pool.borrow(), managed_user_context(manager.create_context_with_transaction("alice")):
            pass  # the only connection is lent out all the time
        assert phases(ledger) == []

    async def test_statement_of_another_user_is_refused(self, pool: Pool, manager: UserContextManager) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await manager.execute_in_transaction("alice", BODIES)
        with running_as(manager, "bob"), manager.privileged(reason="support", users=["alice"]):
            assert (await manager.execute_in_transaction("alice", BODIES)).rows == ()


class TestThePlugin:
    async def test_lets_no_two_users_share_anything(self, emptied: Database, pool: Pool) -> None:
        async with open_pool(pool.driver, emptied.app, size=2) as two:
            manager = two.manager()
            contexts = [manager.create_isolated_context(user) for user in ("alice", "bob")]
            held = [await asyncio.create_task(hang_on(two, context)) for context in contexts]
            assert manager.validate_isolation()
            assert held[0][1] is not held[1][1]
            for context in contexts:
                await context.aclose()
            for block, _ in held:
                with pytest.raises(ContextClosedError):
                    await block.__aexit__(None, None, None)

    async def test_binds_what_others_bind(self, pool: Pool) -> None:
        seen: list[object] = []

        class Other:
            @hookimpl
            def ucm_bind_session(self, context: UserExecutionContext, session: object) -> None:
                seen.append((context.user_id, session))
                if context.user_id == "mallory":
                    raise CrossUserAccessError("not this one")

        manager = UserContextManager(plugins=[pool.plugin, Other()])
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                assert repr(type(seen[0][1])) != repr(type(connection))  # type: ignore[index]
        with running_as(manager, "mallory"), pytest.raises(CrossUserAccessError, match="not this one"):
            async with pool.plugin.transaction():
                pass
        assert await bodies(pool, manager, "alice") == []
