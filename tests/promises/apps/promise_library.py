"""A server of the websockets library as a program: ``python promise_library.py asyncio``, or ``sync``.

It says its port, and serves until it gets SIGTERM: then it drains and closes.
"""

import asyncio
import json
import signal
import sys
import threading
from contextvars import ContextVar
from typing import Any

from starlette.requests import HTTPConnection
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_asyncio
from websockets.sync.server import ServerConnection as SyncConnection
from websockets.sync.server import serve as serve_sync

from ucm_middleware import CrossUserAccessError, UserContextManager, current_context
from ucm_middleware.websocket.websockets import wrap_handler

NOTE: ContextVar[str] = ContextVar("note", default="nothing")

manager = UserContextManager()


def identify(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-user")


def answer(message: dict[str, Any]) -> str:
    """What is seen here, before this message leaves its own marks."""
    context = current_context()
    try:
        manager.get_context(message["other"])
        other = "found"
    except CrossUserAccessError:
        other = "denied"
    seen = {
        "user": context.user_id,
        "request": context.request_id,
        "note": NOTE.get(),
        "data": context.agent_context.get("mark"),
        "other": other,
    }
    NOTE.set(message["mark"])
    context.agent_context["mark"] = message["mark"]
    return json.dumps(seen)


async def handler(connection: ServerConnection) -> None:
    async for message in connection:
        told = json.loads(message)
        if told is None:
            await connection.send("here")
            continue
        await manager.send_event(current_context().user_id, "marked", told["mark"])
        await connection.send(answer(told))


def sync_handler(connection: SyncConnection) -> None:
    for message in connection:
        told = json.loads(message)
        if told is None:
            connection.send("here")
            continue
        manager.post_event(current_context().user_id, "marked", told["mark"])
        connection.send(answer(told))


async def run() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    wrapped = wrap_handler(handler, manager=manager, identify=identify)
    async with serve_asyncio(wrapped, "127.0.0.1", 0, create_connection=wrapped.create_connection) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await stop.wait()
        await manager.drain(0.1)


def run_sync() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    wrapped = wrap_handler(sync_handler, manager=manager, identify=identify)
    with serve_sync(wrapped, "127.0.0.1", 0, create_connection=wrapped.create_connection) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.socket.getsockname()[1], flush=True)
        signal.sigwait({signal.SIGTERM})
        asyncio.run(manager.drain(0.1))


if __name__ == "__main__":
    if sys.argv[1] == "asyncio":
        asyncio.run(run())
    else:
        run_sync()
