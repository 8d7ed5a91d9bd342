from typing import Any

import desk
from blacksheep import Application, Request, Response, StreamedContent, WebSocket, json

from ucm_middleware import UserContextError, refusal_for

blacksheep = Application()


@blacksheep.router.get("/whoami")
async def whoami() -> dict[str, Any]:
    return await desk.whoami()


@blacksheep.router.get("/sync")
def sync() -> dict[str, Any]:
    return {"handler": desk.user()}


@blacksheep.router.get("/late")
async def late(user: str) -> dict[str, Any]:
    return await desk.late(user)


@blacksheep.router.get("/denied")
async def denied() -> dict[str, Any]:
    return desk.denied()


@blacksheep.router.get("/wait")
async def wait() -> dict[str, Any]:
    return await desk.wait()


@blacksheep.router.get("/ticks")
async def ticks() -> Response:
    return Response(200, content=StreamedContent(b"text/plain", desk.ticks))


@blacksheep.router.get("/ended")
async def ended(of: str) -> Response:
    return json(desk.ended[of])


@blacksheep.router.ws("/talk")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        await websocket.send_json(desk.said(await websocket.receive_text()))


@blacksheep.exception_handler(UserContextError)
async def refuse(self: Application, request: Request, error: UserContextError) -> Response:
    refusal = refusal_for(error)
    if refusal is None:
        raise error
    return json({"detail": refusal.detail}, refusal.status)


app = desk.served(blacksheep)
