"""Apps under an egress guard that do what the guard may stumble over: below `/report`, `/block`, and the same within
GZipMiddleware and with a strict audit.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from ucm_middleware import EVERYONE, EgressPolicy, UserContextManager, UserContextMiddleware, current_context
from ucm_middleware.audit import SQLiteLedger


def identify(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-user")


class Raw:
    """An ASGI app as nobody should write one."""

    def __init__(self, cache: dict[str, str]) -> None:
        self.cache = cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = self.cache["value"].encode()
        start: dict[str, Any] = {"type": "http.response.start", "status": 200}
        match scope["path"].rpartition("/")[2]:
            case "iterated":
                await send({**start, "headers": iter([(b"x-one", b"1"), (b"content-length", b"2")])})
                await send({"type": "http.response.body", "body": b"ok"})
            case "unfinished":
                await send({**start, "headers": [(b"content-length", b"99")]})
                await send({"type": "http.response.body", "body": b"data: begin", "more_body": True})
            case "cookie":
                cookie = b'sid="' + value + b'\\054x"; Path=/'
                await send({**start, "headers": [(b"set-cookie", cookie), (b"content-length", b"2")]})
                await send({"type": "http.response.body", "body": bytearray(b"ok")})
            case "silent":
                pass


def made(manager: UserContextManager, *, outside: tuple[Middleware, ...] = ()) -> Starlette:
    cache: dict[str, str] = {"value": "nothing"}
    notes: list[str] = []

    async def protect(request: Request) -> Response:
        value = (await request.body()).decode()
        current_context().protect(value)
        cache["value"] = value
        return PlainTextResponse("ok")

    async def profile(request: Request) -> Response:
        return JSONResponse({"token": cache["value"], "filler": "x " * 500})

    async def parts(request: Request) -> Response:
        text = f"data: begin\n\ndata: {cache['value']}\n\ndata: end\n\n"

        async def one_by_one() -> AsyncIterator[str]:
            for letter in text:
                yield letter

        return StreamingResponse(one_by_one(), media_type="text/event-stream")

    async def big(request: Request) -> Response:
        async def lines() -> AsyncIterator[str]:
            for number in range(40):
                yield "a line of some words\n" * 500 + (f"{cache['value']}\n" if number % 10 == 5 else "")

        return StreamingResponse(lines())

    async def store(request: Request) -> Response:
        notes.append((await request.body()).decode())
        return PlainTextResponse("ok")

    async def shown(request: Request) -> Response:
        return PlainTextResponse("\n".join(notes))

    async def claim(request: Request) -> Response:
        return JSONResponse({"access_token": (await request.body()).decode()})

    async def login(request: Request) -> Response:
        user, value = (await request.body()).decode().split()
        current_context().protect(value)
        current_context().bind(user)
        return JSONResponse({"session": value}, background=BackgroundTask(current_context().protect, value))

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async for message in websocket.iter_text():
            if message == "close":
                await websocket.close(4000, cache["value"])
                return
            if message == "binary":
                await websocket.send_bytes(cache["value"].encode())
            if message == "profile":
                await websocket.send_text(cache["value"])
            if message == "bye":
                await websocket.send_text("bye")

    async def denied(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse(cache["value"], 403))

    async def seen(request: Request) -> Response:
        with manager.privileged(reason="test", users=EVERYONE):
            return JSONResponse([r for r in manager.get_system_trail() if r["event"] == "egress"])

    return Starlette(
        routes=[
            Route("/protect", protect, methods=["POST"]),
            Route("/profile", profile),
            Route("/parts", parts),
            Route("/big", big),
            Route("/store", store, methods=["POST"]),
            Route("/shown", shown),
            Route("/claim", claim, methods=["POST"]),
            Route("/login", login, methods=["POST"]),
            WebSocketRoute("/socket", socket),
            WebSocketRoute("/denied", denied),
            Route("/seen", seen),
            Mount("/raw", Raw(cache)),
        ],
        middleware=[*outside, Middleware(UserContextMiddleware, manager=manager, identify=identify)],
    )


def strict() -> UserContextManager:
    ledger = SQLiteLedger(Path(os.environ["LEDGER"]), keys=None)
    return UserContextManager(egress=EgressPolicy(block=True), audit="strict", ledger=ledger)


FIELDS = ["access_token"]
app = Starlette(
    routes=[
        Mount("/report", made(UserContextManager(egress=EgressPolicy(fields=FIELDS)))),
        Mount("/block", made(UserContextManager(egress=EgressPolicy(fields=FIELDS, block=True)))),
        Mount(
            "/gzip",
            made(UserContextManager(egress=EgressPolicy()), outside=(Middleware(GZipMiddleware, minimum_size=100),)),
        ),
        Mount("/strict", made(strict())),
    ]
)
