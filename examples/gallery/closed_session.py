"""A digest is written in the background, with the session of the request: which is closed by then, and goes on working.

A closed session of SQLAlchemy's begins anew when it is used. What the request had put on it is gone: here, the user
whose rows it was confined to.
"""

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, ORMExecuteState, Session, mapped_column, with_loader_criteria
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import USERS, api_key_of, make_app, signed_in, workspace
from ucm_middleware import UserContextManager


class Base(DeclarativeBase):
    """The tables."""


class Key(Base):
    """A key that a user may call with, and how often that was done."""

    __tablename__ = "keys"
    api_key: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    calls: Mapped[int] = mapped_column(default=7)


class ConfinedSession(Session):
    """Sees the rows of the user in ``info``; without one, as in a script of the administrator's, all of them."""


@event.listens_for(ConfinedSession, "do_orm_execute")
def confine(execution: ORMExecuteState) -> None:
    """Leave out what belongs to others."""
    if (user := execution.session.info.get("user")) is not None:
        execution.statement = execution.statement.options(with_loader_criteria(Key, Key.user_id == user))


@asynccontextmanager
async def session_of(engine: AsyncEngine, user: str) -> AsyncGenerator[AsyncSession]:
    """The session of a request. It is left without the user, so that nobody can go on as them."""
    async with AsyncSession(engine, sync_session_class=ConfinedSession, info={"user": user}) as session:
        yield session
    session.info.clear()


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """Keys, and a digest of how they are used."""
    digests: dict[str, list[dict[str, Any]]] = {}
    writing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        with tempfile.TemporaryDirectory() as folder:
            app.state.engine = engine = create_async_engine(f"sqlite+aiosqlite:///{Path(folder, 'keys.sqlite')}")
            async with AsyncSession(engine) as session, session.begin():
                await (await session.connection()).run_sync(Base.metadata.create_all)
                session.add_all(Key(api_key=api_key_of(user), user_id=user) for user in USERS)
            yield
            await engine.dispose()

    async def write_digest(session: AsyncSession, user: str) -> None:
        await asyncio.sleep(0.2)  # waits for what is still being counted
        keys = await session.scalars(select(Key).order_by(Key.api_key))
        digests[user] = [{"of": key.user_id, "api_key": key.api_key, "calls": key.calls} for key in keys]

    async def start_digest(request: Request) -> JSONResponse:
        user = signed_in(request)
        async with session_of(request.app.state.engine, user) as session:
            workspace(request)["session"] = session
            if planted:
                task = asyncio.create_task(write_digest(session, user))
                writing.add(task)
                task.add_done_callback(writing.discard)
            else:
                await write_digest(session, user)
        return JSONResponse({"digest": "is being written"}, 202)

    async def digest(request: Request) -> JSONResponse:
        found = digests.get(signed_in(request))
        return JSONResponse(found, 404 if found is None else 200)

    routes = [Route("/digest", digest), Route("/digest", start_digest, methods=["POST"])]
    return make_app(routes, manager, lifespan=lifespan)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
