"""One connection to a server, which many ask on at once.

While a round trip is under way, what else is asked is collected, and goes as one pipeline with the next. Whoever finds
the line idle sends by itself. One task reads, and nobody else: an answer goes to who asked for it, in the order that
was sent, also when some of them have gone. So a cancellation cannot put answers out of step.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from ucm_valkey.cluster.clients import Client, Wire
from ucm_valkey.cluster.faults import Failure, StoreError

MOST_AT_ONCE: Final = 256
"""Commands in one pipeline."""

SENT_DIRECTLY: Final = 32 * 1024
"""Bytes that an idle connection takes without making its sender wait."""


UNREAD: Final = 0.01
"""Seconds more for an answer that stands there unread, because this loop was busy with something else."""


class _Run:
    """Stands in a command for the run of the server that it will be sent to."""


RUN: Final = _Run()

Word = bytes | str | int | _Run
Command = Sequence[Word]


class Line:
    """A line to a node, on the running loop. It connects when it is first asked, and again after it was lost."""

    def __init__(self, client: Client, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.timeout = client.timeout
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[tuple[Command, asyncio.Future[object], float]] = deque()
        self._in_flight: deque[tuple[asyncio.Future[object], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._waiting and not self._in_flight

    async def ask(self, command: Command) -> object:
        """The answer, or a Fault. Raises ClusterUnavailableError where none comes."""
        future = self._put(command)
        await self._push()
        return _checked(await future)

    async def ask_all(self, commands: Sequence[Command]) -> list[object]:
        """The same for several that are sent together. Raises it when any has no answer."""
        futures = [self._put(command) for command in commands]
        await self._push()
        return [_checked(each) for each in await asyncio.gather(*futures)]

    async def wire(self) -> Wire:
        """The connection as it is now, opened where there is none."""
        while self._wire is None:
            future = self._put(())
            await self._push()
            _checked(await future)
        return self._wire

    async def aclose(self) -> None:
        """End it; whoever still waits is told."""
        task = self._task
        self._lose(Failure("down", "the session was closed"), everybody=True)
        while self._tasks or (task is not None and not task.done()):
            await asyncio.wait({*self._tasks, *([task] if task is not None and not task.done() else [])})

    def _put(self, command: Command) -> asyncio.Future[object]:
        future = self._loop.create_future()
        deadline = self._loop.time() + self.timeout
        self._waiting.append((command, future, deadline))
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._look)
        return future

    async def _push(self) -> None:
        if self._in_flight:
            return  # it goes with the next
        wire = self._wire
        if wire is None:
            if self._task is None:
                self._task = self._loop.create_task(self._serve())
            return
        data = self._take(wire)
        if len(data) <= SENT_DIRECTLY:
            await self._send(wire, data)
        else:
            # This would have to wait until the socket takes it, and whoever waits may be cancelled.
            self._background(self._send(wire, data))

    def _background(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take(self, wire: Wire) -> bytes:
        """What goes next, packed; those that wait for it are in flight from now on."""
        packed: list[bytes] = []
        while self._waiting and len(self._in_flight) < MOST_AT_ONCE:
            command, future, deadline = self._waiting.popleft()
            if future.done():
                continue
            if not command:
                future.set_result(wire)
                continue
            packed.append(pack(command, wire.run))
            self._in_flight.append((future, deadline))
        return b"".join(packed)

    async def _send(self, wire: Wire, data: bytes) -> None:
        if not data:
            return
        try:
            await wire.connection.send_packed_command(data, check_health=False)
        except self._client.troubles as error:
            if self._wire is wire:
                self._lose(self._client.failure(error, self.host, self.port))

    async def _serve(self) -> None:
        """Connect, and hand out what comes until the connection is lost."""
        wire: Wire | None = None
        failure = Failure("down", f"the connection to {self.host}:{self.port} was lost")
        mine = asyncio.current_task()
        try:
            wire = await self._client.connect(self.host, self.port)
            self._wire = wire
            await self._send(wire, self._take(wire))
            while True:
                try:
                    answer = await wire.connection.read_response(disable_decoding=True, disconnect_on_error=False)
                except self._client.response as error:
                    answer = self._client.fault(error)
                if not self._in_flight:
                    break  # nothing was asked: whatever it is, it is not for anybody
                future, _ = self._in_flight.popleft()
                if not future.done():
                    future.set_result(answer)
                if not self._in_flight and self._waiting:
                    await self._send(wire, self._take(wire))
        except (*self._client.troubles, TimeoutError) as error:
            failure = self._client.failure(error, self.host, self.port)
        finally:
            if self._task is mine:
                self._lose(failure, everybody=wire is None)
            if wire is not None:
                await wire.connection.disconnect(nowait=True)

    def _lose(self, failure: Failure, *, everybody: bool = False) -> None:
        """Give the connection up. Who is in flight is told; who waits goes on the next, unless there can be none."""
        task, self._task, self._wire = self._task, None, None
        for future, _ in self._in_flight:
            if not future.done():
                future.set_result(failure.error(is_unknown=True))
        self._in_flight.clear()
        if everybody:
            for _, future, _ in self._waiting:
                if not future.done():
                    future.set_result(failure.error(is_unknown=False))
            self._waiting.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        if task is not None and not task.done() and task is not asyncio.current_task(self._loop):
            task.cancel()
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._waiting:
            self._task = self._loop.create_task(self._serve())

    def _look(self) -> None:
        """Somebody's time is over, perhaps only because this loop did not come to read."""
        self._timer = self._loop.call_later(UNREAD, self._give_up)

    def _give_up(self) -> None:
        """Tell those whose time is over. An answer that is late makes its connection useless."""
        now = self._loop.time()
        failure = self._client.late(self.host, self.port, is_connected=self._wire is not None)
        self._timer = None
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][2] <= now):
            future = self._waiting.popleft()[1]
            if not future.done():
                future.set_result(failure.error(is_unknown=False))
        # Also when whoever asked has gone: then others wait behind it.
        if self._in_flight and self._in_flight[0][1] <= now:
            self._lose(failure)
        nearest = [*(each[1] for each in list(self._in_flight)[:1]), *(each[2] for each in list(self._waiting)[:1])]
        if nearest:
            self._timer = self._loop.call_at(min(nearest), self._look)


def pack(command: Command, run: str) -> bytes:
    """A command as it is sent."""
    packed = [b"*%d\r\n" % len(command)]
    for word in command:
        # The most frequent kind first: a large part of what a worker does for an open is to pack what it asks.
        if isinstance(word, str):
            data = word.encode()
        elif isinstance(word, int):
            data = b"%d" % word
        elif isinstance(word, _Run):
            data = run.encode()
        else:
            data = word
        packed.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(packed)


def _checked(answer: object) -> object:
    if isinstance(answer, StoreError):
        raise answer
    return answer
