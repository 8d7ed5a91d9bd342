"""A connection to one node that only listens: to sharded channels, which stay on the node that their keys stand on."""

import asyncio
from collections import deque
from typing import Final, Literal, Protocol, cast

from ucm_valkey.cluster.clients import Client, Node, Wire
from ucm_valkey.cluster.faults import Failure, Fault
from ucm_valkey.cluster.lines import pack

HEARTBEAT: Final = 5.0
"""Seconds of silence after which a server is asked whether it is there."""

Change = Literal["ssubscribe", "sunsubscribe"]


class Owner(Protocol):
    """What an ear reports to. A channel is named by its bytes."""

    def confirmed(self, ear: "Ear", channel: bytes) -> None:
        """The server tells what is said on the channel from now on."""
        ...

    def refused(self, ear: "Ear", channel: bytes, fault: Fault) -> None:
        """It does not."""
        ...

    def left(self, ear: "Ear", channel: bytes) -> None:
        """It no longer does, without having been asked to stop: its slot went to another node."""
        ...

    def heard(self, channel: bytes, message: bytes) -> None:
        """Something was said."""
        ...

    def lost(self, ear: "Ear", failure: Failure) -> None:
        """The connection is gone, and all that was subscribed to on it."""
        ...


class Ear:
    """One that listens; ``open_ear`` makes it."""

    def __init__(self, client: Client, node: Node, wire: Wire, owner: Owner, heartbeat: float) -> None:
        self.node = node
        self._client = client
        self._wire = wire
        self._owner = owner
        self._asked: deque[tuple[Change, bytes]] = deque()
        self._heard = 0
        loop = asyncio.get_running_loop()
        self._reading = loop.create_task(self._read())
        self._beating = loop.create_task(self._beat(heartbeat))

    async def change(self, change: Change, channels: list[bytes]) -> None:
        """Ask the server for channels, or to be spared them. Each on its own: in a cluster their slots differ."""
        self._asked.extend((change, channel) for channel in channels)
        await self._send(b"".join(pack((change, channel), "") for channel in channels))

    async def aclose(self) -> None:
        """End it, without a report."""
        self._beating.cancel()
        self._reading.cancel()
        await asyncio.wait({self._beating, self._reading})

    async def _send(self, data: bytes) -> None:
        try:
            await self._wire.connection.send_packed_command(data, check_health=False)
        except self._client.troubles:
            self._reading.cancel()

    async def _beat(self, heartbeat: float) -> None:
        while True:
            heard = self._heard
            await asyncio.sleep(heartbeat)
            if heard != self._heard:
                continue
            await self._send(pack(("PING",), ""))
            await asyncio.sleep(self._client.timeout)
            if heard == self._heard:
                self._reading.cancel()

    async def _read(self) -> None:
        connection = self._wire.connection
        host, port = self.node
        failure = Failure("timeout", f"{host}:{port} went silent")
        try:
            while True:
                try:
                    answer = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
                except self._client.response as error:
                    answer = self._client.fault(error)
                self._heard += 1
                self._take(answer)
        except self._client.troubles as error:
            failure = self._client.failure(error, host, port)
        finally:
            self._beating.cancel()
            self._owner.lost(self, failure)
            await connection.disconnect(nowait=True)

    def _take(self, answer: object) -> None:
        if isinstance(answer, Fault):
            if self._asked:
                change, channel = self._asked.popleft()
                if change == "ssubscribe":
                    self._owner.refused(self, channel, answer)
            return
        kind, channel, message = [*cast(list[bytes], answer), b"", b""][:3] if isinstance(answer, list) else (b"",) * 3
        if kind == b"smessage":
            self._owner.heard(channel, message)
        elif kind == b"ssubscribe" and self._was_asked("ssubscribe", channel):
            self._owner.confirmed(self, channel)
        elif kind == b"sunsubscribe" and not self._was_asked("sunsubscribe", channel):
            self._owner.left(self, channel)
        # Else it is the answer to a PING.

    def _was_asked(self, change: Change, channel: bytes) -> bool:
        if not self._asked or self._asked[0] != (change, channel):
            return False
        self._asked.popleft()
        return True


async def open_ear(client: Client, node: Node, owner: Owner, heartbeat: float) -> Ear:
    """Connect to a node. Raises ClusterUnavailableError."""
    try:
        wire = await client.connect(*node)
    except (*client.troubles, TimeoutError) as error:
        raise client.failure(error, *node).error(is_unknown=False) from None
    return Ear(client, node, wire, owner, heartbeat)
