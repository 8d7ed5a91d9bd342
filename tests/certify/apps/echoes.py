"""What users are answered is what they sent; some answers never come, and some are too long."""

from starlette.types import Receive, Scope, Send


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """By its path."""
    match scope["type"], scope.get("path"):
        case "http", "/never":
            while (await receive())["type"] != "http.disconnect":
                pass
        case "http", "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(100):  # 6 MiB: more than is read, though a server that is told to end can
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        case "http", _:
            await _echo(scope, receive, send)
        case "websocket", path:
            await _talk(str(path), scope, receive, send)


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    user = dict(scope["headers"]).get(b"x-user", b"")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": user + b":" + body})


async def _talk(path: str, scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    if path == "/refused":
        await send({"type": "websocket.close", "code": 1008})
        return
    told = [(b"x-told", b"in a header"), (b"set-cookie", b"sid=of-the-handshake")]
    if path == "/denied":
        await send({"type": "websocket.http.response.start", "status": 403, "headers": told})
        await send({"type": "websocket.http.response.body", "body": b"in a body"})
        return
    await send({"type": "websocket.accept", "headers": told})
    if path == "/closed":
        await send({"type": "websocket.close", "code": 1000, "reason": "in a reason"})
        return
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": str(message.get("text"))})
        if path == "/once":
            await send({"type": "websocket.close", "code": 1000})
            return
