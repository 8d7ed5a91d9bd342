"""An app whose requests take their time: they stream, work on in the background, wait, fail, and leave things behind.

Whatever a request enters is noted when it is entered and when it is let go of.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from promise_journal import Door, Journal
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from ucm_middleware import (
    UserContextError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
    managed_user_context,
)
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
manager = UserContextManager()
app = FastAPI()
left_behind: dict[str, Any] = {}
keep_alive: set[asyncio.Task[None]] = set()


class Session:
    """Notes when it is entered and when it is left. A generator would be left, too, when it is thrown away."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        journal.note("entered", name=self.name)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        journal.note("released", name=self.name, error=None if kind is None else kind.__name__)


class AsyncSession:
    def __init__(self, name: str) -> None:
        self._session = Session(name)

    async def __aenter__(self) -> None:
        self._session.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        await asyncio.sleep(0)
        self._session.__exit__(kind)


class Cursor:
    def __init__(self, name: str) -> None:
        self.name = name
        journal.note("entered", name=name)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        journal.note("released", name=self.name, error=None)


def work(step: str) -> None:
    """Do something that needs the context to be open."""
    context = current_context()
    context.agent_context["steps"] = [*context.agent_context.get("steps", ()), step]
    journal.note("step", step=step, user=context.user_id)


def dependency(context: CurrentContext) -> Iterator[None]:
    work("dependency")
    yield
    work("dependency's end")


@app.get("/stream", dependencies=[Depends(dependency)])
async def stream(context: CurrentContext, background: BackgroundTasks) -> Response:
    context.enter_context(Session("session"))

    async def later() -> None:
        await journal.gate("background").passed()
        work("background task")

    async def body() -> AsyncIterator[str]:
        work("first chunk")
        yield "first "
        await journal.gate("last chunk").passed()
        work("last chunk")
        yield "last"

    background.add_task(later)
    background.add_task(work, "sync background task")
    return StreamingResponse(body(), background=background)


@app.get("/order", dependencies=[Depends(dependency)])
async def order(context: CurrentContext, background: BackgroundTasks) -> None:
    context.enter_context(Session("first"))
    await context.enter_async_context(AsyncSession("second"))
    journal.note("entered", name="third")
    context.callback(journal.note, "released", name="third", error=None)
    context.closing(Cursor("fourth"))
    child = context.create_child_context("part of the work")
    await child.enter_async_context(AsyncSession("child's"))
    await context.enter_async_context(AsyncSession("fifth"), owner_task=True)
    background.add_task(work, "sync background task")


@app.get("/endless")
async def endless(context: CurrentContext) -> Response:
    await context.enter_async_context(AsyncSession("outer"))
    context.enter_context(Session("inner"))

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0)

    return StreamingResponse(body())


@app.get("/wait")
async def wait(context: CurrentContext) -> str:
    await context.enter_async_context(AsyncSession("session"))
    journal.note("waiting")
    await journal.gate("go on").passed()
    work("after the wait")
    return "done"


@app.post("/upload")
async def upload(request: Request, context: CurrentContext) -> int:
    await context.enter_async_context(AsyncSession("session"))
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            journal.note("received", size=size)
    except ClientDisconnect:
        work("noticed that the client left")
        raise
    return size


@app.get("/fail")
async def fail(context: CurrentContext, how: str) -> None:
    context.enter_context(Session("sync"))
    await context.enter_async_context(AsyncSession("async"))
    raise RuntimeError("the app's own fault") if how == "crash" else HTTPException(418)


@app.websocket("/ws")
async def connection(websocket: WebSocket, context: CurrentContext) -> None:
    await context.enter_async_context(AsyncSession("session"))
    await websocket.accept()
    try:
        while True:
            work(await websocket.receive_text())
            await websocket.send_text("ok")
    except WebSocketDisconnect:
        journal.note("disconnected")


@app.get("/leave")
async def leave(context: CurrentContext, request: Request) -> str:
    context.agent_context.update(secret="alice's", nested={"notes": ["hers"]})
    left_behind.update(context=context, data=context.agent_context, nested=context.agent_context["nested"])
    child = context.create_child_context("part of the work")
    left_behind.update(child=child, childs_data=child.agent_context)

    async def outlive() -> None:
        await journal.gate("outlive").passed()
        for name, use in late_uses(context).items():
            journal.note("late use", name=name, outcome=outcome_of(use))

    task = asyncio.create_task(outlive())
    keep_alive.add(task)
    task.add_done_callback(keep_alive.discard)
    return context.request_id


def late_uses(context: UserExecutionContext) -> dict[str, Callable[[], object]]:
    """What code can do by itself that still runs in the context of a request that is over."""
    return {
        "current_context": current_context,
        "its own context": lambda: manager.get_context("alice"),
        "a new context": lambda: manager.create_isolated_context("alice"),
        "its own trail": lambda: manager.get_audit_trail("alice"),
        "list": manager.get_active_contexts,
        "clear": lambda: manager.clear_context("alice"),
        "enter": lambda: managed_user_context(context).__enter__(),
    }


def uses(context: UserExecutionContext) -> dict[str, Callable[[], object]]:
    """Everything that can be done with a context, apart from reading its ids."""
    return {
        "agent_context": lambda: context.agent_context,
        "audit_metadata": lambda: context.audit_metadata,
        "db_session": lambda: context.db_session,
        "environment": lambda: context.environment,
        "bind": lambda: context.bind("alice"),
        "create_child_context": lambda: context.create_child_context("late"),
        "verify_isolation": context.verify_isolation,
        "enter_context": lambda: context.enter_context(Session("late")),
        "callback": lambda: context.callback(journal.note, "called too late"),
        "closing": lambda: context.closing(Cursor("handed over too late")),
        "managed_user_context": lambda: managed_user_context(context),
    }


def outcome_of(use: Callable[[], object]) -> list[str]:
    try:
        use()
    except UserContextError as error:
        return [type(error).__name__, str(error)]
    return ["nothing was raised"]


async def remains(request: Request) -> JSONResponse:
    context: UserExecutionContext = left_behind["context"]
    child: UserExecutionContext = left_behind["child"]
    return JSONResponse(
        {
            "ids": [context.user_id, context.request_id, context.thread_id, context.run_id],
            "text": f"{context!r} {child!r}",
            "data": left_behind["data"],
            "child's data": left_behind["childs_data"],
            "nested": left_behind["nested"],
            "uses": {name: outcome_of(use) for name, use in uses(context).items()},
            "child's uses": {name: outcome_of(use) for name, use in uses(child).items()},
        }
    )


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


# With IMPATIENT in the environment, whose client has gone is not waited for.
app.add_middleware(
    UserContextMiddleware,
    manager=manager,
    identify=bearer_token(verify),
    cancel_on_disconnect="IMPATIENT" in os.environ,
)
app.add_middleware(Door, manager=manager, journal=journal, routes=[Route("/door/remains", remains)])
