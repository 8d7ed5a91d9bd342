"""An app that looks for its user's context in every place that code runs in during a request or a connection.

Each request says in its query who it comes from, and the middleware knows it from the token: the two must agree
wherever the code looks.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response, WebSocket
from promise_journal import Door, Journal
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ucm_middleware import (
    ContextNotFoundError,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
    user_context,
)
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
manager = UserContextManager()

tracing: ContextVar[str] = ContextVar("tracing", default="nothing")
forgotten: ContextVar[str] = ContextVar("forgotten", default="nothing")
scribble: ContextVar[str] = ContextVar("scribble", default="nothing")


def look(place: str, visitor: str) -> None:
    """Note whose context this code runs in."""
    try:
        context = current_context()
    except ContextNotFoundError:
        journal.note("look", place=place, visitor=visitor, user=None, request_id=None)
    else:
        user = "nobody" if context.is_anonymous else context.user_id
        journal.note("look", place=place, visitor=visitor, user=user, request_id=context.request_id)


async def look_async(place: str, visitor: str) -> None:
    await asyncio.sleep(0)
    look(place, visitor)


async def async_dependency(connection: HTTPConnection) -> AsyncIterator[None]:
    visitor = connection.query_params["visitor"]
    look("async dependency", visitor)
    yield
    look("async dependency's end", visitor)


def sync_dependency(connection: HTTPConnection) -> Iterator[None]:
    visitor = connection.query_params["visitor"]
    look("sync dependency", visitor)
    yield
    look("sync dependency's end", visitor)


app = FastAPI(dependencies=[Depends(async_dependency), Depends(sync_dependency)])
Dispatch = Callable[[Request], Awaitable[Response]]


class Below(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Dispatch) -> Response:
        visitor = request.query_params["visitor"]
        look("middleware below", visitor)
        response = await call_next(request)
        look("middleware below, after", visitor)
        return response


class Above(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Dispatch) -> Response:
        visitor = request.query_params["visitor"]
        look("middleware above", visitor)
        response = await call_next(request)
        look("middleware above, after", visitor)
        return response


class Tracing:
    """Sets what a tracing library sets, and looks at what is left when the app has returned."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracing.set("a span")
        forgotten.set("a secret")
        await self.app(scope, receive, send)
        journal.note("outside", scribble=scribble.get())


@app.get("/async")
async def async_endpoint(
    request: Request, visitor: str, context: CurrentContext, background: BackgroundTasks
) -> Response:
    look("async endpoint", visitor)
    journal.note("inside", visitor=visitor)
    await journal.gate("all are inside").passed()
    look("async endpoint, with others inside", visitor)
    journal.note(
        "same",
        visitor=visitor,
        answers=[
            context is current_context(),
            request.state.user_context is context,
            user_context(request) is context,
        ],
    )
    await asyncio.create_task(look_async("task", visitor))
    async with anyio.create_task_group() as group:
        group.start_soon(look_async, "task group", visitor)
    await anyio.to_thread.run_sync(look, "anyio thread", visitor)
    await asyncio.to_thread(look, "asyncio thread", visitor)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, look, "executor", visitor)
    copied = copy_context()
    await loop.run_in_executor(None, lambda: copied.run(look, "executor with a copied context", visitor))
    called = asyncio.Event()
    loop.call_soon(look, "callback", visitor)
    loop.call_soon(called.set)
    await called.wait()
    background.add_task(look, "sync background task", visitor)
    background.add_task(look_async, "async background task", visitor)

    async def body() -> AsyncIterator[bytes]:
        look("async stream", visitor)
        yield b"a"
        look("async stream, again", visitor)
        yield b"b"

    return StreamingResponse(body(), background=background)


@app.get("/sync")
def sync_endpoint(visitor: str, background: BackgroundTasks) -> Response:
    look("sync endpoint", visitor)
    journal.note("inside", visitor=visitor)
    journal.gate("all are inside").passed_in_thread()
    look("sync endpoint, with others inside", visitor)
    background.add_task(look, "sync background task", visitor)

    def body() -> Iterator[bytes]:
        look("sync stream", visitor)
        yield b"a"
        look("sync stream, again", visitor)
        yield b"b"

    return StreamingResponse(body(), background=background)


@app.get("/notes")
async def notes(context: CurrentContext, visitor: str) -> dict[str, Any]:
    """What of an earlier visitor is there? Then leave something for the next."""
    seen = {
        "scribble": scribble.get(),
        "data": context.agent_context.get("secret"),
        "user": "nobody" if context.is_anonymous else context.user_id,
        "request_id": context.request_id,
        "tracing": tracing.get(),
        "forgotten": forgotten.get(),
    }
    scribble.set(visitor)
    context.agent_context["secret"] = visitor
    return seen


@app.websocket("/ws")
async def connection(websocket: WebSocket, visitor: str, context: CurrentContext) -> None:
    look("before accept", visitor)
    await websocket.accept()
    async for message in websocket.iter_text():
        look(f"message {message}", visitor)
        scribble.set(visitor)
        await websocket.send_json({"client": context.websocket_client_id, "forgotten": forgotten.get()})
    look("after the disconnect", visitor)


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app.add_middleware(Below)
app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify), keep=[tracing])
app.add_middleware(Above)
app.add_middleware(Tracing)
app.add_middleware(Door, manager=manager, journal=journal)
