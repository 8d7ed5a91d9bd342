from typing import Any

import desk
from litestar import Litestar, Request, Response, WebSocket, get, websocket
from litestar.response import Stream

from ucm_middleware import UserContextError, refusal_for


@get("/whoami")
async def whoami() -> dict[str, Any]:
    return await desk.whoami()


@get("/sync", sync_to_thread=True)
def sync() -> dict[str, Any]:
    return {"handler": desk.user()}


@get("/late")
async def late(user: str) -> dict[str, Any]:
    return await desk.late(user)


@get("/denied")
async def denied() -> dict[str, Any]:
    return desk.denied()


@get("/wait")
async def wait() -> dict[str, Any]:
    return await desk.wait()


@get("/ticks")
async def ticks() -> Stream:
    return Stream(desk.ticks())


@get("/ended")
async def ended(of: str) -> list[str]:
    return desk.ended[of]


@websocket("/talk")
async def talk(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    while True:
        await socket.send_json(desk.said(await socket.receive_text()))


def refuse(request: Request[Any, Any, Any], error: UserContextError) -> Response[Any]:
    refusal = refusal_for(error)
    if refusal is None:
        raise error
    return Response({"detail": refusal.detail}, status_code=refusal.status)


app = desk.served(
    Litestar(
        [whoami, sync, late, denied, wait, ticks, ended, talk],
        exception_handlers={UserContextError: refuse},
    )
)
