"""Notes in a database: each path reads or writes them in another way."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from ucm_middleware import UserContextManager, UserContextMiddleware, bearer_token, current_context
from ucm_sqlalchemy import SQLAlchemy

engine = create_async_engine(os.environ["TEST_DATABASE"], pool_size=3, max_overflow=0)
database = SQLAlchemy(engine, name="notes")
sessions = async_sessionmaker(engine)
READ = text("select body from notes order by id")

Notes = Annotated[AsyncSession, Depends(database.session)]
NotesAtOnce = Annotated[AsyncSession, Depends(database.current_session)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    UserContextMiddleware,
    manager=UserContextManager(plugins=[database]),
    identify=bearer_token(lambda token: token),  # the tests' tokens are the users' names
)


@app.get("/nothing")
async def nothing() -> int:
    """How many connections the pool has made."""
    pool = cast("Any", engine.pool)
    return int(pool.checkedin() + pool.checkedout())


@app.get("/own")
async def read_with_own_session() -> list[str]:
    """A session of the application's own."""
    async with sessions() as session:
        return list(await session.scalars(READ))


@app.post("/careless")
async def careless() -> None:
    """Leaves the user set on the connection."""
    async with sessions.begin() as session:
        user = {"user": current_context().user_id}
        await session.execute(text("select set_config('app.user_id', :user, false)"), user)


@app.get("/session")
async def read_with_session(session: Notes) -> list[str]:
    return list(await session.scalars(READ))


@app.get("/session-at-once")
async def read_with_session_at_once(session: NotesAtOnce) -> list[str]:
    return list(await session.scalars(READ))


@app.post("/notes")
@database.transactional
async def write(body: str) -> None:
    await database.session().execute(text("insert into notes (body) values (:body)"), {"body": body})


@app.post("/notes-and-fail")
async def write_and_fail(session: Notes) -> None:
    await session.execute(text("insert into notes (body) values ('unfinished')"))
    raise HTTPException(409)
