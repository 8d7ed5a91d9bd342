"""A transaction cancelled at each of its awaits, and connections that die: who comes next gets their own reply."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, of, open_pool
from support.contexts import running_as
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import UserContextManager
from ucm_middleware.current import ambient
from ucm_middleware.testing import RecordingLedger
from ucm_postgres import asyncpg as ucm_asyncpg
from ucm_postgres import transaction


@pytest.fixture(params=DRIVERS)
async def pool(
    request: pytest.FixtureRequest, emptied: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    monkeypatch.setattr(transaction, "GRACE", 0.2)  # so that what hangs for ever does not take the tests as long
    async with open_pool(request.param, emptied.app.at(postgres_proxy.port)) as pool:
        # What is asked and prepared once for each connection is out of the way.
        await write(pool, pool.manager(), "carol", "warm")
        yield pool


async def write(pool: Pool, manager: UserContextManager, user: str, body: str) -> None:
    with running_as(manager, user):
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, "select %s::text", body)
            await pool.run(connection, INSERT, body)


async def next_one(pool: Pool, user: str) -> list[Any]:
    """What the next borrower gets: answers to what they ask, and only what is theirs."""
    with running_as(pool.manager(), user):
        async with asyncio.timeout(15), pool.plugin.transaction() as connection:
            for number in range(3):
                question = f"{user} {number}"
                assert await pool.run(connection, "select %s::text", question) == [(question,)]
            assert await pool.run(connection, "select current_setting('app.user_id')") == [(user,)]
            return of(user, await pool.run(connection, BODIES))


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel it, and let it have the rounds of the loop that it takes to notice."""
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)


class TestATransactionThatIsCancelled:
    # BEGIN and binding, two statements, COMMIT, reset: at each an answer that does not come.
    @pytest.mark.parametrize("answered", range(7))
    @pytest.mark.parametrize("direction", ["replies", "requests"])
    async def test_leaves_its_own_reply_to_whoever_comes_next(
        self, pool: Pool, postgres_proxy: TcpProxy, answered: int, direction: Any
    ) -> None:
        manager = pool.manager()
        postgres_proxy.hold(direction, after=answered)
        task = asyncio.create_task(write(pool, manager, "alice", "milk"))
        held = asyncio.create_task(postgres_proxy.until_held(direction))
        await asyncio.wait((task, held), return_when=asyncio.FIRST_COMPLETED)
        await cancelled(task)
        postgres_proxy.release(direction)
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        held.cancel()
        assert await next_one(pool, "bob") == []
        # Not half of it: all of it or nothing.
        assert await next_one(pool, "alice") in ([], ["milk"])
        assert not manager.get_active_contexts()

    async def test_at_its_commit_is_on_record_as_it_ended(
        self, pool: Pool, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction, "GRACE", 15)
        ledger = RecordingLedger()
        manager = pool.manager(ledger=ledger)
        [before] = await ask(pool, "select pg_backend_pid()")

        async def commit() -> None:
            with running_as(manager, "alice"):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, "milk")
                    postgres_proxy.hold("replies")

        task = asyncio.create_task(commit())
        await postgres_proxy.until_held("replies")
        await cancelled(task)
        postgres_proxy.release("replies")
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: len(ledger.select("transaction")) == 2, "the end is on record")
        assert dict(ledger.select("transaction")[1].data)["phase"] == "commit"
        assert await next_one(pool, "alice") == ["milk"]
        assert await ask(pool, "select pg_backend_pid()") == [before]

    async def test_does_so_at_any_moment(self, pool: Pool) -> None:
        manager = pool.manager()
        for rounds in range(0, 120, 3):
            task = asyncio.create_task(write(pool, manager, "alice", f"milk {rounds}"))
            for _ in range(rounds):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await next_one(pool, "bob") == []

    async def test_that_nobody_answers_any_more_has_its_connection_closed(
        self, pool: Pool, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction, "GRACE", 0.05)
        ledger = RecordingLedger()
        manager = pool.manager(ledger=ledger)
        [(pid,)] = await ask(pool, "select pg_backend_pid()")
        begun = asyncio.Event()

        async def commit() -> None:
            with running_as(manager, "alice"):
                async with pool.plugin.transaction() as connection:
                    await pool.run(connection, INSERT, "milk")
                    postgres_proxy.hold("requests")
                    begun.set()

        task = asyncio.create_task(commit())
        await begun.wait()
        await postgres_proxy.until_held("requests")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: len(ledger.select("transaction")) == 2, "the end is on record")
        [_, end] = ledger.select("transaction")
        assert (dict(end.data)["phase"], end.outcome) == ("unknown", "failed")
        postgres_proxy.cut()
        postgres_proxy.release("requests")
        assert await next_one(pool, "bob") == []
        assert await ask(pool, "select pg_backend_pid()") != [(pid,)]


async def test_a_commit_that_ends_in_time_leaves_the_next_borrower_alone(
    pool: Pool, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its context closes meanwhile: from then on it has so much time, and not the connection, whosever that is then."""
    monkeypatch.setattr(transaction, "GRACE", 0.3)
    context = pool.manager().create_isolated_context("alice")
    held = asyncio.Event()

    async def commit() -> None:
        ambient.set(context)  # for this task: the closing does not wait for it as for a handler
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, INSERT, "milk")
            postgres_proxy.hold("replies")
            held.set()

    task = asyncio.create_task(commit())
    await held.wait()
    await postgres_proxy.until_held("replies")
    closing = asyncio.create_task(context.aclose("cleared"))
    await cancelled(asyncio.create_task(asyncio.Event().wait()))  # as many rounds as it takes to begin
    postgres_proxy.release("replies")
    await asyncio.gather(task, closing)
    with running_as(pool.manager(), "bob"):
        async with pool.plugin.transaction() as connection:
            assert await pool.run(connection, "select 1 from pg_sleep(0.6)") == [(1,)]
    assert await next_one(pool, "alice") == ["milk"]


async def test_a_reset_that_nobody_answers_takes_its_connection_along(
    emptied: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With asyncpg the block waits for it. (psycopg's pool resets in a task of its own.)"""
    monkeypatch.setattr(ucm_asyncpg, "GRACE", 0.2)
    async with open_pool("asyncpg", emptied.app.at(postgres_proxy.port)) as pool:
        await write(pool, pool.manager(), "carol", "warm")
        with running_as(pool.manager(), "alice"):
            async with asyncio.timeout(10), pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                postgres_proxy.hold("replies", after=1)  # COMMIT's arrives
        postgres_proxy.cut()
        postgres_proxy.release("replies")
        assert await next_one(pool, "alice") == ["milk"]


class TestAConnectionThatDies:
    @pytest.mark.parametrize("how", ["killed", "cut"])
    async def test_in_a_transaction_is_that_ones_error_and_nobody_elses(
        self, pool: Pool, postgres_proxy: TcpProxy, emptied: Database, how: str
    ) -> None:
        ledger = RecordingLedger()
        with running_as(pool.manager(ledger=ledger), "alice"), pytest.raises(DEAD):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                [(pid,)] = await pool.run(connection, "select pg_backend_pid()")
                die(how, emptied, postgres_proxy, pid)
                await pool.run(connection, INSERT, "bread")
        assert [dict(record.data)["phase"] for record in ledger.select("transaction")] == ["begin", "rollback"]
        assert await next_one(pool, "bob") == []
        assert await next_one(pool, "alice") == []

    @pytest.mark.parametrize("how", ["killed", "cut"])
    async def test_before_its_commit_fails_the_commit(
        self, pool: Pool, postgres_proxy: TcpProxy, emptied: Database, how: str
    ) -> None:
        with running_as(pool.manager(), "alice"), pytest.raises(DEAD):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                [(pid,)] = await pool.run(connection, "select pg_backend_pid()")
                die(how, emptied, postgres_proxy, pid)
        assert await next_one(pool, "alice") == []

    async def test_and_is_not_minded_fails_the_commit_all_the_same(
        self, pool: Pool, postgres_proxy: TcpProxy, emptied: Database
    ) -> None:
        ledger = RecordingLedger()
        with running_as(pool.manager(ledger=ledger), "alice"), pytest.raises(DEAD):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, "milk")
                postgres_proxy.cut()
                with contextlib.suppress(*DEAD):
                    await pool.run(connection, INSERT, "bread")
        assert [dict(record.data)["phase"] for record in ledger.select("transaction")] == ["begin", "rollback"]
        assert await next_one(pool, "alice") == []

    @pytest.mark.parametrize("how", ["killed", "cut"])
    async def test_in_the_pool_is_replaced(
        self, pool: Pool, postgres_proxy: TcpProxy, emptied: Database, how: str
    ) -> None:
        [(pid,)] = await ask(pool, "select pg_backend_pid()")
        await pool.settled()
        die(how, emptied, postgres_proxy, pid)
        # Who finds it dead is told so; psycopg's pool finds out by itself where it was made with check=.
        try:
            await write(pool, pool.manager(), "alice", "milk")
        except DEAD:
            await write(pool, pool.manager(), "alice", "milk")
        assert await next_one(pool, "alice") == ["milk"]
        assert await next_one(pool, "bob") == []


DEAD = (
    psycopg.OperationalError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # when it has heard of the end, and not yet seen it
    ConnectionError,
)


def die(how: str, database: Database, proxy: TcpProxy, pid: int) -> None:
    if how == "cut":
        proxy.cut()
        return
    with psycopg.connect(database.superuser.dsn) as connection:
        connection.execute("select pg_terminate_backend(%s, 5000)", [pid])


async def ask(pool: Pool, question: str) -> list[tuple[Any, ...]]:
    with running_as(pool.manager(), "carol"):
        async with pool.plugin.transaction() as connection:
            return await pool.run(connection, question)
