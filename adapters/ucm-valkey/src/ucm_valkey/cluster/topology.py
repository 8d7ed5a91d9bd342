"""Which server answers for a bucket."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ucm_valkey.cluster.clients import Client, Node
from ucm_valkey.cluster.faults import Fault, StoreError
from ucm_valkey.cluster.lines import Line

BETWEEN_LOOKS: Final = 0.5
"""Seconds between two looks at a cluster, at least."""


class Topology(Protocol):
    """The servers of a store, for one loop. A ``tag`` decides where a key stands: a bucket's number, or a key.
    ``on_change`` is called when some have come to stand elsewhere.
    """

    on_change: Callable[[], None]

    def line(self, tag: str) -> Line | None:
        """The line to whom a tag's keys stand with; None when that is not known."""
        ...

    async def find(self, tag: str) -> Line:
        """The same, after a look. Raises ClusterUnavailableError."""
        ...

    async def lines(self) -> Sequence[Line]:
        """Those to all servers that have keys."""
        ...

    def line_to(self, node: Node) -> Line:
        """The line to a node."""
        ...

    def together(self, tags: Sequence[str]) -> list[list[str]]:
        """The tags, in groups whose keys one script may use."""
        ...

    def moved(self, fault: Fault) -> None:
        """A server said that another has a slot."""
        ...

    def look_again(self) -> None:
        """A server was not there: what it had may have gone to another."""
        ...

    async def aclose(self) -> None:
        """Close all lines."""
        ...


class OneServer:
    """A server that has it all."""

    def __init__(self, client: Client) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._line = Line(client, client.target.host, client.target.port)

    def line(self, tag: str) -> Line | None:
        return self._line

    async def find(self, tag: str) -> Line:
        return self._line

    async def lines(self) -> Sequence[Line]:
        return [self._line]

    def line_to(self, node: Node) -> Line:
        return self._line

    def together(self, tags: Sequence[str]) -> list[list[str]]:
        return [list(tags)]

    def moved(self, fault: Fault) -> None: ...

    def look_again(self) -> None: ...

    async def aclose(self) -> None:
        await self._line.aclose()


class ManyServers:
    """A cluster, as the library's own client for clusters finds it."""

    def __init__(self, client: Client) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._client = client
        self._slots: dict[int, Node] = {}
        self._lines: dict[Node, Line] = {}
        self._slot_of: dict[str, int] = {}
        self._look: asyncio.Task[None] | None = None
        self._looked = 0.0
        self._trouble: StoreError | None = None

    def line(self, tag: str) -> Line | None:
        node = self._slots.get(self._slot(tag))
        return None if node is None else self.line_to(node)

    async def find(self, tag: str) -> Line:
        await self._refresh()
        line = self.line(tag)
        if line is None:
            raise Fault("CLUSTERDOWN").error()
        return line

    async def lines(self) -> Sequence[Line]:
        if not self._slots:
            await self._refresh()
        return [self.line_to(node) for node in dict.fromkeys(self._slots.values())]

    def line_to(self, node: Node) -> Line:
        if node not in self._lines:
            self._lines[node] = Line(self._client, *node)
        return self._lines[node]

    def together(self, tags: Sequence[str]) -> list[list[str]]:
        return [[tag] for tag in tags]

    def moved(self, fault: Fault) -> None:
        if fault.node is not None:
            host, port = fault.node
            # An empty host is that of whom was asked.
            self._slots[fault.slot] = (host or self._client.target.host, port)
            self.on_change()
        self.look_again()

    def look_again(self) -> None:
        if self._look is None:
            pause = self._looked + BETWEEN_LOOKS - time.monotonic()
            self._look = asyncio.get_running_loop().create_task(self._quietly(pause))

    async def aclose(self) -> None:
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait({self._look})
        for line in self._lines.values():
            await line.aclose()

    def _slot(self, tag: str) -> int:
        slot = self._slot_of.get(tag)
        if slot is None:
            slot = self._slot_of[tag] = self._client.slot(tag)
        return slot

    async def _refresh(self) -> None:
        """One look at a time; whoever comes meanwhile waits for it, and is told if it fails."""
        if self._look is None:
            self._look = asyncio.get_running_loop().create_task(self._quietly(0))
        await asyncio.wait({self._look})
        if not self._slots and self._trouble is not None:
            raise self._trouble

    async def _quietly(self, pause: float) -> None:
        try:
            if pause > 0:
                await asyncio.sleep(pause)
            await self._discover()
            self._trouble = None
        except StoreError as error:
            self._trouble = error  # what is known stands, until a line fails again
        finally:
            self._look = None
            self._looked = time.monotonic()

    async def _discover(self) -> None:
        target = self._client.target
        nodes = dict.fromkeys([*self._slots.values(), (target.host, target.port)])
        before, self._slots = self._slots, await self._client.discover(list(nodes))
        if before != self._slots:
            self.on_change()
        gone = [node for node in self._lines if node not in self._slots.values()]
        for node in gone:
            line = self._lines[node]
            if line.is_idle:
                del self._lines[node]
                await line.aclose()
