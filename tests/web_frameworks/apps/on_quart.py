from collections.abc import AsyncGenerator
from typing import Any

import desk
from quart import Quart, request, websocket

from ucm_middleware import UserContextError, refusal_for

quart = Quart(__name__)


@quart.get("/whoami")
async def whoami() -> dict[str, Any]:
    return await desk.whoami()


@quart.get("/sync")
def sync() -> dict[str, Any]:
    return {"handler": desk.user()}


@quart.get("/late")
async def late() -> dict[str, Any]:
    return await desk.late(request.args["user"])


@quart.get("/denied")
async def denied() -> dict[str, Any]:
    return desk.denied()


@quart.get("/wait")
async def wait() -> dict[str, Any]:
    return await desk.wait()


@quart.get("/ticks")
async def ticks() -> AsyncGenerator[bytes]:
    return desk.ticks()


@quart.get("/ended")
async def ended() -> list[str]:
    return desk.ended[request.args["of"]]


@quart.websocket("/talk")
async def talk() -> None:
    while True:
        await websocket.send_json(desk.said(str(await websocket.receive())))


@quart.errorhandler(UserContextError)
async def refuse(error: UserContextError) -> tuple[dict[str, Any], int]:
    refusal = refusal_for(error)
    if refusal is None:
        raise error
    return {"detail": refusal.detail}, refusal.status


app = desk.served(quart)
