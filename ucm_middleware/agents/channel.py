"""A bounded queue between the one task that drives a stream and whoever reads it, on one event loop."""

import asyncio
from collections import deque
from typing import Any

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.waiting import wake


class Channel:
    """The driver puts, and waits while ``most`` items wait for the reader; the reader takes until it is closed."""

    __slots__ = ("_is_closed", "_items", "_most", "_reader", "_writer")

    def __init__(self, most: int) -> None:
        self._items: deque[Any] = deque()
        self._most = most
        self._is_closed = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def put(self, item: Any) -> None:
        """Wait for room, and put an item in line."""
        while len(self._items) >= self._most:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self._items.append(item)
        self._wake_reader()

    async def take(self) -> tuple[bool, Any]:
        """True with the next item; False when there is none and will be none. One reader at a time."""
        while not self._items:
            if self._is_closed:
                return False, None
            if self._reader is not None and not self._reader.done():
                raise ConfigurationError("a stream has one reader at a time; let the other one end")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._items.popleft()
        if self._writer is not None:
            wake(self._writer)
        return True, item

    def close(self) -> None:
        """There will be no more items."""
        self._is_closed = True
        self._wake_reader()

    def drop(self) -> None:
        """Forget what waits for the reader, who has left."""
        self._items.clear()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            wake(self._reader)
