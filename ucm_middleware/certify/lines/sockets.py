"""The users' WebSockets. What comes over them is heard whenever it comes."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.http11 import Response

from ucm_middleware.certify.lines.answer import Answer
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
    """Not thread-safe. ``heard`` is given each message, with the step that opened its WebSocket, and ``closed`` the
    reason that the server gives where it closes one.
    """

    __slots__ = ("_closed", "_heard", "_open")

    def __init__(self, heard: Callable[[Connect, bytes], None], closed: Callable[[Connect, str], None]) -> None:
        self._heard = heard
        self._closed = closed
        self._open: dict[str, _Socket] = {}

    async def connect(self, step: Connect, url: str, headers: Sequence[tuple[str, str]]) -> Answer:
        """Open one. Returns what the handshake is answered with: of status 101 where it is accepted."""
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
        except InvalidStatus as error:
            return _answer(error.response)
        except (OSError, TimeoutError, WebSocketException):
            return Answer("refused")
        self._open[step.socket] = _Socket(connection, asyncio.create_task(self._read(step, connection)))
        assert connection.response is not None
        return _answer(connection.response)

    async def _read(self, step: Connect, connection: ClientConnection) -> None:
        with suppress(WebSocketException):
            async for message in connection:
                self._heard(step, message.encode() if isinstance(message, str) else message)
        if connection.close_reason:
            self._closed(step, connection.close_reason)

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


def _answer(response: Response) -> Answer:
    # The library reads header lines as ASCII, and whatever else is in them as surrogates.
    headers = [(name.encode(), value.encode(errors="surrogateescape")) for name, value in response.headers.raw_items()]
    return Answer("complete", response.status_code, tuple(headers), bytes(response.body or b""))
