"""The common loop of a Starlette or FastAPI WebSocket endpoint."""

from collections.abc import AsyncIterator
from json import loads
from typing import Any, Final, Literal, overload

from starlette.websockets import WebSocket, WebSocketState

UNSUPPORTED_DATA: Final = 1003
INVALID_PAYLOAD: Final = 1007


@overload
def messages(websocket: WebSocket, kind: Literal["text"] = "text") -> AsyncIterator[str]: ...
@overload
def messages(websocket: WebSocket, kind: Literal["bytes"]) -> AsyncIterator[bytes]: ...
@overload
def messages(websocket: WebSocket, kind: Literal["json"]) -> AsyncIterator[Any]: ...
async def messages(websocket: WebSocket, kind: Literal["text", "bytes", "json"] = "text") -> AsyncIterator[Any]:
    """``async for message in messages(websocket):`` accepts the connection, if that is still to be done, and gives each
    message until the client goes.

    A client that sends another kind of message is closed with 1003, one whose text is no JSON with 1007: the loop ends
    then, too. An endpoint that only sends events needs the loop all the same, to notice that its client has gone.
    """
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept()
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        data = message.get("bytes" if kind == "bytes" else "text")
        if data is None:
            await websocket.close(UNSUPPORTED_DATA, f"This connection takes {_NAMES[kind]}.")
            return
        if kind == "json":
            try:
                data = loads(data)
            except (ValueError, RecursionError):
                await websocket.close(INVALID_PAYLOAD, "The message is no JSON.")
                return
        yield data


_NAMES: Final = {"text": "text", "bytes": "binary messages", "json": "JSON text"}
