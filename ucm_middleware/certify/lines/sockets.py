"""The users' WebSockets. What comes over them is heard whenever it comes."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from ucm_middleware.certify.steps import Connect

_PATIENCE: Final = 3.0
"""Seconds for a handshake, and for a message to be taken."""

_LISTENING: Final = 0.02
"""Seconds that is listened before one hangs up, for what the messages of others bring."""

_LARGEST: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class _Socket:
    connection: ClientConnection
    reading: asyncio.Task[None]


class Sockets:
    """Not thread-safe. ``heard`` is given each message, with the step that opened its WebSocket."""

    __slots__ = ("_heard", "_open")

    def __init__(self, heard: Callable[[Connect, bytes], None]) -> None:
        self._heard = heard
        self._open: dict[str, _Socket] = {}

    async def connect(self, step: Connect, url: str, headers: Sequence[tuple[str, str]]) -> bool:
        """Open one. Returns whether it was accepted."""
        await self.hang_up(step.socket, abruptly=False)
        try:
            connection = await connect(
                url,
                additional_headers=headers,
                open_timeout=_PATIENCE,
                close_timeout=1,
                max_size=_LARGEST,
                proxy=None,
                compression=None,
            )
        except (OSError, TimeoutError, WebSocketException):
            return False
        self._open[step.socket] = _Socket(connection, asyncio.create_task(self._read(step, connection)))
        return True

    async def _read(self, step: Connect, connection: ClientConnection) -> None:
        with suppress(WebSocketException):
            async for message in connection:
                self._heard(step, message.encode() if isinstance(message, str) else message)

    async def say(self, name: str, text: str) -> None:
        """Send a text, where the WebSocket is still open."""
        if (socket := self._open.get(name)) is None:
            return
        with suppress(WebSocketException, TimeoutError):
            await asyncio.wait_for(socket.connection.send(text), _PATIENCE)

    async def hang_up(self, name: str, *, abruptly: bool) -> None:
        """Close one, or drop its connection."""
        if (socket := self._open.pop(name, None)) is None:
            return
        await asyncio.sleep(_LISTENING)
        await self._end(socket, abruptly=abruptly)

    async def _end(self, socket: _Socket, *, abruptly: bool) -> None:
        try:
            if abruptly:
                socket.connection.transport.abort()
            else:
                await socket.connection.close()
            await socket.reading
        finally:
            socket.connection.transport.abort()
            socket.reading.cancel()

    async def aclose(self) -> None:
        """Close all at once."""
        open_ones, self._open = [*self._open.values()], {}
        if open_ones:
            await asyncio.sleep(_LISTENING)
            await asyncio.gather(*(self._end(socket, abruptly=False) for socket in open_ones))
