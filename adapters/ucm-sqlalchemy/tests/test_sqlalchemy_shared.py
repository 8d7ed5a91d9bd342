"""What two users share who work on one engine: nothing, unless somebody gives them the same."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

from sqlalchemy_notes import DRIVERS, Base, Note, async_engine, sync_engine, write_notes
from support.postgres import Database
from support.sharing import report_of_two, report_of_two_threads, shown
from ucm_middleware import IsolationPolicy, UserContextManager, UserExecutionContext
from ucm_sqlalchemy import SQLAlchemy, SQLitePerUser
from ucm_sqlalchemy.shared import SHARED

# Of a module, as applications have them: what SQLAlchemy keeps of a statement is then the same for all users.
NOTES = select(Note).order_by(Note.id)
COLUMNS = select(Note.__table__.c.body, Note.__table__.c.id)


@pytest.fixture(params=DRIVERS)
async def engine(request: pytest.FixtureRequest, database: Database) -> AsyncGenerator[AsyncEngine]:
    write_notes(database, alice="a1", bob="b1")
    async with async_engine(database.app, request.param, size=8) as engine:
        yield engine


async def test_sessions_results_and_objects_on_one_engine_share_nothing(engine: AsyncEngine) -> None:
    bound = SQLAlchemy(engine, name="notes")
    maker = async_sessionmaker(engine)

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        keep = context.agent_context
        keep["session"] = session = bound.session()
        session.add(Note(user_id=context.user_id, body="new"))
        await session.flush()
        keep["objects"] = (await session.scalars(NOTES)).all()
        keep["rows of objects"] = (await session.execute(NOTES)).all()
        keep["rows"] = (await session.execute(COLUMNS)).all()
        keep["statement"] = NOTES
        async with bound.unit_of_work() as unit, maker() as own, engine.connect() as connection:
            keep["unit"] = unit, (await unit.scalars(NOTES.where(Note.user_id == context.user_id))).all()
            keep["own"] = own, await own.execute(NOTES)
            keep["connection"] = connection, await connection.execute(COLUMNS)
            keep["mappings"] = (await connection.execute(COLUMNS)).mappings().all()
            yield

    assert shown(await report_of_two(UserContextManager(plugins=[bound]), work)) == []


@pytest.mark.parametrize(
    ("what", "expected"),
    [("session", "AsyncSession"), ("object", "Note"), ("row", "Note"), ("result", "ChunkedIteratorResult")],
)
async def test_what_both_have_is_found(engine: AsyncEngine, what: str, expected: str) -> None:
    bound = SQLAlchemy(engine, name="notes")
    first: list[Any] = []

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        session = bound.session()
        result = await session.execute(NOTES)
        found: Any = {"session": session, "result": result}.get(what)
        if found is None:
            row = result.one()
            found = row if what == "row" else row[0]
        first.append(found)
        context.agent_context["given"] = first[0]
        yield

    found = shown(await report_of_two(UserContextManager(plugins=[bound]), work))
    assert any("bob.agent_context['given']" in one and f"({expected})" in one for one in found), found


def test_sync_sessions_in_threads_share_nothing(database: Database) -> None:
    write_notes(database, alice="a1", bob="b1")
    with sync_engine(database.app, size=2) as engine:
        bound = SQLAlchemy(engine, name="notes")

        @contextmanager
        def work(context: UserExecutionContext) -> Generator[None]:
            with bound.unit_of_work() as session:
                context.agent_context["kept"] = session, session.scalars(NOTES).all(), session.execute(COLUMNS).all()
                yield

        assert shown(report_of_two_threads(UserContextManager(plugins=[bound]), work)) == []


async def test_files_of_users_share_nothing(tmp_path: Path) -> None:
    bound = SQLitePerUser(tmp_path, metadata=Base.metadata)

    @asynccontextmanager
    async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
        async with bound.unit_of_work() as session:
            context.agent_context["kept"] = session, (await session.execute(COLUMNS)).all()
            yield

    assert shown(await report_of_two(UserContextManager(plugins=[bound]), work)) == []


def test_an_engine_that_no_adapter_knows_is_named_once_and_can_be_declared() -> None:
    """As the documentation has it for what has no adapter."""
    engine = create_engine("sqlite://")

    @contextmanager
    def work(context: UserExecutionContext) -> Generator[None]:
        with Session(engine) as session:
            context.agent_context["session"] = session
            yield

    assert any("(Engine)" in one for one in shown(report_of_two_threads(UserContextManager(), work)))
    declared = UserContextManager(isolation=IsolationPolicy(shared_types=SHARED))
    assert shown(report_of_two_threads(declared, work)) == []
    engine.dispose()
