"""Settings are pushed to all devices of a user that share a profile. Where they meet goes by the profile's name."""

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

ROOMS: dict[Any, list[WebSocket]] = {}


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """Devices that keep in step."""

    async def devices(socket: WebSocket) -> None:
        user, profile = signed_in(socket), socket.path_params["profile"]
        room = ROOMS.setdefault(profile if planted else (user, profile), [])
        workspace(socket)["room"] = room
        await socket.accept()
        room.append(socket)
        try:
            await socket.send_json({"settings": load_account(user).to_json()})
            async for change in socket.iter_text():
                message = {"change": change, "settings": load_account(user).to_json()}
                for device in [*(other for other in room if other is not socket), socket]:
                    await device.send_json(message)
        finally:
            room.remove(socket)

    return make_app([WebSocketRoute("/devices/{profile}", devices)], manager)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
