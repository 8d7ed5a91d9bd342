"""The table that the tests work with, engines on it, and short words for running as a user."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import BigInteger, Engine, Identity, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from support.postgres import Database, Login
from ucm_middleware import UserContextManager, UserExecutionContext, managed_user_context


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A row of ``notes``, which policies give to its user alone."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[str] = mapped_column()
    body: Mapped[str] = mapped_column()


DRIVERS = ("psycopg", "asyncpg")
"""Of the asynchronous engines; the synchronous ones have psycopg."""

BODIES = select(Note.body).order_by(Note.id)


def write_notes(database: Database, **bodies: str) -> None:
    """A note of each user, by the superuser."""
    for user_id, body in bodies.items():
        database.execute(f"insert into notes (user_id, body) values ('{user_id}', '{body}')", as_=database.superuser)


@asynccontextmanager
async def async_engine(login: Login, driver: str, size: int = 1, **options: Any) -> AsyncGenerator[AsyncEngine]:
    """An engine with a pool of that size, disposed of after the block."""
    pool = {"pool_size": size, "max_overflow": 0} if "poolclass" not in options else {}
    engine = create_async_engine(login.url(f"postgresql+{driver}"), **pool, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextmanager
def sync_engine(login: Login, size: int = 1, **options: Any) -> Generator[Engine]:
    """The same without asyncio."""
    engine = create_engine(login.url("postgresql+psycopg"), pool_size=size, max_overflow=0, **options)
    try:
        yield engine
    finally:
        engine.dispose()


@asynccontextmanager
async def running(manager: UserContextManager, user_id: str) -> AsyncGenerator[UserExecutionContext]:
    """The block is code of this user's."""
    async with managed_user_context(manager.create_isolated_context(user_id)) as context:
        yield context


async def bodies(session: AsyncSession) -> list[str]:
    """What is visible, by the ORM."""
    return list(await session.scalars(BODIES))


def sync_bodies(session: Session) -> list[str]:
    """What is visible, by the ORM."""
    return list(session.scalars(BODIES))


Reading = Callable[[AsyncEngine], Any]


async def by_orm(engine: AsyncEngine) -> list[str]:
    """Through a session of the application's own."""
    async with AsyncSession(engine) as session:
        return await bodies(session)


async def by_core(engine: AsyncEngine) -> list[str]:
    """Through a connection, in SQLAlchemy's expressions."""
    async with engine.connect() as connection:
        return list(await connection.scalars(select(Note.__table__.c.body).order_by(Note.__table__.c.id)))


async def by_text(engine: AsyncEngine) -> list[str]:
    """Through a connection, in SQL."""
    async with engine.begin() as connection:
        return list(await connection.scalars(text("select body from notes order by id")))


async def by_driver(engine: AsyncEngine) -> list[str]:
    """Through the driver's own connection, inside of a transaction of SQLAlchemy's."""
    async with engine.begin() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        if engine.dialect.driver == "asyncpg":
            return [row["body"] for row in await raw.fetch("select body from notes order by id")]
        return [row[0] for row in await (await raw.execute("select body from notes order by id")).fetchall()]


READINGS: dict[str, Reading] = {"orm": by_orm, "core": by_core, "text": by_text, "driver": by_driver}
