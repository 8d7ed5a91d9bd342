"""The servers that events are sent from, each in a process of its own: ``-m benchmarks.event_servers NAME LOOP``.

One prints its port. To each line on its standard input, the name of a work and how often to do it, it answers with the
nanoseconds of CPU that all threads of the process have taken by then.
"""

# pyright: reportPrivateUsage=false

import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context, copy_context
from importlib import import_module
from socket import create_server
from time import process_time_ns
from typing import Any, Final

import uvicorn
from starlette.requests import HTTPConnection
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as serve_websockets

from ucm_middleware import UserContextManager, UserContextMiddleware
from ucm_middleware.types import ASGIApp, Receive, Scope, Send

OURS: Final = "ours"
SOCKETIO: Final = "socketio"
WEBSOCKETS: Final = "websockets"

EVENT: Final = "message"
DATA: Final[dict[str, Any]] = {"text": "a line of an answer, as long as most lines of text are", "at": 7, "done": False}
"""What each event carries."""

USERS: Final = {"user-with-1": 1, "user-with-10": 10}
"""Who there is, and with how many connections."""

MOST: Final = 100

LOOPS: Final = ("asyncio", "uvloop")

Work = Callable[[int], Awaitable[None]]
"""Sends so many events."""

Serving = tuple[int, Mapping[str, Work]]
"""The port, and the works by name."""


Once = Callable[[], Coroutine[Any, Any, None]]
Repeat = Callable[[Once, int], Coroutine[Any, Any, None]]

PAUSE: Final = 0.0002
"""Seconds between two events that go one at a time: enough for the client to read one and wait for the next."""


async def at_once(once: Once, times: int) -> None:
    """As fast as it goes."""
    for _ in range(times):
        await once()


async def apart(once: Once, times: int) -> None:
    """One at a time: each is written, and finds a client that waits for it."""
    for _ in range(times):
        await once()
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # uvloop writes at the end of a turn
        time.sleep(PAUSE)  # noqa: ASYNC251 - the loop, which would count, has nothing to do


async def nothing() -> None:
    """What ``apart`` takes by itself."""


class Ours:
    """An app behind the middleware, and beside it the same app bare, at ``/bare/USER``."""

    def __init__(self) -> None:
        self.manager = UserContextManager(max_contexts_per_user=MOST, max_connections_per_user=MOST)
        self.wrapped = UserContextMiddleware(self.app, manager=self.manager, identify=self.identify)
        self.sends: dict[str, list[Send]] = defaultdict(list)
        self.variables: dict[str, Context] = {}

    def identify(self, connection: HTTPConnection) -> str:
        return connection.url.path.rpartition("/")[2]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self.app if scope["path"].startswith("/bare/") else self.wrapped
        await app(scope, receive, send)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Accept, and wait for the end."""
        await receive()
        await send({"type": "websocket.accept"})
        self.sends[scope["path"]].append(send)
        self.variables[scope["path"]] = copy_context()
        while (await receive())["type"] != "websocket.disconnect":
            pass

    def works(self) -> dict[str, Work]:
        found: dict[str, Work] = {}
        for user in USERS:
            event, bare = self._event(user), self._bare(user)
            found[f"event {user}"] = self._inside(f"/{user}", event)
            found[f"bare {user}"] = self._inside(f"/bare/{user}", bare)
            found[f"task {user}"] = self._inside(f"/bare/{user}", self._in_a_task(user))
            found[f"apart event {user}"] = self._inside(f"/{user}", event, apart)
            found[f"apart bare {user}"] = self._inside(f"/bare/{user}", bare, apart)
            found[f"apart nothing {user}"] = self._inside(f"/bare/{user}", nothing, apart)
        return found

    def _event(self, user: str) -> Once:
        async def send() -> None:
            await self.manager.send_event(user, EVENT, DATA)

        return send

    def _bare(self, user: str) -> Once:
        """The bytes of the newest event, to each connection, by ``send`` alone."""

        async def send() -> None:
            text = self.manager._hub._channels[user].kept[-1].text
            for one in self.sends[f"/bare/{user}"]:
                await one({"type": "websocket.send", "text": text})

        return send

    def _in_a_task(self, user: str) -> Once:
        """What is to be sent is made JSON, and sent from a task: the least that does not hold the caller up."""
        bare = self._bare(user)

        async def send() -> None:
            json.dumps(DATA)
            task = asyncio.create_task(bare())
            await asyncio.sleep(0)
            await task

        return send

    def _inside(self, path: str, once: Once, repeat: Repeat = at_once) -> Work:
        """In the context of a handler: a user's code sends the user's events."""

        async def work(times: int) -> None:
            await asyncio.create_task(repeat(once, times), context=self.variables[path].copy())

        return work


@asynccontextmanager
async def ours() -> AsyncGenerator[Serving]:
    """The product on uvicorn, and bare sends on the same one."""
    app = Ours()
    async with _uvicorn(app) as port:
        yield port, app.works()


@asynccontextmanager
async def rooms() -> AsyncGenerator[Serving]:
    """python-socketio on uvicorn, a room for each user."""
    socketio: Any = import_module("socketio")  # which may be missing, as ``uvloop`` may
    server = socketio.AsyncServer(async_mode="asgi", ping_interval=3600, allow_upgrades=False)

    async def connect(sid: str, environ: Mapping[str, Any], auth: Mapping[str, str]) -> None:
        await server.enter_room(sid, auth["user"])

    def emits(user: str) -> Work:
        async def send(times: int) -> None:
            for _ in range(times):
                await server.emit(EVENT, DATA, room=user)

        return send

    server.on("connect", connect)
    async with _uvicorn(socketio.ASGIApp(server)) as port:
        yield port, {f"event {user}": emits(user) for user in USERS}


@asynccontextmanager
async def broadcasts() -> AsyncGenerator[Serving]:
    """``websockets.broadcast`` on the library's own server, to the connections that a dict has of a user."""
    connections: dict[str, set[ServerConnection]] = defaultdict(set)

    async def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        connections[connection.request.path.removeprefix("/")].add(connection)
        await connection.wait_closed()

    def casts(user: str) -> Work:
        async def send(times: int) -> None:
            for _ in range(times):
                broadcast(connections[user], json.dumps({"type": EVENT, "data": DATA}))
                await asyncio.sleep(0)  # as the others do it

        return send

    async with serve_websockets(handler, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        yield next(iter(server.sockets)).getsockname()[1], {f"event {user}": casts(user) for user in USERS}


SERVERS: Final[dict[str, Callable[[], AbstractAsyncContextManager[Serving]]]] = {
    OURS: ours,
    SOCKETIO: rooms,
    WEBSOCKETS: broadcasts,
}


@asynccontextmanager
async def _uvicorn(app: Any) -> AsyncGenerator[int]:
    with create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws_ping_interval=None))
        task = asyncio.create_task(server.serve([listening]))
        yield listening.getsockname()[1]
        server.should_exit = True
        await task


async def serve(name: str) -> None:
    """Do what standard input says until it ends."""
    loop = asyncio.get_running_loop()
    async with SERVERS[name]() as (port, works):
        print(port, flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            work, times = line.rsplit(" ", 1)
            if int(times):
                await works[work](int(times))
            print(process_time_ns(), flush=True)


def main() -> None:
    name, loop = sys.argv[1:]
    with asyncio.Runner(loop_factory=import_module(loop).new_event_loop) as runner:
        runner.run(serve(name))


if __name__ == "__main__":
    main()
