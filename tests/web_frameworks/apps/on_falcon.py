import asyncio
from typing import Any

import desk
from falcon.asgi import App, Request, Response, WebSocket
from falcon.util import sync_to_async

from ucm_middleware import UserContextError, refusal_for


class Whoami:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = await desk.whoami()


class Sync:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = {"handler": await asyncio.to_thread(desk.user)}


class Executor:
    """Falcon's own way into a thread leaves the ContextVars behind."""

    async def on_get(self, request: Request, response: Response) -> None:
        response.media = {"handler": await sync_to_async(desk.user)}


class Late:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = await desk.late(request.get_param("user", required=True))


class Denied:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = desk.denied()


class Wait:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = await desk.wait()


class Ticks:
    async def on_get(self, request: Request, response: Response) -> None:
        response.stream = desk.ticks()


class Ended:
    async def on_get(self, request: Request, response: Response) -> None:
        response.media = desk.ended[request.get_param("of", required=True)]


class Talk:
    async def on_websocket(self, request: Request, websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_media(desk.said(await websocket.receive_text()))


async def refuse(
    request: Request, response: Response | None, error: UserContextError, params: Any, **more: Any
) -> None:
    refusal = refusal_for(error)
    if refusal is None or response is None:
        raise error
    response.status, response.media = str(refusal.status), {"detail": refusal.detail}


falcon = App()
for path, resource in {
    "/whoami": Whoami(),
    "/sync": Sync(),
    "/executor": Executor(),
    "/late": Late(),
    "/denied": Denied(),
    "/wait": Wait(),
    "/ticks": Ticks(),
    "/ended": Ended(),
    "/talk": Talk(),
}.items():
    falcon.add_route(path, resource)
falcon.add_error_handler(UserContextError, refuse)

app = desk.served(falcon)
