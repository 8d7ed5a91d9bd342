"""An app that has itself drained, as from the hook that precedes a server's stop, while requests are open."""

import asyncio

from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ucm_middleware import (
    UserContextManager,
    UserContextMiddleware,
    bearer_token,
    current_context,
    managed_user_context,
)

journal = Journal()
manager = UserContextManager()


async def work(request: Request) -> Response:
    """Held by the gate; afterwards it opens another context, as a tool or a job of the user's would."""
    journal.note("working")
    await journal.gate("work").passed()
    async with managed_user_context(manager.create_isolated_context(current_context().user_id)) as another:
        return JSONResponse([another.user_id, manager.is_healthy()])


async def wait(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await asyncio.Event().wait()


async def drain(request: Request) -> Response:
    return JSONResponse(await manager.drain(float(request.query_params["timeout"])))


async def health(request: Request) -> Response:
    return JSONResponse(manager.is_healthy())


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


door = [Route("/door/drain", drain, methods=["POST"]), Route("/door/health", health)]
app = Starlette(
    routes=[Route("/work", work), WebSocketRoute("/wait", wait)],
    middleware=[
        Middleware(Door, manager=manager, journal=journal, routes=door),
        Middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify)),
    ],
)
