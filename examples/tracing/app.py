"""An assistant with traces: a question, a look at somebody else's notes, and a chat. See the README beside it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from ucm_middleware import UserContextManager, UserContextMiddleware, agent_run, bearer_token, managed_user_context
from ucm_middleware.fastapi import AuthenticatedContext

provider = TracerProvider(resource=Resource.create({"service.name": "assistant"}))
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # to OTEL_EXPORTER_OTLP_ENDPOINT, or port 4318 here
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("assistant")

TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}  # yours: verify a signature, look up a session
manager = UserContextManager()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Send what is left when the server stops."""
    yield
    provider.force_flush()


app = FastAPI(lifespan=lifespan)  # makes the span of each request itself, once a provider is set
app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(TOKENS.get))


async def think(seconds: float, about: str) -> None:
    """Stands for a model, or a database: what it does is a span of the application's own."""
    with tracer.start_as_current_span(about):
        await asyncio.sleep(seconds)


@app.get("/ask")
async def ask(context: AuthenticatedContext) -> dict[str, str]:
    """An agent plans, and a child context of its run looks something up."""
    async with agent_run(context, "planner") as run:
        await think(0.05, "chat")
        async with managed_user_context(run.context.create_child_context("look up")):
            await think(0.02, "query")
    return {"answer": "42"}


@app.get("/notes/{user_id}")
async def notes(user_id: str, context: AuthenticatedContext) -> dict[str, str]:
    """The caller's thread; for anybody else's, 403, which is on record and in the trace."""
    owner = context if user_id == context.user_id else manager.get_context(user_id)
    return {"thread": owner.thread_id}


@app.websocket("/chat")
async def chat(websocket: WebSocket) -> None:
    """Each message is a trace of its own, linked to the connection's."""
    await websocket.accept()
    try:
        while True:
            text = await websocket.receive_text()
            await think(0.03, "chat")
            await websocket.send_text(f"you said {text}")
    except WebSocketDisconnect:
        return
