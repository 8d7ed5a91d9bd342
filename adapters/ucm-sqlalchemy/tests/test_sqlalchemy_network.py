"""What the network does: round trips, cancellations at each of them, backends that die, PgBouncer."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.pool import NullPool

from sqlalchemy_notes import DRIVERS, Note, async_engine, bodies, by_text, running, sync_engine, write_notes
from support.contexts import events
from support.pgbouncer import start_pgbouncer
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from support.waiting import wait_until
from ucm_middleware import UserContextManager
from ucm_sqlalchemy import SQLAlchemy

pytestmark = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture
async def engine(database: Database, driver: str, postgres_proxy: TcpProxy) -> AsyncGenerator[AsyncEngine]:
    """One connection, through a proxy."""
    write_notes(database, alice="a1", bob="b1")
    async with async_engine(database.app.at(postgres_proxy.port), driver, pool_timeout=5) as engine:
        yield engine


async def warm(engine: AsyncEngine) -> None:
    """So that connecting and preparing are not counted."""
    for _ in range(7):
        await by_text(engine)


async def round_trips(proxy: TcpProxy, work: Callable[[], Awaitable[Any]]) -> int:
    """How many the work takes."""
    before = proxy.round_trips
    await work()
    return proxy.round_trips - before


@pytest.mark.parametrize(("reset", "psycopg_takes", "asyncpg_takes"), [("return", 1, 2), ("begin", 0, 3)])
async def test_what_the_binding_and_the_reset_take(
    driver: str, engine: AsyncEngine, postgres_proxy: TcpProxy, reset: Any, psycopg_takes: int, asyncpg_takes: int
) -> None:
    """The reset on return takes one round trip; the binding one with asyncpg, and none with psycopg."""
    await warm(engine)
    unbound = await round_trips(postgres_proxy, lambda: by_text(engine))
    manager = UserContextManager(plugins=[SQLAlchemy(engine, reset=reset)])
    async with running(manager, "alice"):
        await warm(engine)
        bound = await round_trips(postgres_proxy, lambda: by_text(engine))
    assert bound - unbound == (psycopg_takes if driver == "psycopg" else asyncpg_takes)


async def work_as_alice(manager: UserContextManager, bound: SQLAlchemy[AsyncSession]) -> None:
    """A transaction with everything in it."""
    async with running(manager, "alice"), bound.unit_of_work() as session:
        session.add(Note(user_id="alice", body="a2"))
        async with bound.unit_of_work():
            await session.execute(text("select 'alice', pg_sleep(0)"))
        assert await bodies(session) == ["a1", "a2"]


@pytest.mark.parametrize("reset", ["return", "begin"])
async def test_cancelled_at_every_answer_the_next_borrower_has_their_own(
    database: Database, driver: str, engine: AsyncEngine, postgres_proxy: TcpProxy, reset: Any
) -> None:
    bound = SQLAlchemy(engine, reset=reset)
    manager = UserContextManager(plugins=[bound])
    async with running(manager, "bob"):
        await warm(engine)
    cut_off_at = 0
    while True:
        database.execute("delete from notes where body = 'a2'", as_=database.superuser)
        postgres_proxy.hold("replies", after=cut_off_at)
        task = asyncio.create_task(work_as_alice(manager, bound))
        held = asyncio.create_task(postgres_proxy.until_held("replies"))
        await asyncio.wait((task, held), return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
        task.cancel()
        postgres_proxy.release("replies")
        held.cancel()
        with suppress(asyncio.CancelledError):
            await task
        with suppress(asyncio.CancelledError):
            await held
        async with running(manager, "bob"):
            assert await by_text(engine) == ["b1"]
            async with engine.begin() as connection:
                assert await connection.scalar(text("select 41 + 1")) == 42
                assert await connection.scalar(text("select current_setting('app.user_id')")) == "bob"
        assert cast("Any", engine.pool).checkedout() == 0
        if finished:
            break
        cut_off_at += 1
    assert cut_off_at > 4


async def test_cancelled_before_every_request_arrives_the_next_borrower_has_their_own(
    database: Database, engine: AsyncEngine, postgres_proxy: TcpProxy
) -> None:
    bound = SQLAlchemy(engine)
    manager = UserContextManager(plugins=[bound])
    async with running(manager, "bob"):
        await warm(engine)
    for cut_off_at in range(6):
        database.execute("delete from notes where body = 'a2'", as_=database.superuser)
        postgres_proxy.hold("requests", after=cut_off_at)
        task = asyncio.create_task(work_as_alice(manager, bound))
        await postgres_proxy.until_held("requests")
        task.cancel()
        postgres_proxy.release("requests")
        with suppress(asyncio.CancelledError):
            await task
        async with running(manager, "bob"):
            assert await by_text(engine) == ["b1"]
        assert cast("Any", engine.pool).checkedout() == 0


async def test_a_commit_whose_answer_is_lost_is_on_record_as_unknown(
    engine: AsyncEngine, postgres_proxy: TcpProxy
) -> None:
    manager = UserContextManager(plugins=[SQLAlchemy(engine)])

    async def work() -> None:
        async with running(manager, "alice"), engine.begin() as connection:
            await connection.execute(text("insert into notes (body) values ('a2')"))
            postgres_proxy.hold("replies")

    task = asyncio.create_task(work())
    await postgres_proxy.until_held("replies")
    postgres_proxy.cut()
    with pytest.raises((DBAPIError, OSError)):
        await task
    postgres_proxy.release("replies")
    begin, end = events(manager, "alice", "transaction")
    assert (begin["phase"], begin["bound_by"]) == ("begin", "app.user_id")
    assert (end["phase"], end["outcome"], end["bound_by"]) == ("unknown", "failed", "app.user_id")


async def test_cancelled_in_the_binding_the_connection_is_thrown_away(
    engine: AsyncEngine, postgres_proxy: TcpProxy
) -> None:
    manager = UserContextManager(plugins=[SQLAlchemy(engine)])

    async def backend(user_id: str) -> int:
        async with running(manager, user_id), engine.begin() as connection:
            return int((await connection.execute(text("select pg_backend_pid()"))).scalar_one())

    before = await backend("bob")
    postgres_proxy.hold("replies")
    task = asyncio.create_task(backend("alice"))
    await postgres_proxy.until_held("replies")
    task.cancel()
    postgres_proxy.release("replies")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await backend("bob") != before


async def test_a_session_that_is_busy_when_its_context_closes_is_thrown_away(
    database: Database, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kill_backends(database)
    monkeypatch.setattr("ucm_sqlalchemy.sessions.GRACE", 0.1)
    async with async_engine(database.app, driver) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])
        async with running(manager, "alice"):
            session = bound.session()
            asleep = asyncio.create_task(session.execute(text("select pg_sleep(60)")))
            await asyncio.to_thread(wait_until, lambda: is_asleep(database), "the statement runs")
        with pytest.raises((DBAPIError, asyncio.CancelledError)):
            await asleep
        assert cast("Any", engine.pool).checkedout() == 0
        async with running(manager, "bob"):
            assert await by_text(engine) == []


def is_asleep(database: Database) -> bool:
    """Whether the application's statement is under way."""
    query = "select query from pg_stat_activity where usename = %s and state = 'active'"
    with psycopg.connect(database.superuser.dsn) as connection:
        return any("pg_sleep" in row[0] for row in connection.execute(query, [database.app.user]).fetchall())


async def kill_backends(database: Database) -> None:
    query = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = %s"
    with psycopg.connect(database.superuser.dsn) as connection:
        connection.execute(query, [database.app.user])


async def test_the_pool_recovers_from_killed_backends(database: Database, driver: str) -> None:
    write_notes(database, alice="a1")
    async with async_engine(database.app, driver, size=3) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])

        async def visit(user_id: str) -> list[str]:
            async with running(manager, user_id):
                return await by_text(engine)

        for _ in range(2):
            await asyncio.gather(*(visit("alice") for _ in range(3)))
            await kill_backends(database)
            with pytest.raises(DBAPIError) as failure:  # the first to notice; the pool then throws all of them away
                await visit("alice")
            assert failure.value.connection_invalidated
            assert await asyncio.gather(*(visit("alice") for _ in range(3))) == [["a1"]] * 3


async def test_a_backend_that_is_killed_in_a_transaction_loses_it(database: Database, driver: str) -> None:
    async with async_engine(database.app, driver) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])
        async with running(manager, "alice"):
            with pytest.raises(DBAPIError):
                async with bound.unit_of_work() as session:
                    session.add(Note(user_id="alice", body="lost"))
                    await session.flush()
                    await kill_backends(database)
            assert await bodies(bound.session()) == []
        ends = [each["phase"] for each in cast("Any", manager.get_audit_trail("alice"))["events"] if "phase" in each]
        assert ends == ["begin", "unknown", "begin", "rollback"]  # to COMMIT there was no answer


async def test_a_sync_engine_pays_the_same(database: Database, driver: str, postgres_proxy: TcpProxy) -> None:
    if driver != "psycopg":
        return
    write_notes(database, alice="a1")
    with sync_engine(database.app.at(postgres_proxy.port)) as engine:

        def read() -> list[str]:
            with engine.begin() as connection:
                return list(connection.scalars(text("select body from notes order by id")))

        for _ in range(7):
            read()
        before = postgres_proxy.round_trips
        read()
        unbound = postgres_proxy.round_trips - before
        manager = UserContextManager(plugins=[SQLAlchemy(engine)])
        async with running(manager, "alice"):
            for _ in range(7):
                assert read() == ["a1"]
            before = postgres_proxy.round_trips
            read()
            assert postgres_proxy.round_trips - before == unbound + 1


# Behind PgBouncer, clients share server connections by the transaction.


def pgbouncer_options(driver: str) -> dict[str, Any]:
    """What SQLAlchemy's documentation tells for it."""
    if driver == "psycopg":
        return {"poolclass": NullPool, "connect_args": {"prepare_threshold": None}}
    arguments = {"statement_cache_size": 0, "prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
    return {"poolclass": NullPool, "connect_args": arguments}


async def test_behind_pgbouncer_without_the_adapter_settings_reach_other_clients(
    database: Database, driver: str
) -> None:
    write_notes(database, alice="a1", bob="b1")
    with start_pgbouncer(database) as pgbouncer:
        async with async_engine(pgbouncer.login(database.app), driver, **pgbouncer_options(driver)) as engine:
            async with engine.begin() as connection:
                await connection.execute(text("set app.user_id = 'alice'"))
            assert await by_text(engine) == ["a1"]


async def test_behind_pgbouncer_everyone_has_their_own(database: Database, driver: str) -> None:
    write_notes(database, alice="a1", bob="b1")
    with start_pgbouncer(database, pool_size=2) as pgbouncer:
        async with async_engine(pgbouncer.login(database.app), driver, **pgbouncer_options(driver)) as engine:
            bound = SQLAlchemy(engine, reset="begin")
            manager = UserContextManager(plugins=[bound])

            async def visit(user_id: str, mine: list[str]) -> None:
                for _ in range(3):
                    async with running(manager, user_id), bound.unit_of_work() as session:
                        assert await bodies(session) == mine
                        assert await session.scalar(text("select current_setting('work_mem')")) == "4MB"
                        await session.execute(text("set app.user_id = 'carol'"))
                        await session.execute(text("set work_mem = '5MB'"))

            async with asyncio.TaskGroup() as visits:
                for _ in range(5):
                    visits.create_task(visit("alice", ["a1"]))
                    visits.create_task(visit("bob", ["b1"]))


async def test_behind_pgbouncer_the_binding_lasts_no_longer_than_the_transaction(
    database: Database, driver: str
) -> None:
    write_notes(database, alice="a1")
    with start_pgbouncer(database) as pgbouncer:
        login = pgbouncer.login(database.app)
        async with async_engine(login, driver, **pgbouncer_options(driver)) as engine:
            manager = UserContextManager(plugins=[SQLAlchemy(engine, reset="begin")])
            async with running(manager, "alice"):
                assert await by_text(engine) == ["a1"]
        async with async_engine(login, driver, **pgbouncer_options(driver)) as other:
            assert await by_text(other) == []


async def test_behind_pgbouncer_what_a_statement_has_ended_is_noticed(database: Database, driver: str) -> None:
    with start_pgbouncer(database) as pgbouncer:
        async with async_engine(pgbouncer.login(database.app), driver, **pgbouncer_options(driver)) as engine:
            bound = SQLAlchemy(engine, reset="begin")
            manager = UserContextManager(plugins=[bound])
            async with running(manager, "alice"):
                with pytest.raises(InvalidRequestError, match="ended"):
                    async with bound.unit_of_work() as session:
                        await session.execute(text("commit and chain"))
                        await session.execute(text("insert into notes (body) values ('a1')"))
                assert await by_text(engine) == []
            assert [each["phase"] for each in events(manager, "alice", "transaction")][:2] == ["begin", "unknown"]
