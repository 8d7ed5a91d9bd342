"""An app with the OpenTelemetry SDK, its OTLP exporter and its ASGI instrumentation, as people set them up.

Its ledger is a sealed file, in strict mode: ``LEDGER`` and ``KEYS`` name the files.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

from opentelemetry import baggage, trace
from opentelemetry.context import attach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import set_span_in_context
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from ucm_middleware import (
    EVERYONE,
    ContextClosedError,
    CrossUserAccessError,
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
    agent_run,
    current_context,
    managed_user_context,
)
from ucm_middleware.audit import SQLiteLedger

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("app")


def identify(connection: HTTPConnection) -> str | None:
    """The user that the token names."""
    _, _, token = connection.headers.get("authorization", "").partition(" ")
    if token == "forged":
        raise UnauthenticatedError("an unknown token")
    return token.removeprefix("token-of-") or None


manager = UserContextManager(
    max_contexts_per_user=2,
    ledger=SQLiteLedger(os.environ["LEDGER"], keys=os.environ["KEYS"]),
    audit="strict",
)


async def who(request: Request) -> JSONResponse:
    span = trace.get_current_span().get_span_context()
    return JSONResponse(
        {"user": current_context().user_id, "baggage": dict(baggage.get_all()), "trace": f"{span.trace_id:032x}"}
    )


async def theirs(request: Request) -> JSONResponse:
    manager.get_context("dave@example.com")
    return JSONResponse({})


async def crowd(request: Request) -> JSONResponse:
    for _ in range(2):
        manager.create_isolated_context(current_context().user_id)
    return JSONResponse({})


async def login(request: Request) -> JSONResponse:
    current_context().bind("carol@example.com")
    return JSONResponse({})


async def work(request: Request) -> JSONResponse:
    current_context().create_child_context("search").close()
    async with agent_run(current_context(), "planner"):
        with tracer.start_as_current_span("chat"):
            pass
    return JSONResponse({})


async def hold(request: Request) -> JSONResponse:
    def fail() -> None:
        raise RuntimeError("this one is not released")

    current_context().enter_context(nullcontext(), name="a good one")
    current_context().callback(fail)
    return JSONResponse({})


async def pay(request: Request) -> JSONResponse:
    current_context().record("transaction", seconds=0.01)
    current_context().record("transaction", outcome="failed", reason="conflict")
    return JSONResponse({})


async def outstay(request: Request) -> JSONResponse:
    with suppress(ContextClosedError):
        async with managed_user_context(manager.create_isolated_context(current_context().user_id, ttl_seconds=0.01)):
            await asyncio.Event().wait()
    return JSONResponse({})


async def sign_out(request: Request) -> JSONResponse:
    current_context().refresh(current_context().user_id)
    manager.create_isolated_context(current_context().user_id).close("revoked")
    return JSONResponse({})


async def inspect(request: Request) -> JSONResponse:
    with manager.privileged(reason="a look at all", users=EVERYONE):
        dave = manager.create_isolated_context("dave@example.com")
        shared: list[str] = []
        for context in (current_context(), dave):
            context.agent_context["shared"] = shared
        isolated = manager.validate_isolation()
        dave.close()
    return JSONResponse({"isolated": isolated})


async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    current_context().record("event_sent", data={"kind": "welcome"})
    async for text in websocket.iter_text():
        if text == "theirs":
            with suppress(CrossUserAccessError):
                manager.get_context("dave@example.com")
        await websocket.send_text(f"you said {text}")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    yield
    tracer.start_span("the end").end()
    provider.force_flush()


HANDLERS = who, theirs, login, work, hold, pay, outstay, sign_out, inspect, crowd

routes = [Route(f"/{handler.__name__}", handler) for handler in HANDLERS]
inside = Starlette(routes=[*routes, WebSocketRoute("/talk", talk)], lifespan=lifespan)
# The two that stay open in `crowd` are closed at the shutdown at once.
inside.add_middleware(UserContextMiddleware, manager=manager, identify=identify, drain_timeout=0)

app = OpenTelemetryMiddleware(inside)


class Leaky:
    """Leaves its span current behind it, and says whether the request before did."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            left = trace.get_current_span().get_span_context()
            scope["headers"] = [*scope["headers"], (b"x-left-behind", f"{left.trace_id:032x}".encode())]
            attach(set_span_in_context(tracer.start_span("left open")))
        await self.app(scope, receive, send)


async def left(request: Request) -> JSONResponse:
    span: Any = trace.get_current_span()
    parent = span.parent
    return JSONResponse(
        {
            "left_behind": request.headers["x-left-behind"],
            "trace": f"{span.get_span_context().trace_id:032x}",
            "parent": None if parent is None else f"{parent.span_id:016x}",
        }
    )


leaky_inside = Starlette(routes=[Route("/left", left)])
leaky_inside.add_middleware(UserContextMiddleware, manager=manager, identify=identify)
leaky = Leaky(leaky_inside)
