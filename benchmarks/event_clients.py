"""The clients of the servers that events are sent from: they read all, and count it."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from subprocess import PIPE
from typing import Final

from websockets.asyncio.client import ClientConnection, connect

from benchmarks.event_servers import SOCKETIO, USERS

PATIENCE: Final = 60.0
"""Seconds that what was sent may take to arrive."""


class Served:
    """A server, and the connections to it, by the path under which they were opened."""

    def __init__(self, process: asyncio.subprocess.Process, connections: dict[str, list[ClientConnection]]) -> None:
        self._process = process
        self._connections = connections

    async def cpu(self, work: str, path: str, times: int, *, late: bool) -> float:
        """Microseconds of the server's CPU for each time a work was done, until all has arrived at the path.

        The clients read what comes, or, when they are late, begin to when all is sent.
        """
        connections = self._connections.get(path, [])
        before = await self._do(work, 0)
        if late:
            for connection in connections:
                connection.transport.pause_reading()
        await self._do(work, times)
        if late:
            for connection in connections:
                connection.transport.resume_reading()
        async with asyncio.timeout(PATIENCE):
            for connection in connections:
                for _ in range(times):
                    await connection.recv()
        return (await self._do(work, 0) - before) / times / 1e3

    async def _do(self, work: str, times: int) -> int:
        return int(await ask(self._process, f"{work} {times}\n"))


async def ask(process: asyncio.subprocess.Process, line: str = "") -> str:
    """The next line of a process, after this one was given to it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode())
    answer = await process.stdout.readline()
    if not answer:
        raise RuntimeError("a server ended")
    return answer.decode()


@asynccontextmanager
async def served(name: str, loop: str, *folders: str) -> AsyncGenerator[Served]:
    """A server with each user's connections, in each of these folders of paths."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.event_servers", name, loop, stdin=PIPE, stdout=PIPE
    )
    try:
        port = int(await ask(process))
        opened: dict[str, list[ClientConnection]] = {}
        async with AsyncExitStack() as stack:
            for path in (f"{folder}{user}" for folder in folders for user in USERS):
                user = path.rpartition("/")[2]
                opened[path] = [
                    await stack.enter_async_context(_connected(name, port, path, user)) for _ in range(USERS[user])
                ]
            yield Served(process, opened)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def _connected(name: str, port: int, path: str, user: str) -> AsyncGenerator[ClientConnection]:
    """A connection that is ready for events. Of Socket.IO it speaks as much as that takes."""
    if name == SOCKETIO:
        path = "socket.io/?EIO=4&transport=websocket"
    url = f"ws://127.0.0.1:{port}/{path}"
    async with connect(url, compression=None, max_queue=None, ping_interval=None) as connection:
        if name == SOCKETIO:
            await connection.recv()  # the parameters of the connection
            await connection.send("40" + json.dumps({"user": user}))
            if not str(await connection.recv()).startswith("40"):
                raise RuntimeError("Socket.IO did not let a client in")
        yield connection
