"""Two apps under an egress guard: below `/report` one that reports, below `/block` one that holds back.

`/protect` has a user protect a value of theirs. The others answer with what the cache of the app has, whoever asks:
that is the bug that the guard is for. `/seen` shows what is on record.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ucm_middleware import EVERYONE, EgressPolicy, UserContextManager, UserContextMiddleware, current_context


def identify(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-user")


def made(policy: EgressPolicy) -> Starlette:
    manager = UserContextManager(egress=policy)
    cache: dict[str, str] = {}

    async def protect(request: Request) -> Response:
        value = (await request.body()).decode()
        current_context().protect(value)
        return PlainTextResponse("ok")

    async def put(request: Request) -> Response:
        cache.update(await request.json())
        return PlainTextResponse("ok")

    async def profile(request: Request) -> Response:
        return JSONResponse({"items": [{"name": "one", "token": cache["value"]}]})

    async def header(request: Request) -> Response:
        return PlainTextResponse("ok", headers={"x-token": cache["value"]})

    async def stream(request: Request) -> Response:
        value, at = cache["value"], int(request.query_params["at"])

        async def parts() -> AsyncIterator[str]:
            yield "data: begin\n\n"
            yield f"data: {value[:at]}"
            yield f"{value[at:]}\n\n"
            yield "data: end\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def echo(request: Request) -> Response:
        said = [request.path_params.get("said", ""), *request.query_params.values()]
        said += [value for name, value in request.headers.items() if name.startswith("x-said")]
        body = await request.body()
        said += [str(json.loads(body))] if body else []
        return JSONResponse({"said": said})

    async def login(request: Request) -> Response:
        return JSONResponse({"access_token": (await request.json())["give"][::-1]})

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async for message in websocket.iter_text():
            if message == "profile":
                await websocket.send_json({"token": cache["value"]})
            elif message == "event":
                user = current_context().user_id
                delivery = await manager.send_event(user, "told", {"token": cache["value"]})
                await websocket.send_json([dropped.why for dropped in delivery.dropped])
            else:
                await websocket.send_text(message)

    async def seen(request: Request) -> Response:
        with manager.privileged(reason="test", users=EVERYONE):
            found: dict[str, Any] = {"system": [r for r in manager.get_system_trail() if r["event"] == "egress"]}
            for user in ("alice", "bob"):
                trail = manager.get_audit_trail(user) or {"events": []}
                found[user] = [record for record in trail["events"] if record["event"] == "egress"]
        return JSONResponse(found)

    return Starlette(
        routes=[
            Route("/protect", protect, methods=["POST"]),
            Route("/put", put, methods=["POST"]),
            Route("/profile", profile),
            Route("/header", header),
            Route("/stream", stream),
            Route("/echo", echo, methods=["POST", "GET"]),
            Route("/echo/{said}", echo, methods=["POST", "GET"]),
            Route("/login", login, methods=["POST"]),
            WebSocketRoute("/socket", socket),
            Route("/seen", seen),
        ],
        middleware=[Middleware(UserContextMiddleware, manager=manager, identify=identify)],
    )


app = Starlette(
    routes=[
        Mount("/report", made(EgressPolicy(fields=["access_token"]))),
        Mount("/block", made(EgressPolicy(block=True))),
    ]
)
