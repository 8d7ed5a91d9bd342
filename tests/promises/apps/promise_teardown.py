"""An app whose requests enter every kind of resource, and are cut off in every way while they hold them.

`Interrupting` stands outside of the product and plays the part of whatever cancels a request: a deadline, a task group,
a server. It cancels again while the context is already being torn down.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import anyio
from fastapi import FastAPI, Request, Response, WebSocket
from promise_journal import Door, Journal
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ucm_middleware import EVERYONE, UserContextManager, UserContextMiddleware, UserExecutionContext, bearer_token
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
manager = UserContextManager()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    journal.note("app startup")
    yield
    with manager.privileged(reason="the app shuts down", users=EVERYONE):
        journal.note("app shutdown", live=len(manager.get_active_contexts()))


app = FastAPI(lifespan=lifespan)


def task_name() -> str:
    task = asyncio.current_task()
    return "" if task is None else task.get_name()


class Session:
    """Notes when it is entered and when it is left. A generator would be left, too, when it is thrown away."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        journal.note("entered", name=self.name, task=task_name())

    def __exit__(self, *error: object) -> None:
        journal.note("released", name=self.name, task=task_name())


class AsyncSession:
    """Takes a few turns of the loop to let go."""

    def __init__(self, name: str) -> None:
        self._session = Session(name)

    async def __aenter__(self) -> None:
        self._session.__enter__()

    async def __aexit__(self, *error: object) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self._session.__exit__()


class HeldSession:
    """Waits in the middle of letting go, so that the test, or the one who interrupts, has time for more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._session = Session(name)

    async def __aenter__(self) -> None:
        self._session.__enter__()

    async def __aexit__(self, *error: object) -> None:
        journal.note("releasing", name=self.name)
        journal.gate(f"{self.name} is releasing").open()
        await journal.gate(f"{self.name} may release").passed()
        self._session.__exit__()


@asynccontextmanager
async def group_session(name: str) -> AsyncIterator[None]:
    """Must be left in the task that it was entered in: its cancel scope sees to that."""
    async with AsyncSession(name), anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        try:
            yield
        finally:
            group.cancel_scope.cancel()


class Cursor:
    def __init__(self, name: str) -> None:
        self._session = AsyncSession(name)

    async def opened(self) -> "Cursor":
        await self._session.__aenter__()
        return self

    async def aclose(self) -> None:
        await self._session.__aexit__()


async def enter_every_kind(context: UserExecutionContext) -> None:
    context.enter_context(Session("sync"))
    await context.enter_async_context(AsyncSession("async"))
    context.callback(sync_callback("callback"))
    await context.enter_async_context(group_session("owned"), owner_task=True)
    context.callback(async_callback("async callback"))
    context.closing(await Cursor("cursor").opened())
    child = context.create_child_context("part of the work")
    await child.enter_async_context(AsyncSession("child's"))
    await context.enter_async_context(HeldSession("held"))


def sync_callback(name: str) -> Callable[[], object]:
    entered = Session(name)
    entered.__enter__()
    return entered.__exit__


def async_callback(name: str) -> Callable[[], Awaitable[None]]:
    entered = Session(name)
    entered.__enter__()

    async def release() -> None:
        await asyncio.sleep(0)
        entered.__exit__()

    return release


@app.get("/every-kind")
async def every_kind(context: CurrentContext) -> None:
    await enter_every_kind(context)
    journal.gate("working").open()
    await asyncio.Event().wait()


@app.websocket("/every-kind")
async def every_kind_of_websocket(websocket: WebSocket, context: CurrentContext) -> None:
    await websocket.accept()
    await enter_every_kind(context)
    journal.gate("working").open()
    await asyncio.Event().wait()


@app.get("/quick")
async def quick(context: CurrentContext) -> str:
    await context.enter_async_context(AsyncSession(f"{context.user_id}'s"))
    return "done"


@app.get("/slow")
async def slow(context: CurrentContext) -> str:
    context.enter_context(Session("below"))
    await context.enter_async_context(HeldSession("held"))
    return "done"


@app.get("/failing")
async def failing(context: CurrentContext) -> str:
    def fail(error: BaseException) -> None:
        raise error

    async def cancel_myself() -> None:
        raise asyncio.CancelledError

    context.enter_context(Session("bottom"))
    context.callback(fail, ValueError("cannot let go"))
    await context.enter_async_context(AsyncSession("middle"))
    context.callback(cancel_myself)
    await context.enter_async_context(AsyncSession("top"))
    return "done"


@app.get("/stubborn")
async def stubborn(context: CurrentContext) -> str:
    @asynccontextmanager
    async def hanging() -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    @asynccontextmanager
    async def deaf() -> AsyncIterator[None]:
        yield
        gate = asyncio.ensure_future(journal.gate("deaf").passed())
        while not gate.done():
            try:
                await asyncio.shield(gate)
            except asyncio.CancelledError:
                journal.note("ignored")

    context.enter_context(Session("below"))
    await context.enter_async_context(hanging(), timeout=0.05, name="hanging")
    await context.enter_async_context(AsyncSession("between"))
    await context.enter_async_context(deaf(), timeout=0.05, name="deaf")
    return "done"


@app.post("/upload")
async def upload(request: Request, context: CurrentContext) -> int:
    await context.enter_async_context(AsyncSession("upload"))
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        journal.note("received", size=size)
    journal.gate("uploaded").open()
    return size


@app.get("/stream")
async def stream(context: CurrentContext) -> Response:
    await context.enter_async_context(AsyncSession("stream"))

    async def body() -> AsyncIterator[str]:
        yield "first "
        await journal.gate("uploaded").passed()
        yield "last"

    return StreamingResponse(body())


@app.get("/forever")
async def forever(context: CurrentContext) -> None:
    await context.enter_async_context(AsyncSession("forever"))
    await context.enter_async_context(group_session("forever, owned"), owner_task=True)
    journal.note("waiting")
    await asyncio.Event().wait()


@app.websocket("/forever")
async def websocket_forever(websocket: WebSocket, context: CurrentContext) -> None:
    await context.enter_async_context(AsyncSession("websocket"))
    await websocket.accept()
    await websocket.send_text("hello")
    await asyncio.Event().wait()


@app.websocket("/ws")
async def connection(websocket: WebSocket, context: CurrentContext) -> None:
    await context.enter_async_context(AsyncSession("websocket"))
    await websocket.accept()
    async for message in websocket.iter_text():
        await websocket.send_text(message)


Run = Callable[[], Awaitable[None]]


async def cancel_in_time(cancel: Callable[[], object], times: int) -> None:
    await journal.gate("working").passed()
    cancel()
    await journal.gate("held is releasing").passed()
    for _ in range(times - 1):
        cancel()
        await asyncio.sleep(0)
    journal.gate("held may release").open()


async def by_anyio(run: Run) -> None:
    scope = anyio.CancelScope()
    controller = asyncio.create_task(cancel_in_time(scope.cancel, 1))
    with scope:
        await run()
    await controller


async def by_task(run: Run, times: int) -> None:
    async def running() -> None:
        await run()

    task = asyncio.create_task(running())
    await cancel_in_time(task.cancel, times)
    await asyncio.wait({task})
    assert task.cancelled()


async def by_timeout(run: Run) -> None:
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)
    controller = asyncio.create_task(cancel_in_time(lambda: limit.reschedule(loop.time()), 1))
    with contextlib.suppress(TimeoutError):
        async with limit:
            await run()
    await controller


INTERRUPTIONS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "anyio": by_anyio,
    "task": partial(by_task, times=1),
    "task-three-times": partial(by_task, times=3),
    "timeout": by_timeout,
}


class Interrupting:
    """Cuts off requests that ask for it, once they hold their resources, and answers them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        how = parse_qs(scope.get("query_string", b"").decode()).get("interrupt")
        if how is None:
            await self.app(scope, receive, send)
            return
        await INTERRUPTIONS[how[0]](partial(self.app, scope, receive, send))
        journal.note("interrupted")
        if scope["type"] == "http":
            await PlainTextResponse("interrupted")(scope, receive, send)


async def drain(request: Request) -> JSONResponse:
    return JSONResponse(await manager.drain(float(request.query_params["timeout"])))


async def health(request: Request) -> JSONResponse:
    return JSONResponse(manager.is_healthy())


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


options: dict[str, Any] = {"drain_timeout": float(os.environ.get("DRAIN_TIMEOUT", "10"))}
app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify), **options)
app.add_middleware(Interrupting)
door = [Route("/door/drain", drain, methods=["POST"]), Route("/door/health", health)]
app.add_middleware(Door, manager=manager, journal=journal, routes=door)
