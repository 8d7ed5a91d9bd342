from json import dumps
from typing import Any

import desk
from sanic import HTTPResponse, Request, Sanic, Websocket
from sanic.response import json

from ucm_middleware import UserContextError, refusal_for

sanic: "Sanic[Any, Any]" = Sanic("desk")


@sanic.get("/whoami")
async def whoami(request: Request) -> HTTPResponse:
    return json(await desk.whoami())


@sanic.get("/sync")
def sync(request: Request) -> HTTPResponse:
    return json({"handler": desk.user()})


@sanic.get("/late")
async def late(request: Request) -> HTTPResponse:
    return json(await desk.late(request.args["user"][0]))


@sanic.get("/denied")
async def denied(request: Request) -> HTTPResponse:
    return json(desk.denied())


@sanic.get("/wait")
async def wait(request: Request) -> HTTPResponse:
    return json(await desk.wait())


@sanic.get("/ticks")
async def ticks(request: Request) -> None:
    response = await request.respond(content_type="text/plain")
    assert response is not None
    async for tick in desk.ticks():
        await response.send(tick)


@sanic.get("/ended")
async def ended(request: Request) -> HTTPResponse:
    return json(desk.ended[request.args["of"][0]])


@sanic.websocket("/talk")  # type: ignore[untyped-decorator]
async def talk(request: Request, websocket: Websocket) -> None:
    while True:
        await websocket.send(dumps(desk.said(str(await websocket.recv()))))


@sanic.exception(UserContextError)
async def refuse(request: Request, error: UserContextError) -> HTTPResponse:
    refusal = refusal_for(error)
    if refusal is None:
        raise error
    return json({"detail": refusal.detail}, refusal.status)


app = desk.served(sanic)
