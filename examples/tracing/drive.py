"""Let alice and bob use the assistant, which must be running: ``python -m examples.tracing.drive``."""

import asyncio
import os

import httpx
from websockets.asyncio.client import connect

WHERE = os.environ.get("ASSISTANT", "127.0.0.1:8000")


async def drive() -> None:
    """What the two do, one after the other."""
    for user in ("alice", "bob"):
        headers = {"Authorization": f"Bearer token-of-{user}"}
        async with httpx.AsyncClient(base_url=f"http://{WHERE}", headers=headers) as http:
            for path in ("/ask", "/notes/alice"):
                print(f"{user} GET {path}: {(await http.get(path)).status_code}")
        async with connect(f"ws://{WHERE}/chat", additional_headers=headers) as websocket:
            for text in ("hello", "goodbye"):
                await websocket.send(text)
                print(f"{user} chats: {await websocket.recv()!s}")


if __name__ == "__main__":
    asyncio.run(drive())
