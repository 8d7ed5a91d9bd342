"""An app that cuts off whose client has left, and answers in every way that servers know to send a response."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ucm_middleware import UserContextManager, UserContextMiddleware, bearer_token, current_context

journal = Journal()
manager = UserContextManager()


async def work_on() -> None:
    """What is left to do when the client has its response: until the test opens the gate."""
    journal.note("working on")
    await journal.gate("work").passed()
    journal.note("worked", user=current_context().user_id)


async def parts() -> AsyncIterator[str]:
    yield "who"
    yield "le"


def whole(kind: str) -> Response:
    background = BackgroundTask(work_on)
    if kind == "file":
        return FileResponse(Path(__file__), background=background)
    if kind == "stream":
        return StreamingResponse(parts(), background=background)
    return PlainTextResponse("whole", background=background)


async def answer(request: Request) -> Response:
    return whole(request.path_params["kind"])


async def wait(request: Request) -> Response:
    journal.note("waiting")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        journal.note("cut off")
        raise
    return PlainTextResponse("never")


async def stream(request: Request) -> Response:
    async def body() -> AsyncIterator[str]:
        yield "first"
        await wait(request)

    return StreamingResponse(body())


async def upload(request: Request) -> Response:
    await anext(request.stream())
    return await wait(request)


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app = Starlette(
    routes=[
        Route("/answer/{kind}", answer),
        Route("/wait", wait),
        Route("/stream", stream),
        Route("/upload", upload, methods=["POST"]),
    ],
    middleware=[
        Middleware(Door, manager=manager, journal=journal),
        Middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify), cancel_on_disconnect=True),
    ],
)
