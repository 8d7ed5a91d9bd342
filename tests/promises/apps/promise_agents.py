"""The same agents twice: run through the manager, and below `/bare` called as they are, by one instance for all.

Whose secret an agent gets is in a ContextVar that each request sets, as applications do with their users' tokens.
`/seen` shows what is on record and in spans of all users.
"""

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ucm_middleware import (
    EVERYONE,
    AgentPolicy,
    AgentTimeoutError,
    ContextClosedError,
    ContextNotFoundError,
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
    current_run,
)
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.websocket.starlette import messages

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

ledger = RecordingLedger()
manager = UserContextManager(ledger=ledger, agents=AgentPolicy(max_runs_per_user=8, queue_items=4))
secret: ContextVar[str] = ContextVar("secret")
late: list[str] = []


class Offer:
    """A stream that one request makes and another reads."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.is_made = asyncio.Event()
        self.is_read = asyncio.Event()

    def make(self, stream: Any) -> None:
        self.stream = stream
        self.is_made.set()


offers: defaultdict[str, Offer] = defaultdict(Offer)


def tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tool of the run, where there is one."""
    try:
        return current_run().wrap_tool(function)
    except ContextNotFoundError:
        return function


def look_up() -> str:
    time.sleep(0.001)
    return secret.get()


async def ask_for() -> str:
    await asyncio.sleep(0.001)
    return secret.get()


class Helper:
    """Keeps what it was asked, as agents do. ``ask_reader`` runs its sub-agent."""

    def __init__(self, ask_reader: Callable[[str], Awaitable[Any]]) -> None:
        self.memory: list[str] = []
        self._ask_reader = ask_reader

    async def __call__(self, prompt: str) -> dict[str, Any]:
        self.memory.append(prompt)
        found = [await asyncio.to_thread(tool(look_up)), await tool(ask_for)()]
        read = await asyncio.gather(*(self._ask_reader(prompt) for _ in range(2)))
        return {"memory": self.memory, "found": found, "read": read}


async def reader(prompt: str) -> list[str]:
    return [prompt, await asyncio.to_thread(tool(look_up))]


async def talker(prompt: str) -> AsyncIterator[list[str]]:
    for _ in range(12):
        yield [prompt, await tool(ask_for)()]


async def slow() -> None:
    run = current_run()

    def block() -> None:
        while not run.has_ended:
            time.sleep(0.01)
        try:
            run.emit("late", secret.get())
            late.append(threading.current_thread().name)
        except ContextClosedError:
            pass  # what must happen

    run.emit("progress", {"secret": secret.get()})
    await asyncio.to_thread(run.wrap_tool(block))


manager.register_agent(
    "helper",
    lambda context: Helper(
        lambda prompt: manager.execute_with_agent(current_context().user_id, "reader", {"prompt": prompt})
    ),
)
for name, agent in {"reader": reader, "talker": talker, "slow": slow}.items():
    manager.register_agent(name, lambda context, agent=agent: agent, stateless=True)  # type: ignore[misc]
shared = Helper(reader)


def given(request: Request) -> str:
    """The secret that comes with the request, which is its user's from here on."""
    secret.set(request.query_params["secret"])
    return secret.get()


async def ask(request: Request) -> Response:
    prompt = given(request)
    user = current_context().user_id
    return JSONResponse(await manager.execute_with_agent(user, "helper", {"prompt": prompt}))


async def talk(request: Request) -> Response:
    prompt = given(request)
    user = current_context().user_id

    async def lines() -> AsyncIterator[str]:
        async with manager.stream_with_agent(user, "talker", {"prompt": prompt}) as stream:
            async for item in stream:
                yield json.dumps(item) + "\n"

    return StreamingResponse(lines())


async def time_out(request: Request) -> Response:
    given(request)
    try:
        await manager.execute_with_agent(current_context().user_id, "slow", timeout=0.05)
    except AgentTimeoutError as error:
        return JSONResponse(str(error))
    return JSONResponse("in time", 500)


async def publish(request: Request) -> Response:
    """Make a stream, and wait with it open until another request has read it."""
    prompt = given(request)
    user = current_context().user_id
    async with manager.stream_with_agent(user, "talker", {"prompt": prompt}) as stream:
        offer = offers[request.query_params["name"]]
        offer.make(stream)
        await offer.is_read.wait()
    return JSONResponse("read")


async def read(request: Request) -> Response:
    """Read a stream that another request has made."""
    given(request)
    offer = offers[request.query_params["name"]]
    await offer.is_made.wait()
    try:
        return JSONResponse([item async for item in offer.stream])
    finally:
        offer.is_read.set()


async def live(websocket: WebSocket) -> None:
    secret.set(websocket.query_params["secret"])
    user = current_context().user_id
    async for message in messages(websocket):
        if message == "talk":
            async with manager.stream_with_agent(user, "talker", {"prompt": secret.get()}) as stream:
                items = [await anext(stream), await anext(stream)]  # and it is broken off
        else:
            items = [await manager.execute_with_agent(user, "helper", {"prompt": secret.get()})]
        await websocket.send_text(json.dumps({"type": "answer", "user_id": user, "data": items}))


async def bare_ask(request: Request) -> Response:
    return JSONResponse(await shared(given(request)))


async def bare_publish(request: Request) -> Response:
    offers[request.query_params["name"]].make(talker(given(request)))
    return JSONResponse("made")


async def seen(request: Request) -> Response:
    with manager.privileged(reason="the test looks", users=EVERYONE):
        active, stragglers = manager.get_active_contexts(), manager.get_stragglers()
    runs = [
        {"user": record.user_id, "request": record.request_id, **dict(record.data)}
        for record in ledger.select("agent_run")
    ]
    return JSONResponse(
        {
            "busy": len(active) + len(stragglers),
            "late": late,
            "runs": runs,
            "records": [repr((tuple(record), record.data)) for record in ledger.records],
            "spans": [span.to_json() for span in exporter.get_finished_spans()],
        }
    )


identify = bearer_token(lambda token: token.removeprefix("token-of-"))
inner = Starlette(
    routes=[
        *(Route(f"/{view.__name__}", view) for view in (ask, talk, time_out, publish, read)),
        WebSocketRoute("/live", live),
    ],
    middleware=[Middleware(UserContextMiddleware, manager=manager, identify=identify)],
)
app = Starlette(
    routes=[
        Route("/seen", seen),
        Mount(
            "/bare",
            routes=[Route("/ask", bare_ask), Route("/publish", bare_publish), Route("/read", read)],
        ),
        Mount("/", inner),
    ]
)
