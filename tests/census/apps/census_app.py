"""An app whose handlers leave something behind: one for each way, and beside it a twin that ends it in time.

`CENSUS_ACTION` and `CENSUS_ALLOW` are the policy. What was found is in the trail of the user who asked.
"""

import asyncio
import contextlib
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse

from ucm_middleware import (
    AgentTimeoutError,
    CensusPolicy,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.fastapi import CurrentContext
from ucm_middleware.types import ASGIApp, Receive, Scope, Send

manager = UserContextManager(
    census=CensusPolicy(action=os.environ.get("CENSUS_ACTION"), allow=os.environ.get("CENSUS_ALLOW", "").split()),  # type: ignore[arg-type]
)
app = FastAPI()
keep: list[Any] = []
timers: list[asyncio.TimerHandle] = []
cancelled: list[str] = []
gate = threading.Event()
pool = ThreadPoolExecutor(1)
busy: list[Future[bool]] = []


async def sleeps() -> None:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        cancelled.append("sleeps")
        raise


def rings() -> None:
    raise AssertionError("an hour has gone by")


def waits() -> None:
    gate.wait()


@app.get("/task")
async def task() -> None:
    keep.append(asyncio.create_task(sleeps()))
    await asyncio.sleep(0)  # it has begun


@app.get("/task/twin")
async def task_twin() -> None:
    work = asyncio.create_task(sleeps())
    await asyncio.sleep(0)
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


@app.get("/task/empty")
async def task_in_an_empty_context() -> None:
    keep.append(asyncio.create_task(sleeps(), context=contextvars.Context()))


@app.get("/timer")
async def timer() -> None:
    timers.append(asyncio.get_running_loop().call_later(3600, rings))


@app.get("/timer/twin")
async def timer_twin() -> None:
    asyncio.get_running_loop().call_later(3600, rings).cancel()


@app.get("/thread")
async def thread() -> None:
    gate.clear()
    inside = contextvars.copy_context()
    running = threading.Event()

    def run() -> None:
        running.set()
        waits()

    worker = threading.Thread(target=inside.run, args=(run,), name="left behind", daemon=True)
    worker.start()
    running.wait()


@app.get("/thread/twin")
async def thread_twin() -> None:
    gate.set()
    await asyncio.to_thread(waits)


@app.get("/job")
async def job() -> None:
    gate.clear()
    busy.append(pool.submit(gate.wait))
    pool.submit(contextvars.copy_context().run, waits)


@app.get("/job/twin")
async def job_twin() -> None:
    gate.set()
    await asyncio.wrap_future(pool.submit(contextvars.copy_context().run, waits))


async def reads() -> AsyncIterator[str]:
    context = current_context()
    yield context.user_id
    yield context.user_id


@app.get("/generator")
async def generator() -> None:
    rows = reads()
    await anext(rows)
    keep.append(rows)


@app.get("/generator/twin")
async def generator_twin() -> None:
    rows = reads()
    await anext(rows)
    await rows.aclose()  # type: ignore[attr-defined]


@app.get("/reference")
async def reference() -> None:
    keep.append(current_context())


@app.get("/reference/twin")
async def reference_twin() -> None:
    keep.append(current_context().user_id)


@app.get("/cycle")
async def cycle() -> None:
    """Only the garbage collector frees it: that is not held."""
    loop: list[Any] = [current_context()]
    loop.append(loop)


@app.get("/plain")
async def plain(request: Request) -> str:
    user: str = request.state.user_context.user_id
    return user


@app.get("/sync")
def in_a_thread() -> str:
    return current_context().user_id


def depends_sync(context: CurrentContext) -> UserExecutionContext:
    return context


async def depends_async(context: CurrentContext) -> UserExecutionContext:
    return context


async def depends_yield(context: CurrentContext) -> AsyncIterator[UserExecutionContext]:
    yield context


def depends_yield_sync(context: CurrentContext) -> Iterator[UserExecutionContext]:
    yield context


Given = UserExecutionContext


@app.get("/depends/sync")
def given_sync(context: Annotated[Given, Depends(depends_sync)]) -> str:
    return context.user_id


@app.get("/depends/async")
async def given_async(context: Annotated[Given, Depends(depends_async)]) -> str:
    return context.user_id


@app.get("/depends/yield")
async def given_yield(context: Annotated[Given, Depends(depends_yield)]) -> str:
    return context.user_id


@app.get("/depends/yield-sync")
def given_yield_sync(context: Annotated[Given, Depends(depends_yield_sync)]) -> str:
    return context.user_id


@app.get("/stream")
async def stream() -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        for part in current_context().user_id:
            yield part.encode()
            await asyncio.sleep(0)

    return StreamingResponse(parts())


@app.get("/background")
async def background(tasks: BackgroundTasks) -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        keep.append(current_context().user_id)

    tasks.add_task(work)


@app.get("/error")
async def error() -> None:
    current_context()
    raise ValueError("on purpose")


@app.get("/gathered")
async def gathered() -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(asyncio.to_thread(current_context))


@app.get("/block")
async def block() -> None:
    """Work for another context of the same user, in a block of its own, which leaves a task."""
    async with managed_user_context(manager.create_isolated_context(current_context().user_id)):
        keep.append(asyncio.create_task(sleeps()))


@app.get("/block/twin")
async def block_twin() -> None:
    async with managed_user_context(manager.create_isolated_context(current_context().user_id)) as own:
        own.agent_context["seen"] = True
        await asyncio.sleep(0)


@app.get("/child")
async def child() -> None:
    async with managed_user_context(current_context().create_child_context("part")):
        await asyncio.sleep(0)


async def works_on(user: str) -> None:
    async with managed_user_context(manager.create_isolated_context(user)) as own:
        own.agent_context["seen"] = True
    await asyncio.sleep(3600)


@app.get("/worker")
async def worker() -> None:
    """The worker goes on after its block, with a name for the context that it had."""
    keep.append(asyncio.create_task(works_on(current_context().user_id), context=contextvars.Context()))
    await asyncio.sleep(0)


@app.get("/timeout")
async def timeout() -> None:
    """The loop keeps a cancelled timer until its time has come."""
    async with asyncio.timeout(3600):
        await asyncio.wait_for(asyncio.sleep(0.001), 3600)


async def hangs() -> None:
    await asyncio.to_thread(current_run().in_thread(gate.wait, "gate"))


manager.register_agent("hangs", lambda context: hangs, timeout=0.1)


@app.get("/agent")
async def agent() -> None:
    """A run tells of its own stragglers."""
    gate.clear()
    with contextlib.suppress(AgentTimeoutError):
        await manager.execute_with_agent(current_context().user_id, "hangs")


@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(current_context().user_id)
    await websocket.receive_text()
    await websocket.close()


@app.websocket("/socket/task")
async def socket_task(websocket: WebSocket) -> None:
    await websocket.accept()
    keep.append(asyncio.create_task(sleeps()))
    await websocket.close()


async def passes(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    return await call_next(request)


class Outside:
    """Answers the test's own questions, in nobody's context."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if not path.startswith("/door/"):
            await self.app(scope, receive, send)
            return
        if path == "/door/open":
            gate.set()
            answer: object = None
        elif path == "/door/cancelled":
            answer = [*cancelled, *("rings" for timer in timers if timer.cancelled())]
        else:
            user = path.rpartition("/")[2]
            with manager.privileged(reason="the test asks", users=[user]):
                answer = manager.get_audit_trail(user)
        await JSONResponse(answer)(scope, receive, send)


if "CENSUS_BASED" in os.environ:
    app.add_middleware(BaseHTTPMiddleware, dispatch=passes)
app.add_middleware(
    UserContextMiddleware, manager=manager, identify=lambda connection: connection.query_params.get("user")
)
served = Outside(app)
