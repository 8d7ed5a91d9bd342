"""A TCP proxy on the loopback interface, in a thread of its own, between a client and its server.

It tells round trips, and does to the bytes of either direction what a network can: delays them, holds them up, cuts the
connection. Bytes that follow one another in a direction, until some go the other way, are a *turn*.

    with start_tcp_proxy(login.host, login.port) as proxy:
        proxy.hold("replies", after=2)  # the third answer from now on does not arrive
        task = asyncio.create_task(use(login.at(proxy.port)))
        await proxy.until_held("replies")
        task.cancel()
        ...
        proxy.release("replies")
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

from .processes import HOST
from .waiting import PATIENCE

Direction = Literal["requests", "replies"]


class _Lane:
    """The state of one direction, for all connections. Used in the proxy's loop only."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.turns = 0
        self.held_from: int | None = None  # the turn after which nothing passes
        self.passing = asyncio.Event()
        self.passing.set()
        self.held = asyncio.Event()

    async def pass_on(self, *, is_new_turn: bool) -> None:
        if is_new_turn:
            self.turns += 1
            if self.delay:
                await asyncio.sleep(self.delay)
        while self.held_from is not None and self.turns > self.held_from:
            self.held.set()
            self.passing.clear()
            await self.passing.wait()

    def release(self) -> None:
        self.held_from = None
        self.held.clear()
        self.passing.set()


class _Line:
    """What a client and its server said last."""

    def __init__(self) -> None:
        self.last: Direction = "replies"


class TcpProxy:
    """One that runs; `start_tcp_proxy` makes it. Its methods may be called from any thread."""

    def __init__(self, host: str, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.port = 0
        self.accepted = 0
        """How many connections it has taken so far."""
        self.round_trips = 0
        """How often a server has answered what its client had sent before: those of connecting are among them."""
        self.target = host, port
        self._loop = loop
        self._lanes: dict[Direction, _Lane] = {"requests": _Lane(), "replies": _Lane()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refuses = False

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._tasks)

    def delay(self, direction: Direction, seconds: float) -> None:
        """From now on each turn in this direction takes so much longer."""

        def change() -> None:
            self._lanes[direction].delay = seconds

        self._call(change)

    def hold(self, direction: Direction, *, after: int = 0) -> None:
        """Let nothing pass in this direction after so many more turns, of all connections together."""

        def change() -> None:
            lane = self._lanes[direction]
            lane.held_from = lane.turns + after

        self._call(change)

    def release(self, direction: Direction) -> None:
        """Let pass what was held up, and what comes."""
        self._call(self._lanes[direction].release)

    async def until_held(self, direction: Direction) -> None:
        """Wait until something is held up, in the caller's loop. Raises TimeoutError when nothing comes."""
        waiting = asyncio.run_coroutine_threadsafe(self._lanes[direction].held.wait(), self._loop)
        async with asyncio.timeout(PATIENCE):
            await asyncio.wrap_future(waiting)

    def wait_until_held(self, direction: Direction) -> None:
        """The same for a thread without a loop."""
        asyncio.run_coroutine_threadsafe(self._lanes[direction].held.wait(), self._loop).result(PATIENCE)

    def cut(self) -> None:
        """Reset all connections."""

        def change() -> None:
            for task in self._tasks:
                task.cancel()

        self._call(change)

    def refuse(self, refuses: bool = True) -> None:
        """Reset also those that come, as if the server were down; with False, take them again."""

        def change() -> None:
            self._refuses = refuses

        self._call(change)

    def lead_to(self, port: int, host: str = HOST) -> None:
        """Take connections that come from now on to another server."""
        self.target = host, port

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        """Run until `ended`."""
        # No server of asyncio's: when one closes, what it is just accepting is neither served nor closed.
        with socket.create_server((HOST, 0)) as listening:
            listening.setblocking(False)
            self.port = listening.getsockname()[1]
            self._loop.add_reader(listening, self._accept, listening)
            ready.set()
            await ended.wait()
            self._loop.remove_reader(listening)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what was reset is closed in the loop's next round

    def _accept(self, listening: socket.socket) -> None:
        client, _ = listening.accept()
        self.accepted += 1
        task = self._loop.create_task(self._connect(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: client.close())  # nobody else does where it is cancelled before it begins

    async def _connect(self, client: socket.socket) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            reader, writer = await asyncio.open_connection(sock=client)
            writers.append(writer)
            if not self._refuses:
                upstream_reader, upstream = await asyncio.open_connection(*self.target)
                writers.append(upstream)
                line = _Line()
                await asyncio.gather(
                    self._pump(line, "requests", reader, upstream), self._pump(line, "replies", upstream_reader, writer)
                )
                for each in writers:
                    each.close()
                    await each.wait_closed()
        except (asyncio.CancelledError, OSError):
            return  # cut off, or the server is down
        finally:
            for each in writers:
                _reset(each)

    async def _pump(
        self, line: _Line, direction: Direction, source: asyncio.StreamReader, to: asyncio.StreamWriter
    ) -> None:
        lane = self._lanes[direction]
        while chunk := await _read(source):
            is_new_turn = line.last != direction
            line.last = direction
            if is_new_turn and direction == "replies":
                self.round_trips += 1
            await lane.pass_on(is_new_turn=is_new_turn)
            # What comes after the receiver has gone is lost, as on a network.
            with contextlib.suppress(OSError):
                to.write(chunk)
                await to.drain()
        # The end of a direction is not overtaken by what is held up.
        await lane.pass_on(is_new_turn=False)
        with contextlib.suppress(OSError):
            to.write_eof()

    def _call(self, change: Callable[[], None]) -> None:
        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE)


async def _read(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.read(65536)
    except OSError:
        return b""


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        # Closed with nothing to wait for, it is a reset and no orderly end.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextmanager
def start_tcp_proxy(host: str, port: int) -> Generator[TcpProxy]:
    """A proxy to a server, on a port of its own, inside the block."""
    loop = asyncio.new_event_loop()
    proxy = TcpProxy(host, port, loop)
    ready, ended = threading.Event(), asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(proxy.serve(ready, ended)), name="tcp proxy", daemon=True
    )
    thread.start()
    try:
        if not ready.wait(PATIENCE):
            raise TimeoutError("the proxy did not begin to listen")
        yield proxy
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(PATIENCE)
        loop.close()
