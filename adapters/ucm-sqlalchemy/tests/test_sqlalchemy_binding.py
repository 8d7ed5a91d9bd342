"""Each transaction on an engine is its user's, whoever begins it; where there is no user, none begins."""

import asyncio
from collections.abc import AsyncGenerator
from contextvars import Context
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import event, insert, text, update
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from sqlalchemy_notes import DRIVERS, READINGS, Note, async_engine, bodies, by_text, running, write_notes
from support.contexts import events, visitor
from support.postgres import Database
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    UnauthenticatedError,
    UserContextManager,
    managed_user_context,
)
from ucm_postgres import Binding
from ucm_sqlalchemy import SQLAlchemy

pytestmark = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture
async def engine(database: Database, driver: str) -> AsyncGenerator[AsyncEngine]:
    """A pool of one connection, so that each borrower has that of the one before."""
    write_notes(database, alice="a1", bob="b1")
    async with async_engine(database.app, driver) as engine:
        yield engine


@pytest.fixture
def bound(engine: AsyncEngine) -> SQLAlchemy[AsyncSession]:
    return SQLAlchemy(engine, name="notes")


@pytest.fixture
def manager(bound: SQLAlchemy[AsyncSession]) -> UserContextManager:
    return UserContextManager(plugins=[bound])


def last_query(database: Database) -> str:
    """What the application's one connection asked last."""
    with psycopg.connect(database.superuser.dsn) as connection:
        found = connection.execute("select query from pg_stat_activity where usename = %s", [database.app.user])
        (row,) = found.fetchall()
        return str(row[0])


async def test_without_the_adapter_the_next_borrower_is_the_user_before(engine: AsyncEngine) -> None:
    manager = UserContextManager()
    async with running(manager, "alice"), engine.begin() as connection:
        await connection.execute(text("set app.user_id = 'alice'"))
    async with running(manager, "bob"):
        assert await by_text(engine) == ["a1"]


@pytest.mark.parametrize("reading", READINGS)
async def test_everyone_reads_their_own(engine: AsyncEngine, manager: UserContextManager, reading: str) -> None:
    read = READINGS[reading]
    for user_id, expected in (("alice", ["a1"]), ("bob", ["b1"]), ("carol", []), ("alice", ["a1"])):
        async with running(manager, user_id):
            assert await read(engine) == expected


@pytest.mark.parametrize("leftover", ["set app.user_id = 'alice'", "set role {owner}", "set search_path = nowhere"])
async def test_what_is_set_for_the_session_does_not_reach_the_next_borrower(
    database: Database, engine: AsyncEngine, manager: UserContextManager, leftover: str
) -> None:
    database.execute("grant {owner} to {app}", as_=database.superuser)  # who is under the policies like anybody
    async with running(manager, "alice"), engine.begin() as connection:
        await connection.execute(text(leftover.format(owner=database.owner.user)))
    async with running(manager, "bob"), engine.begin() as connection:
        settings = "select current_setting('app.user_id'), current_user, current_setting('search_path')"
        assert (await connection.execute(text(settings))).one() == ("bob", database.app.user, '"$user", public')
        assert await by_text_on(connection) == ["b1"]


async def by_text_on(connection: Any) -> list[str]:
    return list(await connection.scalars(text("select body from notes order by id")))


async def test_locks_temporary_tables_and_cursors_do_not_reach_the_next_borrower(
    database: Database, engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"), engine.begin() as connection:
        await connection.execute(text("create temporary table secret as select 'of alice' as body"))
        await connection.execute(text("select pg_advisory_lock(42)"))
        await connection.execute(text("declare reader cursor with hold for select body from notes"))
    async with running(manager, "bob"), engine.begin() as connection:
        assert await connection.scalar(text("select count(*) from pg_cursors where name = 'reader'")) == 0
        assert await connection.scalar(text("select to_regclass('secret')")) is None
        assert await connection.scalar(text("select count(*) from pg_locks where locktype = 'advisory'")) == 0


async def test_the_prepared_statements_of_a_connection_survive(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    for _ in range(8):  # psycopg prepares what it has seen five times
        async with running(manager, "alice"):
            assert await by_text(engine) == ["a1"]


async def test_a_forged_owner_is_refused(engine: AsyncEngine, manager: UserContextManager) -> None:
    sessions = async_sessionmaker(engine)
    async with running(manager, "alice"):
        for statement in (
            insert(Note).values(user_id="bob", body="forged"),
            text("insert into notes (user_id, body) values ('bob', 'forged')"),
            update(Note).values(user_id="bob"),
        ):
            async with sessions() as session:
                with pytest.raises(DBAPIError, match="row-level security"):
                    await session.execute(statement)
        async with sessions() as session:
            session.add(Note(user_id="bob", body="forged"))
            with pytest.raises(DBAPIError, match="row-level security"):
                await session.commit()
    async with running(manager, "bob"):
        assert await by_text(engine) == ["b1"]


async def test_fifty_users_at_once_on_three_connections(database: Database, driver: str) -> None:
    async with async_engine(database.app, driver, size=3) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])

        async def visit(user_id: str) -> None:
            for turn in range(4):
                async with running(manager, user_id):
                    async with bound.unit_of_work() as session:
                        session.add(Note(user_id=user_id, body=f"{user_id} {turn}"))
                        async with session.begin_nested():
                            await session.flush()
                    expected = [f"{user_id} {earlier}" for earlier in range(turn + 1)]
                    assert await bodies(bound.session()) == expected
                    for read in READINGS.values():
                        await bound.session().rollback()
                        assert await read(engine) == expected

        async with asyncio.TaskGroup() as visits:
            for i in range(50):
                visits.create_task(visit(f"user{i}"))


# Where there is no user.


async def test_outside_of_a_context_nothing_is_asked(
    database: Database, engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        await by_text(engine)
    for read in READINGS.values():
        with pytest.raises(ContextNotFoundError, match="outside of a user's context"):
            await read(engine)
    assert "notes" not in last_query(database)


async def test_an_anonymous_context_is_refused(
    database: Database, engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    context = visitor(manager)
    async with managed_user_context(context):
        for read in READINGS.values():
            with pytest.raises(UnauthenticatedError, match="without a user"):
                await read(engine)
        with pytest.raises(UnauthenticatedError, match="without a user"):
            bound.session()
        context.bind("alice")  # none of it was a use of the context
        assert await by_text(engine) == ["a1"]


async def test_code_that_outlived_its_context_is_refused(
    database: Database, engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice") as context:
        await by_text(engine)
        context.close()
        for read in READINGS.values():
            with pytest.raises(ContextClosedError):
                await read(engine)
    assert "notes" not in last_query(database)


async def test_autocommit_is_refused_wherever_it_is_asked_for(
    database: Database, driver: str, engine: AsyncEngine, manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await by_text(engine.execution_options(isolation_level="AUTOCOMMIT"))
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await by_text_on(connection)
        async with async_engine(database.app, driver, isolation_level="AUTOCOMMIT") as other:
            SQLAlchemy(other)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await by_text(other)
        assert await by_text(engine) == ["a1"]


async def test_a_connection_that_was_refused_lets_nothing_through_later(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    """SQLAlchemy takes it for one that is beginning, and would ask without beginning."""
    async with engine.connect() as connection:
        with pytest.raises(ContextNotFoundError):
            await by_text_on(connection)
        async with running(manager, "alice"):
            with pytest.raises(ResourceClosedError):
                await by_text_on(connection)


async def test_two_phase_transactions_are_refused(engine: AsyncEngine, manager: UserContextManager) -> None:
    async with running(manager, "alice"), engine.connect() as connection:

        def begin(sync_connection: Any) -> None:
            sync_connection.begin_twophase()

        with pytest.raises(ConfigurationError, match="two-phase"):
            await connection.run_sync(begin)
        assert await by_text_on(connection) == ["a1"]


async def test_a_missing_role_is_an_error_and_nothing_is_asked(database: Database, driver: str) -> None:
    async with async_engine(database.app, driver) as engine:
        bound = SQLAlchemy(engine, binding=Binding(role="nobody_there"))
        manager = UserContextManager(plugins=[bound])
        async with running(manager, "alice"):
            with pytest.raises(DBAPIError, match="nobody_there"):
                await by_text(engine)
            with pytest.raises(DBAPIError, match="nobody_there"):
                await bodies(bound.session())
        assert "notes" not in last_query(database)


async def test_a_role_is_taken_for_the_transaction(own_database: Database, driver: str) -> None:
    member = own_database.login("member", "nologin")
    own_database.execute("grant select on notes to " + member.user)
    own_database.execute(f"grant {member.user} to {{app}}", as_=own_database.superuser)
    async with async_engine(own_database.app, driver) as engine:
        manager = UserContextManager(plugins=[SQLAlchemy(engine, binding=Binding(role=member.user))])
        async with running(manager, "alice"), engine.connect() as connection:
            assert await connection.scalar(text("select current_user")) == member.user
            with pytest.raises(ProgrammingError, match="permission denied"):
                await connection.execute(text("insert into notes (body) values ('no')"))


@pytest.mark.parametrize("user_id", ["o'hara", "back\\slash", 'quo"te', "$1", "%s", ":x", "a" * 256])
async def test_odd_user_ids_are_values(engine: AsyncEngine, manager: UserContextManager, user_id: str) -> None:
    async with running(manager, user_id):
        async with engine.begin() as connection:
            await connection.execute(text("insert into notes (body) values ('mine')"))
            assert await connection.scalar(text("select current_setting('app.user_id')")) == user_id
        assert await by_text(engine) == ["mine"]


async def test_a_read_only_database_is_read(database: Database, driver: str) -> None:
    write_notes(database, alice="a1")
    options: dict[str, Any] = {"execution_options": {"postgresql_readonly": True}}
    for reset in ("return", "begin"):
        async with async_engine(database.app, driver, **options) as engine:
            manager = UserContextManager(plugins=[SQLAlchemy(engine, reset=reset)])
            async with running(manager, "alice"):
                assert await by_text(engine) == ["a1"]
                async with engine.connect() as connection:
                    with pytest.raises(DBAPIError, match="read-only"):
                        await connection.execute(text("insert into notes (body) values ('no')"))


async def test_a_database_that_is_down_is_an_error_of_sqlalchemys(database: Database, driver: str) -> None:
    async with async_engine(database.app.at(1), driver) as engine:
        manager = UserContextManager(plugins=[SQLAlchemy(engine)])
        async with running(manager, "alice"):
            with pytest.raises((OperationalError, OSError)):
                await by_text(engine)


# Whose connection it is.


@pytest.mark.parametrize("commits", [False, True])
async def test_a_connection_that_was_begun_for_another_user_is_refused(
    engine: AsyncEngine, manager: UserContextManager, commits: bool
) -> None:
    alice, bob = manager.create_isolated_context("alice"), manager.create_isolated_context("bob")
    async with managed_user_context(alice):
        connection = await engine.connect()
        await connection.execute(text("insert into notes (body) values ('unfinished')"))

        async def as_bob() -> None:
            async with managed_user_context(bob):
                with pytest.raises(CrossUserAccessError):
                    await by_text_on(connection)
                if commits:
                    with pytest.raises(CrossUserAccessError):
                        await connection.commit()

        await asyncio.get_running_loop().create_task(as_bob(), context=Context())
        if not commits:
            assert await by_text_on(connection) == ["a1", "unfinished"]
        await connection.close()
        assert await by_text(engine) == ["a1"]
    denied = events(manager, "bob", "denied")
    assert [each["action"] for each in denied] == ["connection to notes"] * (1 + commits)


def ask_on_beginning(engine: AsyncEngine) -> list[Any]:
    """What a listener of the application's asks, and what it is told."""
    seen: list[Any] = []

    def ask(connection: Any) -> None:
        seen.append(connection.exec_driver_sql("select current_setting('app.user_id', true)").scalar())

    event.listen(engine.sync_engine, "begin", ask)
    return seen


async def test_what_a_later_listener_asks_on_beginning_is_asked_for_the_user(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    seen = ask_on_beginning(engine)
    async with running(manager, "alice"):
        await by_text(engine)
    assert seen == ["alice"]


async def test_what_an_earlier_listener_asks_on_beginning_is_refused(engine: AsyncEngine) -> None:
    """SQLAlchemy does not put a listener for this event before others, also where it is asked to."""
    seen = ask_on_beginning(engine)
    manager = UserContextManager(plugins=[SQLAlchemy(engine)])
    async with running(manager, "alice"):
        with pytest.raises(ConfigurationError, match="make the adapter first"):
            await by_text(engine)
    assert seen == []


async def test_the_binding_outlives_dispose_and_holds_for_derived_engines(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    await engine.dispose()
    for each in (engine, engine.execution_options(isolation_level="SERIALIZABLE")):
        async with running(manager, "alice"):
            assert await by_text(each) == ["a1"]
        with pytest.raises(ContextNotFoundError):
            await by_text(each)


@pytest.mark.parametrize("options", [{"pool_reset_on_return": None}, {"pool_reset_on_return": "commit"}])
async def test_whatever_the_pool_does_on_return_nothing_unfinished_is_kept(
    database: Database, driver: str, options: dict[str, Any]
) -> None:
    async with async_engine(database.app, driver, **options) as engine:
        manager = UserContextManager(plugins=[SQLAlchemy(engine)])
        async with running(manager, "alice"):

            def work(raw: Any) -> None:
                raw.cursor().execute("set app.user_id = 'alice'")
                raw.cursor().execute("insert into notes (body) values ('unfinished')")
                raw.close()

            await greenlet_spawn(work, await engine.raw_connection())
            assert await by_text(engine) == []


async def test_the_drivers_own_connection_outside_of_a_transaction_is_nobodys(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    """The bypass that there is: it sees what the policies show to nobody, and is reset like any other."""

    def read(raw: Any) -> list[Any]:
        cursor = raw.cursor()
        cursor.execute("select body from notes")
        found = list(cursor.fetchall())
        raw.close()
        return found

    async with running(manager, "alice"):
        await by_text(engine)
        assert await greenlet_spawn(read, await engine.raw_connection()) == []


async def test_settings_of_the_connection_survive_the_reset(database: Database, driver: str) -> None:
    settings = {"server_settings": {"work_mem": "5MB"}} if driver == "asyncpg" else {"options": "-c work_mem=5MB"}
    for reset in ("return", "begin"):
        async with async_engine(database.app, driver, connect_args=settings) as engine:
            manager = UserContextManager(plugins=[SQLAlchemy(engine, reset=cast("Any", reset))])
            async with running(manager, "alice"):
                for _ in range(2):
                    async with engine.begin() as connection:
                        assert await connection.scalar(text("select current_setting('work_mem')")) == "5MB"
                        await connection.execute(text("set work_mem = '6MB'"))


async def test_a_pool_that_keeps_nothing_works_too(database: Database, driver: str) -> None:
    write_notes(database, alice="a1")
    async with async_engine(database.app, driver, poolclass=NullPool) as engine:
        manager = UserContextManager(plugins=[SQLAlchemy(engine)])
        async with running(manager, "alice"):
            assert await by_text(engine) == ["a1"]
