"""Many users' clients at once, each of which checks what it gets: its user's events, in order, all of them."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from .observer import token_of
from .raw_websocket import SMALL
from .servers import HOST, Server
from .waiting import PATIENCE

DRIVER = "driver"
BACK_OFF = 0.05
"""Seconds until a client tries again that was refused, as clients do."""

MILESTONES = 40
"""A client that stalls does so until the whole crowd has got so much further."""


def open_connection(server: Server, user: str, query: str = "", sock: socket.socket | None = None) -> connect:
    return connect(
        f"{server.ws_url}/{query}",
        additional_headers=token_of(user),
        compression=None,
        open_timeout=None,
        close_timeout=1,  # who does not read sees no answer to a close
        ping_interval=None,
        max_size=None,
        max_queue=16,
        sock=sock,
    )


async def small_socket(server: Server) -> socket.socket:
    """A connection whose kernel takes in little while nobody reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (HOST, server.port))
    return sock


class Crowd:
    """What the clients share. ``expected`` is how many events they will get, about."""

    def __init__(self, server: Server, expected: int) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        self.said: dict[tuple[str, int], tuple[int, int]] = {}  # by user and sequence: which sender's which event
        self.last: Mapping[str, int] | None = None
        self._milestones = [asyncio.Event() for _ in range(MILESTONES + 1)]
        self._step = max(1, expected // MILESTONES)

    def count_event(self) -> None:
        self.counts["events"] += 1
        if self.counts["events"] % self._step == 0 and self.last is None:
            self._milestones[min(self.counts["events"] // self._step, MILESTONES)].set()

    async def progress(self) -> None:
        """Wait until the crowd has got a good deal further, or all is sent."""
        if self.last is None:
            await self._milestones[min(self.counts["events"] // self._step + 2, MILESTONES)].wait()

    def all_sent(self, last: Mapping[str, int]) -> None:
        self.last = last
        for milestone in self._milestones:
            milestone.set()


class Visitor:
    """One client of a user. It drops its connection, closes it, or stops reading for a while, and comes back."""

    def __init__(self, crowd: Crowd, user: str, number: int, *, is_hot: bool) -> None:
        self.crowd = crowd
        self.user = user
        self.is_hot = is_hot
        self.epoch: str | None = None
        self.last = 0
        self.connected = asyncio.Event()
        self.has_all = asyncio.Event()
        self._random = random.Random(f"{user} {number}")

    async def visit(self) -> None:
        while True:
            sock = await small_socket(self.crowd.server) if self.is_hot else None
            try:
                async with open_connection(self.crowd.server, self.user, self._query(), sock) as websocket:
                    self.connected.set()
                    try:
                        await self._listen(websocket)
                    except asyncio.CancelledError:  # the crowd goes home, and nobody waits to say goodbye
                        websocket.transport.abort()
                        raise
            except ConnectionClosed as closed:
                self.crowd.counts[f"closed with {None if closed.rcvd is None else closed.rcvd.code}"] += 1
            except (InvalidHandshake, OSError) as refused:  # its old connection may not have ended yet
                self.crowd.counts[f"refused: {type(refused).__name__}"] += 1
                await asyncio.sleep(BACK_OFF)
            self.crowd.counts["connections"] += 1

    def look(self) -> None:
        """See whether that was all."""
        if self.crowd.last is not None and self.last >= self.crowd.last.get(self.user, 0):
            self.has_all.set()

    def _query(self) -> str:
        return f"?last_sequence={self.last}" + ("" if self.epoch is None else f"&epoch={self.epoch}")

    async def _listen(self, websocket: ClientConnection) -> None:
        left = self._random.randint(20, 100)
        async for text in websocket:
            self._take(json.loads(text))
            left -= 1
            if left > 0 or self.crowd.last is not None:
                continue
            match self._random.choice(["drop", "close", "stall"]):
                case "drop":
                    websocket.transport.abort()
                    return
                case "close":
                    return
                case _:
                    self.crowd.counts["stalls"] += 1
                    await self.crowd.progress()
                    left = self._random.randint(20, 100)

    def _take(self, envelope: dict[str, Any]) -> None:
        assert envelope["user_id"] == self.user, envelope
        assert self.epoch in (None, envelope["epoch"])
        self.epoch = envelope["epoch"]
        sequence = envelope["sequence"]
        if envelope["type"] == "events_missed":
            # More than is kept of anybody came while it stalled; only those users get so much.
            assert self.is_hot, (self.user, self.last, sequence)
            self.crowd.counts["missed"] += sequence - self.last
        else:
            assert sequence == self.last + 1, (self.user, self.last, sequence)
            assert envelope["data"]["to"] == self.user, envelope
            said = (envelope["data"]["by"], envelope["data"]["n"])
            assert self.crowd.said.setdefault((self.user, sequence), said) == said
            self.crowd.count_event()
        self.last = sequence
        self.look()


async def ask_driver(server: Server, order: dict[str, Any]) -> Any:
    async with open_connection(server, DRIVER) as driver:
        await driver.send(json.dumps(order))
        return json.loads(await driver.recv())


async def run_crowd(server: Server, users: list[str], each: int, order: dict[str, Any]) -> Crowd:
    """Let the driver send while the clients come and go, and wait until each has all. Raises what any of them found."""
    crowd = Crowd(server, order["events"] * each)
    visitors = [
        Visitor(crowd, user, number, is_hot=place < order["hot"])
        for place, user in enumerate(users)
        for number in range(each)
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(visitor.visit()) for visitor in visitors]
        for visitor in visitors:
            await visitor.connected.wait()
        answer = await ask_driver(server, {"drive": order})
        crowd.counts["milliseconds"] = int(answer["seconds"] * 1000)
        crowd.all_sent(answer["last"])
        for visitor in visitors:
            visitor.look()
        async with asyncio.timeout(PATIENCE * 4):
            for visitor in visitors:
                await visitor.has_all.wait()
        for task in tasks:
            task.cancel()
    return crowd
