"""SQLite: a file for each user, and criteria on one database for all, which are a convenience."""

import asyncio
import stat
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_notes import running
from support.contexts import events, running_as
from ucm_middleware import ConfigurationError, CrossUserAccessError, UserContextManager, managed_user_context
from ucm_sqlalchemy import SQLAlchemy, SQLitePerUser, UserOwned


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(unique=True)


class Card(UserOwned, Base):
    __tablename__ = "cards"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column()


PAGES = select(Page.body).order_by(Page.id)
CARDS = select(Card.body).order_by(Card.id)


# A file for each user.


async def test_everyone_has_a_file_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "databases"
    files = SQLitePerUser(folder, metadata=Base.metadata, name="pages")
    manager = UserContextManager(plugins=[files])

    async def visit(user_id: str) -> None:
        for turn in range(3):
            async with running(manager, user_id):
                async with files.unit_of_work() as session:
                    session.add(Page(body=f"{user_id} {turn}"))
                expected = [f"{user_id} {earlier}" for earlier in range(turn + 1)]
                assert list(await files.session().scalars(PAGES)) == expected
                assert list(await files.session().scalars(text("select body from pages order by id"))) == expected

    await asyncio.gather(*(visit(f"user{i}") for i in range(20)))
    made = list(folder.iterdir())
    assert len(made) == 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any("user" in path.name for path in made)


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    files = SQLitePerUser(tmp_path / name, metadata=Base.metadata, is_async=False)
    manager = UserContextManager(plugins=[files])
    for user_id in ("alice", "bob"):
        with running_as(manager, user_id):
            with files.unit_of_work() as session:
                session.add(Page(body=f"{user_id}'s"))
            assert list(files.session().scalars(PAGES)) == [f"{user_id}'s"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_stays_where_it_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = SQLitePerUser("data", metadata=Base.metadata, is_async=False)
    manager = UserContextManager(plugins=[files])
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with running_as(manager, "alice"), files.unit_of_work() as session:
        session.add(Page(body="alice's"))
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert not list(Path("data").iterdir())


def test_a_file_that_was_deleted_is_made_anew_with_its_tables(tmp_path: Path) -> None:
    files = SQLitePerUser(tmp_path, metadata=Base.metadata, is_async=False)
    manager = UserContextManager(plugins=[files])
    for _ in range(2):
        with running_as(manager, "alice"), files.unit_of_work() as session:
            session.add(Page(body="once"))
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.unlink()


async def test_savepoints_and_rollbacks_are_real(tmp_path: Path) -> None:
    files = SQLitePerUser(tmp_path, metadata=Base.metadata)
    manager = UserContextManager(plugins=[files])
    async with running(manager, "alice"):
        async with files.unit_of_work("SERIALIZABLE") as session:
            session.add(Page(body="kept"))
            with pytest.raises(LookupError):
                async with files.unit_of_work():
                    session.add(Page(body="undone"))
                    await session.flush()
                    raise LookupError
        with pytest.raises(LookupError):
            async with files.unit_of_work() as session:
                session.add(Page(body="never"))
                await session.flush()
                raise LookupError
    async with managed_user_context(manager.create_context_with_transaction("alice")) as context:
        context.db_session.add(Page(body="too"))
    result = await manager.execute_in_transaction("alice", "select body from pages order by id")
    assert [row["body"] for row in result.rows] == ["kept", "too"]
    assert [each["phase"] for each in events(manager, "alice", "transaction")] == (
        ["begin", "commit", "begin", "rollback", "begin", "commit", "begin", "commit"]
    )


async def test_what_a_statement_has_ended_cannot_be_committed(tmp_path: Path) -> None:
    """SQLite rolls back by itself where a conflict is said to, or the disk is full."""
    files = SQLitePerUser(tmp_path / "async", metadata=Base.metadata)
    sync_files = SQLitePerUser(tmp_path / "sync", metadata=Base.metadata, is_async=False)
    manager = UserContextManager(plugins=[files, sync_files])
    conflict = text("insert or rollback into pages (body) values ('a1')")
    async with running(manager, "alice"):
        with pytest.raises(InvalidRequestError, match="ended"):
            async with files.unit_of_work() as session:
                await session.execute(conflict)
                with pytest.raises(IntegrityError):
                    await session.execute(conflict)
        with pytest.raises(InvalidRequestError, match="ended"), sync_files.unit_of_work() as session:
            session.execute(conflict)
            with pytest.raises(IntegrityError):
                session.execute(conflict)
    assert [each["phase"] for each in events(manager, "alice", "transaction")] == ["begin", "unknown"] * 2


async def test_no_transaction_of_another_users_begins_on_a_file(tmp_path: Path) -> None:
    files = SQLitePerUser(tmp_path, metadata=Base.metadata, is_async=False)
    manager = UserContextManager(plugins=[files])
    async with running(manager, "alice"):
        files.session().add(Page(body="alice's"))
        files.session().commit()
        engine: Any = files.session().get_bind()
    async with running(manager, "bob"):
        with pytest.raises(CrossUserAccessError), engine.begin() as connection:
            connection.execute(text("select body from pages"))
        with pytest.raises(CrossUserAccessError), Session(engine) as session:
            session.scalars(PAGES)
    assert len(events(manager, "bob", "denied")) == 2


async def test_engines_are_bounded_and_those_in_use_go_on(tmp_path: Path) -> None:
    files = SQLitePerUser(tmp_path, metadata=Base.metadata, most=2)
    manager = UserContextManager(plugins=[files])
    contexts = [manager.create_context_with_transaction(f"user{i}") for i in range(5)]
    for i, context in enumerate(contexts):
        context.db_session.add(Page(body=f"page {i}"))
        await context.db_session.flush()
    assert files.engines == 2
    for i, context in enumerate(contexts):
        assert list(await context.db_session.scalars(PAGES)) == [f"page {i}"]
        await context.aclose()
    for i in range(5):
        result = await manager.execute_in_transaction(f"user{i}", PAGES)
        assert [row["body"] for row in result.rows] == [f"page {i}"]


async def test_a_file_is_found_by_the_secret_that_it_was_made_with(tmp_path: Path) -> None:
    old, new = token_urlsafe(32), token_urlsafe(32)
    for secret, previous in ((old, []), (new, [old])):
        files = SQLitePerUser(tmp_path, metadata=Base.metadata)
        manager = UserContextManager(plugins=[files], secret=secret, previous_secrets=previous)
        async with running(manager, "alice"), files.unit_of_work() as session:
            session.add(Page(body=f"with {len(previous)} before"))
    result = await manager.execute_in_transaction("alice", PAGES)
    assert [row["body"] for row in result.rows] == ["with 0 before", "with 1 before"]


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="most"):
        SQLitePerUser(tmp_path, most=0)
    with pytest.raises(ConfigurationError, match="session_class"):
        SQLitePerUser(tmp_path, session_class=Session)
    with pytest.raises(ConfigurationError, match="session_options"):
        SQLitePerUser(tmp_path, session_options={"bind": None})
    with pytest.raises(ConfigurationError, match="name"):
        SQLitePerUser(tmp_path, name="")


# One database for all.


async def test_criteria_keep_sessions_to_their_users_rows(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'all.sqlite'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    cards = SQLAlchemy(engine, owned=UserOwned)
    manager = UserContextManager(plugins=[cards])
    for user_id in ("alice", "bob"):
        async with running(manager, user_id), cards.unit_of_work() as session:
            session.add(Card(body=f"{user_id}'s"))
    async with running(manager, "bob"):
        session = cards.session()
        assert list(await session.scalars(CARDS)) == ["bob's"]
        assert await session.get(Card, 1) is None
        assert await session.scalar(select(Card).where(Card.id == 1)) is None
        await session.execute(update(Card).values(body="bob's own"))
        await session.execute(delete(Card).where(Card.body == "alice's"))
        session.add(Card(body="forged", owner_id="alice"))
        with pytest.raises(CrossUserAccessError, match="owner_id"):
            await session.flush()
        await session.rollback()
        mine = (await session.scalars(select(Card))).one()
        mine.owner_id = "alice"
        with pytest.raises(CrossUserAccessError, match="owner_id"):
            await session.flush()
    async with running(manager, "alice"):
        assert list(await cards.session().scalars(CARDS)) == ["alice's"]
    await engine.dispose()


async def test_criteria_are_no_boundary(tmp_path: Path) -> None:
    """So do not take them for one: SQL goes around them, and so does a session of the application's own."""
    engine = create_engine(f"sqlite:///{tmp_path / 'all.sqlite'}")
    Base.metadata.create_all(engine)
    cards = SQLAlchemy(engine, owned=UserOwned)
    manager = UserContextManager(plugins=[cards])
    async with running(manager, "alice"):
        with cards.unit_of_work() as session:
            session.add(Card(body="alice's"))
    async with running(manager, "bob"):
        assert list(cards.session().scalars(text("select body from cards"))) == ["alice's"]
        with Session(engine) as own:
            assert list(own.scalars(CARDS)) == ["alice's"]
        with cards.unit_of_work() as session:
            session.execute(update(Card), [{"id": 1, "body": "bob's"}])  # by primary key
            session.execute(insert(Card).values(owner_id="alice", body="forged"))
    async with running(manager, "alice"):
        assert list(cards.session().scalars(CARDS)) == ["bob's", "forged"]
    engine.dispose()
