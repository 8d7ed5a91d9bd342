"""The same notes without the adapter."""

import os

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from ucm_middleware import UserContextMiddleware, bearer_token, current_context

engine = create_async_engine(os.environ["TEST_DATABASE"], pool_size=3, max_overflow=0)
sessions = async_sessionmaker(engine)

app = FastAPI()
app.add_middleware(UserContextMiddleware, identify=bearer_token(lambda token: token))


@app.get("/own")
async def read_with_own_session() -> list[str]:
    async with sessions() as session:
        return list(await session.scalars(text("select body from notes order by id")))


@app.post("/careless")
async def careless() -> None:
    async with sessions.begin() as session:
        user = {"user": current_context().user_id}
        await session.execute(text("select set_config('app.user_id', :user, false)"), user)
