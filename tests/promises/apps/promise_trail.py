"""An app whose trail is a file: LEDGER, KEYS, AUDIT and CAPACITY in the environment say which, and how it is kept."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, cast

from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ucm_middleware import EVERYONE, UserContextManager, UserContextMiddleware, bearer_token, current_context
from ucm_middleware.audit import SQLiteLedger

ledger = SQLiteLedger(
    Path(os.environ["LEDGER"]), keys=os.environ.get("KEYS"), capacity=int(os.environ.get("CAPACITY", "65536"))
)
manager = UserContextManager(
    ledger=ledger,
    audit=cast('Literal["strict", "async"]', os.environ.get("AUDIT", "strict")),
    max_contexts_per_user=1000,
)
journal = Journal()


async def work(request: Request) -> JSONResponse:
    return JSONResponse(current_context().request_id)


async def stream(request: Request) -> StreamingResponse:
    request_id = current_context().request_id
    return StreamingResponse(iter([request_id[:10], request_id[10:]]))


async def fail(request: Request) -> JSONResponse:
    raise RuntimeError("this handler fails")


async def hold(request: Request) -> JSONResponse:
    journal.note("held", user=current_context().user_id)
    await journal.gate("let go").passed()
    return JSONResponse(current_context().request_id)


async def hold_half(request: Request) -> StreamingResponse:
    user = current_context().user_id

    async def halves() -> AsyncIterator[str]:
        yield "half "
        journal.note("held", user=user)
        await journal.gate("let go").passed()
        yield "whole"

    return StreamingResponse(halves())


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
        if text == "end":
            await websocket.close()
            break


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    for number in range(500):  # more than is written by the time that the server ends
        with manager.privileged(reason=f"shutdown {number}", users=EVERYONE):
            pass


async def state(request: Request) -> JSONResponse:
    return JSONResponse({"healthy": manager.is_healthy(), "lag": ledger.lag, "problem": ledger.problem})


app = Door(
    Starlette(
        routes=[
            *(Route(f"/{handler.__name__}", handler) for handler in (work, stream, fail, hold, hold_half)),
            WebSocketRoute("/echo", echo),
        ],
        lifespan=lifespan,
        middleware=[
            Middleware(
                UserContextMiddleware,
                manager=manager,
                identify=bearer_token(lambda token: token.removeprefix("token-of-")),
            )
        ],
    ),
    manager=manager,
    journal=journal,
    routes=[Route("/door/state", state)],
)
