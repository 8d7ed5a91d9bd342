"""An app with a pool of one process, which the first request to use it forks from inside of its context."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context

from fastapi import FastAPI

from ucm_middleware import (
    ContextNotFoundError,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import AuthenticatedContext

pool = ProcessPoolExecutor(1, get_context("fork"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with pool:
        yield


manager = UserContextManager()
app = FastAPI(lifespan=lifespan)


def who() -> str:
    """Whose context a job in the pool runs in."""
    try:
        context = current_context()
    except ContextNotFoundError:
        return "nobody"
    return f"{context.user_id}, who has {dict(context.agent_context)}"


@app.get("/job")
async def job(context: AuthenticatedContext) -> dict[str, str]:
    context.agent_context["secret"] = f"the secret of {context.user_id}"
    found = await asyncio.get_running_loop().run_in_executor(pool, who)
    return {"user": context.user_id, "job": found, "here": str(context.agent_context["secret"])}


app.add_middleware(
    UserContextMiddleware,
    manager=manager,
    identify=bearer_token(lambda token: token.removeprefix("token-of-")),
)
