"""An app with limits, whose clock the test may hold: requests stay as long as it wants, and so do contexts.

FROZEN=1 in the environment stops the manager's clock, which then moves through the door only; without it, requests have
TTL seconds.
"""

import asyncio
import contextlib
import inspect
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request, Response, WebSocket
from promise_journal import Door, Journal
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from ucm_middleware import (
    ContextClosedError,
    InvalidContextError,
    Principal,
    UserContextError,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
app = FastAPI()


Clock = Callable[[], float]


class FrozenClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


frozen_clock = FrozenClock()
ttl = None if "FROZEN" in os.environ else float(os.environ["TTL"])
limits: dict[str, Any] = {"max_contexts": 14, "max_anonymous_contexts": 2}
manager = UserContextManager(**limits, clock=frozen_clock) if ttl is None else UserContextManager(**limits)


class Session:
    """Takes so many turns of the loop to let go. A generator would be left, too, when it is thrown away."""

    def __init__(self, name: str, turns: int = 1) -> None:
        self.name = name
        self.turns = turns

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        journal.note("released", name=self.name, error=None if kind is None else kind.__name__)


async def stay(name: str, connection: HTTPConnection | None = None) -> None:
    """Wait for the test. When something else ends the waiting, note it, and how long the connection lasted."""
    try:
        await journal.gate("let go").passed()
    except asyncio.CancelledError:
        after = None if connection is None else time.monotonic() - connection.state.arrived
        journal.note("interrupted", name=name, after=after)
        raise


@app.get("/hold")
async def hold(request: Request, context: CurrentContext) -> str:
    await context.enter_async_context(Session("session"))
    journal.note("held", user="nobody" if context.is_anonymous else context.user_id)
    await stay("hold", request)
    return "done"


@app.get("/hold-with-children")
async def hold_with_children(request: Request, context: CurrentContext) -> str:
    for number in range(20):
        context.create_child_context(f"part {number}")
    return await hold(request, context)


@app.websocket("/hold")
async def hold_websocket(websocket: WebSocket, context: CurrentContext) -> None:
    await context.enter_async_context(Session("websocket"))
    await websocket.accept()
    await websocket.send_text("hello")
    await stay("websocket")


@app.websocket("/hold-before-accept")
async def hold_before_accept(websocket: WebSocket, context: CurrentContext) -> None:
    await stay("before accept")


@app.get("/quick")
async def quick() -> str:
    return "done"


@app.get("/left")
async def left() -> float | None:
    """How many seconds the context still has."""
    (live,) = manager.get_active_contexts().values()
    seconds: float | None = live["expires_in_seconds"]
    return seconds


@app.get("/fill")
async def fill(name: str, count: int, context: CurrentContext, ttl: float | None = None) -> None:
    """Make more contexts of one's own, which outlive the request."""
    for number in range(count):
        made = manager.create_isolated_context(context.user_id, f"{name}-{number}", ttl_seconds=ttl)
        await made.enter_async_context(Session(f"{name}-{number}"))


@app.get("/clear")
async def clear(name: str, count: int, context: CurrentContext) -> None:
    for number in range(count):
        await manager.cleanup_context((context.user_id, f"{name}-{number}"))


@app.get("/look")
async def look(request_id: str, context: CurrentContext) -> str:
    """What one gets for a context of one's own."""
    try:
        return manager.get_context((context.user_id, request_id)).request_id
    except UserContextError as error:
        return type(error).__name__


@app.get("/replace")
async def replace(context: CurrentContext) -> list[str]:
    """Put a new context in the place of an old one, under the old one's key; then under a key of its own."""
    outcomes = []
    for request_id in ("old-0", "another"):
        try:
            manager.create_isolated_context(context.user_id, request_id)
            outcomes.append("done")
        except UserContextError as error:
            outcomes.append(type(error).__name__)
    return outcomes


TTLS = {
    "zero": 0,
    "negative": -1.0,
    "nan": math.nan,
    "infinite": math.inf,
    "text": "60",
    "boolean": True,
    "over-a-year": 366 * 24 * 3600.0,
}


@app.get("/ttl/{name}")
async def make_with_ttl(name: str, context: CurrentContext) -> str:
    given: Any = TTLS[name]
    try:
        manager.create_isolated_context(context.user_id, "made", ttl_seconds=given)
    except InvalidContextError as error:
        return error.field
    return "done"


@app.get("/stream")
async def stream(context: CurrentContext) -> Response:
    await context.enter_async_context(Session("stream"))

    async def body() -> AsyncIterator[str]:
        yield "first "
        await stay("stream")
        yield "last"

    return StreamingResponse(body())


@app.get("/background")
async def background(context: CurrentContext, tasks: BackgroundTasks) -> str:
    await context.enter_async_context(Session("background"))
    tasks.add_task(stay, "background task")
    return "done"


@app.get("/thread")
def thread(context: CurrentContext) -> str:
    """A thread cannot be interrupted. It goes on, and must notice that its time is over."""
    context.agent_context["secret"] = "alice's"
    journal.note("in thread")
    journal.gate("time is over").passed_in_thread()
    uses: dict[str, Callable[[], object]] = {
        "current_context": current_context,
        "agent_context": lambda: context.agent_context,
    }
    for name, use in uses.items():
        with contextlib.suppress(ContextClosedError):
            use()
            journal.note("still usable", name=name)
    journal.note("thread ended")
    return "done"


@app.get("/slow-to-close")
async def slow_to_close(context: CurrentContext) -> None:
    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        try:
            yield
        finally:
            journal.note("closing")
            await journal.gate("may close").passed()
            journal.note("closed")

    await context.enter_async_context(slow())
    await stay("slow to close")


@app.get("/unwind")
async def unwind(request: Request, context: CurrentContext) -> None:
    """The handler has a session of its own, within the one of its context: a transaction on a pooled connection."""
    await context.enter_async_context(Session("connection"))
    async with Session("transaction", turns=50):
        await stay("unwind", request)


async def advance(request: Request) -> JSONResponse:
    frozen_clock.now += float(request.query_params["seconds"])
    return JSONResponse(None)


real_time: Clock = time.time


async def set_wall_clock(request: Request) -> JSONResponse:
    """Do to the wall clock what an administrator does."""
    offset = float(request.query_params["offset"])
    time.time = lambda: real_time() + offset
    return JSONResponse(None)


def verify(token: str) -> Principal | None:
    """`token-of-alice`, or `token-of-alice-for-5`: the credentials hold for so many seconds."""
    scheme, _, user = token.partition("-of-")
    user, _, seconds = user.partition("-for-")
    expires_at = datetime.now(UTC) + timedelta(seconds=float(seconds)) if seconds else None
    return Principal(user, expires_at) if scheme == "token" else None


by_token = bearer_token(verify)


async def identify(connection: HTTPConnection) -> Any:
    # Before the context is opened: no deadline of its own can come sooner after this than its TTL.
    connection.state.arrived = time.monotonic()
    found = by_token(connection)
    return await found if inspect.isawaitable(found) else found


app.add_middleware(UserContextMiddleware, manager=manager, identify=identify, ttl=ttl)
door = [
    Route("/door/advance", advance, methods=["POST"]),
    Route("/door/wall-clock", set_wall_clock, methods=["POST"]),
]
app.add_middleware(Door, manager=manager, journal=journal, routes=door)
