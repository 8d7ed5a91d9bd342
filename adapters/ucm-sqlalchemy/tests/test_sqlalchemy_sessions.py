"""The sessions that the adapter gives out: one per context or unit of work, owned, and closed with the context."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sqlalchemy_notes import BODIES, DRIVERS, Note, async_engine, bodies, running, sync_engine, write_notes
from support.contexts import events
from support.postgres import Database
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    HandleRevokedError,
    IsolationLevel,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.current import ambient
from ucm_sqlalchemy import SQLAlchemy

pytestmark = pytest.mark.parametrize("driver", DRIVERS)


@pytest.fixture
async def engine(database: Database, driver: str) -> AsyncGenerator[AsyncEngine]:
    """Two connections: of a session, and of another."""
    write_notes(database, alice="a1", bob="b1")
    async with async_engine(database.app, driver, size=2) as engine:
        yield engine


@pytest.fixture
def bound(engine: AsyncEngine) -> SQLAlchemy[AsyncSession]:
    return SQLAlchemy(engine, name="notes")


@pytest.fixture
def manager(bound: SQLAlchemy[AsyncSession]) -> UserContextManager:
    return UserContextManager(plugins=[bound])


def in_use(engine: AsyncEngine) -> int:
    """How many connections are out of the pool."""
    return int(cast("Any", engine.pool).checkedout())


def around(session: Session) -> AsyncSession:
    """What it was taken out of, without its handle."""
    return AsyncSession(sync_session_class=cast("Any", lambda **_: session))


# The session of a context.


async def test_a_context_has_one_session_which_asks_nothing_until_it_is_used(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        session = bound.session()
        session.add(Note(user_id="alice", body="a2"))
        assert in_use(engine) == 0
        await bound.session().commit()
        assert await bodies(bound.session()) == ["a1", "a2"]
        assert in_use(engine) == 1
    assert in_use(engine) == 0


async def test_what_is_not_committed_is_rolled_back(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        bound.session().add(Note(user_id="alice", body="unfinished"))
        await bound.session().flush()
    async with running(manager, "alice"):
        assert await bodies(bound.session()) == ["a1"]


async def test_a_unit_that_ends_in_another_users_code_gives_its_connection_back(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """As a generator of alice's does that is collected while bob's code runs."""

    async def rows() -> AsyncGenerator[list[str]]:
        async with bound.unit_of_work() as session:
            session.add(Note(user_id="alice", body="unfinished"))
            yield await bodies(session)

    begun = rows()

    async def as_user(user_id: str, step: Any) -> None:
        ambient.set(manager.create_isolated_context(user_id))
        await step()

    await asyncio.create_task(as_user("alice", begun.__anext__))
    await asyncio.create_task(as_user("bob", begun.aclose))
    assert in_use(engine) == 0
    assert [event["phase"] for event in events(manager, "alice", "transaction")] == ["begin", "rollback"]
    assert events(manager, "bob", "denied") == []
    manager.cleanup_all_contexts()


async def test_frameworks_take_the_handle_for_a_session(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        session = bound.session()
        assert isinstance(session, AsyncSession)
        async with session.begin():
            session.add(Note(user_id="alice", body="a2"))
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    await session.execute(text("insert into notes (body) values (null)"))
        assert (await session.execute(BODIES)).scalars().all() == ["a1", "a2"]
        assert await session.run_sync(lambda sync: sync.scalars(BODIES).all()) == ["a1", "a2"]
        streamed = await session.stream(BODIES.execution_options(yield_per=1))
        assert [row.body async for row in streamed] == ["a1", "a2"]
        note = (await session.scalars(select(Note))).first()
        assert note is not None
        note.body = "changed"
        await session.commit()
        await session.refresh(note)
        await session.delete(note)
        await session.commit()
        assert await bodies(session) == ["a2"]


async def test_sqlmodels_session_is_the_same(engine: AsyncEngine) -> None:
    bound = SQLAlchemy(engine, session_class=SQLModelSession)
    manager = UserContextManager(plugins=[bound])
    async with running(manager, "alice"):
        body: Any = Note.body
        assert list(await bound.session().exec(sqlmodel_select(body))) == ["a1"]
    result = await manager.execute_in_transaction("bob", "select body from notes where body like :like", {"like": "b%"})
    assert result.rows == ({"body": "b1"},)


async def test_a_warm_identity_map_gives_nobody_elses_row(
    database: Database, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    alices = manager.create_isolated_context("alice")
    async with managed_user_context(alices):
        theirs = (await bound.session().scalars(select(Note))).one()
        assert await bound.session().get(Note, theirs.id) is theirs

        async def as_bob() -> None:
            async with running(manager, "bob"):
                assert await bound.session().get(Note, theirs.id) is None
                assert (await bound.session().scalars(select(Note))).one().body == "b1"

        with manager.privileged(reason="the test", users=["bob"]):
            await asyncio.create_task(as_bob())


async def test_another_users_code_cannot_use_a_session_however_it_got_it(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    given: list[AsyncSession] = []
    bob = manager.create_isolated_context("bob")

    async def as_bob() -> None:
        async with managed_user_context(bob):
            for session in given:
                with pytest.raises(CrossUserAccessError):
                    await bodies(session)

    stolen = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await stolen
        await as_bob()

    task = asyncio.create_task(wait())
    async with running(manager, "alice"):
        given.append(bound.session())  # the handle
        sync_session = bound.session().sync_session
        raw = around(sync_session)
        given.append(raw)  # and what it stands for
        stolen.set_result(None)
        await task
        assert not events(manager, "alice", "transaction")
        assert await bodies(bound.session()) == ["a1"]


async def test_it_is_of_no_use_after_its_context(bound: SQLAlchemy[AsyncSession], manager: UserContextManager) -> None:
    async with running(manager, "alice"):
        session = bound.session()
        await bodies(session)
        sync_session = session.sync_session
    with pytest.raises(ContextClosedError):
        await bodies(session)
    raw = around(sync_session)
    with pytest.raises(ContextClosedError):
        await bodies(raw)


@pytest.mark.parametrize("ending", ["clear", "cleanup", "cleanup_all", "revoke", "expiry", "shutdown"])
async def test_it_is_closed_however_the_context_ends(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], ending: str
) -> None:
    manager = UserContextManager(plugins=[bound])
    context = manager.create_isolated_context("alice", ttl_seconds=0.2 if ending == "expiry" else None)
    manager.set_context("alice", context, ttl_seconds=0.2 if ending == "expiry" else None)
    working, ended = asyncio.Event(), asyncio.Event()
    cleaning: list[asyncio.Task[bool]] = []

    async def work() -> None:
        try:
            async with managed_user_context(context):
                bound.session().add(Note(user_id="alice", body="unfinished"))
                await bound.session().flush()
                working.set()
                await asyncio.Event().wait()
        except ContextClosedError:
            ended.set()

    task = asyncio.create_task(work())
    await working.wait()
    assert in_use(engine) == 1
    if ending == "clear":
        manager.clear_context("alice")
    elif ending == "cleanup":
        cleaning.append(asyncio.create_task(manager.cleanup_context("alice")))
    elif ending == "cleanup_all":
        manager.cleanup_all_contexts()
    elif ending == "revoke":
        manager.revoke("alice", "signed out")
    elif ending == "shutdown":
        await manager.drain(0)
    if ending in ("clear", "cleanup", "cleanup_all"):
        task.cancel()  # such an end waits for the handler
        with pytest.raises((asyncio.CancelledError, ContextClosedError)):
            await task
        ended.set()
    for each in cleaning:
        await each
    await ended.wait()
    await context.aclose()
    assert in_use(engine) == 0
    async with running(UserContextManager(plugins=[]), "alice"):
        assert await bodies(bound.session()) == ["a1"]


async def test_a_context_that_asks_for_no_session_has_none(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """The adapter has no hook in the life of contexts, so that such a request pays nothing."""
    hooks = {name for name in dir(bound) if name.startswith("ucm_")}
    # Of a unit of work, and of the manager: what the checker passes over, and what handles give, is asked once.
    assert hooks == {"ucm_open_transaction", "ucm_shared_types", "ucm_owned_types"}
    async with running(manager, "alice") as context:
        assert not context.lifetime.has_resources
    assert in_use(engine) == 0


async def test_it_works_in_a_child_and_for_the_owner_outside_of_contexts(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice") as context:
        session = bound.session()
        async with managed_user_context(context.create_child_context("step")):
            assert await bodies(session) == ["a1"]
            assert await bodies(bound.session()) == ["a1"]  # of its own
        assert await bodies(session) == ["a1"]


# Units of work.


async def test_a_unit_of_work_is_committed_or_rolled_back(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with bound.unit_of_work() as session:
            session.add(Note(user_id="alice", body="a2"))
            assert bound.session() is session
        with pytest.raises(HandleRevokedError):
            await bodies(session)
        with pytest.raises(LookupError):
            async with bound.unit_of_work() as session:
                session.add(Note(user_id="alice", body="never"))
                await session.flush()
                raise LookupError
        assert in_use(engine) == 0
        assert await bodies(bound.session()) == ["a1", "a2"]


async def test_one_inside_of_another_is_a_savepoint(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with bound.unit_of_work() as outer:
            outer.add(Note(user_id="alice", body="outer"))
            async with bound.unit_of_work() as inner:
                assert inner is outer
                inner.add(Note(user_id="alice", body="kept"))
            with pytest.raises(DBAPIError):
                async with bound.unit_of_work():
                    bound.session().add(Note(user_id="bob", body="forged"))
                    await bound.session().flush()
            assert await bodies(outer) == ["a1", "outer", "kept"]
            with pytest.raises(ConfigurationError, match="isolation_level"):
                async with bound.unit_of_work("SERIALIZABLE"):
                    pass
        assert await bodies(bound.session()) == ["a1", "outer", "kept"]


async def test_a_task_of_its_own_has_a_unit_of_its_own(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async def apart() -> bool:
        async with bound.unit_of_work() as session:
            return session is outer

    async with running(manager, "alice"), bound.unit_of_work() as outer:
        assert not await asyncio.create_task(apart())


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_isolation_levels_are_the_transactions(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager, level: IsolationLevel
) -> None:
    async with running(manager, "alice"):
        async with bound.unit_of_work(level) as session:
            assert await session.scalar(text("select current_setting('transaction_isolation')")) == level.lower()
            assert await bodies(session) == ["a1"]
        async with bound.unit_of_work() as session:
            assert await session.scalar(text("select current_setting('transaction_isolation')")) == "read committed"


async def test_transactional_functions_try_again_after_a_serialization_failure(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    tries: list[list[str]] = []
    both_have_read = asyncio.Barrier(2)

    @bound.transactional(isolation_level="SERIALIZABLE", retries=3)
    async def number_them(name: str) -> str:
        session = bound.session()
        found = await bodies(session)
        tries.append(found)
        if len(tries) <= 2:
            await both_have_read.wait()
        session.add(Note(user_id="alice", body=f"{len(found) + 1}"))
        return name

    async with running(manager, "alice"):
        assert list(await asyncio.gather(number_them("x"), number_them("y"))) == ["x", "y"]
        assert await bodies(bound.session()) == ["a1", "2", "3"]
    assert len(tries) == 3
    assert number_them.__name__ == "number_them"


async def test_a_unit_of_work_whose_context_closes_in_it_does_not_end_well(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    with pytest.raises(ContextClosedError):
        async with running(manager, "alice") as context, bound.unit_of_work() as session:
            await session.execute(text("insert into notes (body) values ('lost')"))
            await asyncio.create_task(context.aclose())
    assert [phase for phase, *_ in transactions(manager)] == ["begin", "rollback"]
    assert in_use(engine) == 0


async def test_a_unit_of_work_that_passes_over_a_failed_statement_does_not_end_well(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    """The server answers its COMMIT with a rollback, and drivers do not tell."""
    async with running(manager, "alice"):
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            async with bound.unit_of_work() as session:
                await session.execute(text("insert into notes (body) values ('lost')"))
                with pytest.raises(DBAPIError, match="division by zero"):
                    await session.execute(text("select 1/0"))
        assert [phase for phase, *_ in transactions(manager)] == ["begin", "rollback"]
        async with bound.unit_of_work() as session:
            await session.execute(text("insert into notes (body) values ('kept')"))
            with pytest.raises(DBAPIError, match="division by zero"):
                async with session.begin_nested():
                    await session.execute(text("select 1/0"))
        assert await bodies(bound.session()) == ["a1", "kept"]


async def test_what_a_transactional_function_has_committed_is_not_done_twice(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    @bound.transactional(retries=2)
    async def charge() -> None:
        session = bound.session()
        session.add(Note(user_id="alice", body="charged"))
        await session.commit()
        await session.execute(text("do $$ begin raise exception 'no' using errcode = '40001'; end $$"))

    async with running(manager, "alice"):
        with pytest.raises(DBAPIError, match="no"):
            await charge()
        assert await bodies(bound.session()) == ["a1", "charged"]


async def test_transactional_functions_join_as_savepoints(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    @bound.transactional
    async def add(body: str, *, fails: bool = False) -> None:
        bound.session().add(Note(user_id="alice", body=body))
        await bound.session().flush()
        if fails:
            raise LookupError

    @bound.transactional
    async def both() -> None:
        await add("kept")
        with pytest.raises(LookupError):
            await add("undone", fails=True)

    async with running(manager, "alice"):
        await both()
        assert await bodies(bound.session()) == ["a1", "kept"]


async def test_functions_that_cannot_be_transactional_are_refused(bound: SQLAlchemy[AsyncSession]) -> None:
    def plain() -> None: ...

    async def generator() -> AsyncGenerator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match="async def"):
        bound.transactional(plain)
    with pytest.raises(ConfigurationError, match="generator"):
        bound.transactional(generator)
    with pytest.raises(ConfigurationError, match="generator"):
        bound.transactional(asynccontextmanager(generator))
    with pytest.raises(ConfigurationError, match="classmethod"):
        bound.transactional(cast("Any", classmethod(lambda cls: cls)))
    with pytest.raises(ConfigurationError, match="retries"):
        bound.transactional(retries=-1)(plain)
    with pytest.raises(ConfigurationError, match="isolation_level"):
        bound.unit_of_work(cast("Any", "CHAOS"))
    with pytest.raises(ConfigurationError, match="async with"), cast("Any", bound.unit_of_work()):
        pass


# The driver's own connection.


async def test_the_drivers_connection_that_a_session_gives_is_owned(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager, driver: str
) -> None:
    async def read(connection: Any) -> list[str]:
        if driver == "asyncpg":
            async with connection.transaction():
                assert [row["body"] async for row in connection.cursor("select body from notes")] == ["a1"]
            assert await (await connection.prepare("select body from notes")).fetchval() == "a1"
            return [row["body"] for row in await connection.fetch("select body from notes")]
        return [row[0] for row in await (await connection.execute("select body from notes")).fetchall()]

    async with running(manager, "alice"):
        async with bound.unit_of_work() as session:
            proxied = await (await session.connection()).get_raw_connection()
            connection: Any = proxied.driver_connection
            kept = [proxied, proxied.dbapi_connection, connection]
            if driver == "asyncpg":
                kept.append(await connection.prepare("select body from notes"))
            else:
                kept.append(connection.cursor())
            assert isinstance(connection, type(connection))
            assert await read(connection) == ["a1"]
        for each in kept:
            with pytest.raises(HandleRevokedError):
                getattr(each, "anything", None)
    alice = manager.create_context_with_transaction("alice")
    connection = (await (await alice.db_session.connection()).get_raw_connection()).driver_connection
    assert await read(connection) == ["a1"]
    async with running(manager, "bob"):
        with pytest.raises(CrossUserAccessError):
            await read(connection)
    await alice.aclose()


# The manager's transactions.


async def test_a_context_with_a_transaction_commits_when_it_closes_well(
    bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
        assert isinstance(context.db_session, AsyncSession)
        context.db_session.add(Note(user_id="alice", body="a2"))
        with pytest.raises(IntegrityError):
            async with context.db_session.begin_nested():
                await context.db_session.execute(text("insert into notes (body) values (null)"))
    with pytest.raises(LookupError):
        async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
            context.db_session.add(Note(user_id="alice", body="never"))
            await context.db_session.flush()
            raise LookupError
    result = await manager.execute_in_transaction("alice", BODIES)
    assert [row["body"] for row in result.rows] == ["a1", "a2"]


async def test_its_session_is_its_users_outside_of_contexts_too(
    engine: AsyncEngine, manager: UserContextManager
) -> None:
    alice = manager.create_context_with_transaction("alice", isolation_level="SERIALIZABLE")
    bob = manager.create_context_with_transaction("bob")
    assert in_use(engine) == 0
    level = text("select current_setting('app.user_id'), current_setting('transaction_isolation')")
    assert (await alice.db_session.execute(level)).one() == ("alice", "serializable")
    assert (await bob.db_session.execute(level)).one() == ("bob", "read committed")
    for context in (alice, bob):
        await context.aclose()
    assert in_use(engine) == 0


async def test_one_statement_in_a_transaction(manager: UserContextManager) -> None:
    result = await manager.execute_in_transaction(
        "alice", "insert into notes (body) values (:body) returning body", {"body": "a2"}
    )
    assert (result.rows, result.rowcount) == (({"body": "a2"},), 1)
    many = [{"body": "a3"}, {"body": "a4"}]
    assert (await manager.execute_in_transaction("alice", "insert into notes (body) values (:body)", many)).rows == ()
    result = await manager.execute_in_transaction("alice", select(Note).order_by(Note.id))
    assert [row["Note"].body for row in result.rows] == ["a1", "a2", "a3", "a4"]
    with pytest.raises(DBAPIError, match="row-level security"):
        await manager.execute_in_transaction("alice", "insert into notes (user_id, body) values ('bob', 'forged')")
    async with running(manager, "alice"):
        with pytest.raises(CrossUserAccessError):
            await manager.execute_in_transaction("bob", "select 1")
        assert (await manager.execute_in_transaction("alice", "select count(*) as n from notes")).rows == ({"n": 4},)


class Refuses:
    """A plugin that binds sessions of its own accord, and refuses."""

    @hookimpl
    def ucm_bind_session(self, context: UserExecutionContext, session: Connection) -> None:
        assert session.exec_driver_sql("select current_setting('app.user_id')").scalar() == context.user_id
        raise LookupError


async def test_other_plugins_may_bind_each_transaction_and_refuse_it(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession]
) -> None:
    manager = UserContextManager(plugins=[bound, Refuses()])
    async with running(manager, "alice"):
        with pytest.raises(LookupError):
            await bodies(bound.session())
    assert in_use(engine) == 0


# The records.


def transactions(manager: UserContextManager) -> list[tuple[Any, ...]]:
    return [
        (each["phase"], each["database"], each.get("statements"), each["outcome"])
        for each in events(manager, "alice", "transaction")
    ]


async def test_each_transaction_is_on_record_without_what_it_said(
    engine: AsyncEngine, bound: SQLAlchemy[AsyncSession], manager: UserContextManager
) -> None:
    async with running(manager, "alice"):
        async with bound.unit_of_work() as session:
            session.add(Note(user_id="alice", body="secret"))
            await session.flush()
            await bodies(session)
        with pytest.raises(LookupError):
            async with bound.unit_of_work() as session:
                await bodies(session)
                raise LookupError
        async with engine.begin() as connection:  # the application's own
            await connection.execute(text("select 'secret'"))
        await bodies(bound.session())
        with pytest.raises(DBAPIError):
            await bound.session().execute(text("select secret"))
    assert transactions(manager) == [
        ("begin", "notes", None, "ok"),
        ("commit", "notes", 2, "ok"),
        ("begin", "notes", None, "ok"),
        ("rollback", "notes", 1, "ok"),
        ("begin", "notes", None, "ok"),
        ("commit", "notes", 1, "ok"),
        ("begin", "notes", None, "ok"),
        ("rollback", "notes", 2, "ok"),
    ]
    assert "secret" not in str(manager.get_audit_trail("alice"))


async def test_a_commit_that_fails_is_a_rollback_on_record(own_database: Database, driver: str) -> None:
    own_database.execute("alter table notes add constraint late unique (body) deferrable initially deferred")
    async with async_engine(own_database.app, driver) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])
        async with running(manager, "alice"):
            with pytest.raises(IntegrityError):
                async with bound.unit_of_work() as session:
                    session.add_all([Note(user_id="alice", body="same"), Note(user_id="alice", body="same")])
    assert [phase for phase, *_ in transactions(manager)] == ["begin", "rollback"]


# Without asyncio: the same, in the words of sync code.


async def test_sync_engines_do_the_same(database: Database, driver: str) -> None:
    if driver != "psycopg":
        return
    write_notes(database, alice="a1", bob="b1")
    with sync_engine(database.app) as engine:
        bound = SQLAlchemy(engine)
        manager = UserContextManager(plugins=[bound])

        def work(context: UserExecutionContext, user_id: str, mine: str) -> None:
            with managed_user_context(context):
                with bound.unit_of_work() as session:
                    assert isinstance(session, Session)
                    assert session.scalars(BODIES).all() == [mine]
                    session.add(Note(user_id=user_id, body="more"))
                    with pytest.raises(DBAPIError, match="row-level security"), bound.unit_of_work():
                        session.execute(text("insert into notes (user_id, body) values ('carol', 'forged')"))
                with pytest.raises(LookupError), bound.unit_of_work() as session:
                    session.add(Note(user_id=user_id, body="never"))
                    session.flush()
                    raise LookupError
                assert bound.session().scalars(BODIES).all() == [mine, "more"]

        for user_id, mine in (("alice", "a1"), ("bob", "b1")):
            context = manager.create_isolated_context(user_id)
            await asyncio.to_thread(work, context, user_id, mine)
        async with managed_user_context(manager.create_context_with_transaction("bob")) as context:
            await asyncio.to_thread(context.db_session.execute, text("delete from notes"))
        async with running(manager, "bob"):
            assert await asyncio.to_thread(lambda: bound.session().scalars(BODIES).all()) == []
        result = await manager.execute_in_transaction("alice", BODIES)
        assert [row["body"] for row in result.rows] == ["a1", "more"]
