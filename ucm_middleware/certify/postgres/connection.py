"""One connection through the tap: its two sockets, and how they begin and end."""

import asyncio
import ssl
import struct
from collections.abc import Callable
from typing import Final

from ucm_middleware.certify.postgres.conversation import Conversation, Use
from ucm_middleware.certify.postgres.dsn import Target
from ucm_middleware.certify.postgres.framing import message
from ucm_middleware.errors import ConfigurationError

_HEAD: Final = struct.Struct("!II")
_SSL: Final = 80877103
_GSS: Final = 80877104
_CANCEL: Final = 80877102
_VERSION: Final = 3
_LONGEST_START: Final = 10_000
"""Bytes of a first message; the server takes no longer one."""


class Side(asyncio.Protocol):
    """One socket. It tells its owner what happens, and has no mind of its own."""

    def __init__(self, said: Callable[[bytes], None], ended: Callable[[], None], settle: Callable[[], None]) -> None:
        self.said = said
        self.is_full = False
        self.has_ended = False
        self.is_closed = False
        self._ended = ended
        self._settle = settle
        self.transport: asyncio.Transport | None = None

    @property
    def was_closed(self) -> bool:
        """Whether it is, or never was open."""
        return self.is_closed or self.transport is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.said(data)
        self._settle()

    def eof_received(self) -> bool:
        self._end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._end()

    def pause_writing(self) -> None:
        self.is_full = True
        self._settle()

    def resume_writing(self) -> None:
        self.is_full = False
        self._settle()

    def _end(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self._ended()
        self._settle()

    def write(self, data: bytes) -> None:
        """What is written behind the end goes nowhere, as on any socket."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def read(self, on: bool) -> None:
        """Go on reading, or stop."""
        transport = self.transport
        if transport is None or transport.is_closing() or transport.is_reading() is on:
            return
        if on:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def close(self) -> None:
        """When all that was written is sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """At once."""
        if self.transport is not None:
            self.transport.abort()


class Connection:
    """From a client that connects to the end of both sockets, when ``over`` is set."""

    def __init__(self, target: Target, used: Callable[[Use], None]) -> None:
        self.client = Side(self._begin, self._client_ended, self._settle)
        self.over = asyncio.Event()
        self._target = target
        self._used = used
        self._server: Side | None = None
        self._conversation: Conversation | None = None
        self._first = b""
        self._opening: asyncio.Task[None] | None = None
        self._cannot_be_followed = False

    @property
    def has_begun(self) -> bool:
        """Whether the server was reached."""
        return self._conversation is not None

    @property
    def is_lost(self) -> bool:
        """Whether it could not be followed."""
        return self._conversation is not None and self._conversation.is_lost

    def abort(self) -> None:
        """Hang up on both."""
        if self._opening is not None:
            self._opening.cancel()
        self.client.abort()
        if self._server is not None:
            self._server.abort()

    # The first message.

    def _begin(self, data: bytes) -> None:
        self._first += data
        while len(self._first) >= _HEAD.size and self._opening is None:
            size, code = _HEAD.unpack_from(self._first)
            if not _HEAD.size <= size <= _LONGEST_START:
                self.client.close()
                return
            if len(self._first) < size:
                return
            if code in (_SSL, _GSS):
                self._first = self._first[size:]
                self.client.write(b"N")
                continue
            first, rest = self._first[:size], self._first[size:]
            self._opening = asyncio.get_running_loop().create_task(self._open(first, rest, code))

    async def _open(self, first: bytes, rest: bytes, code: int) -> None:
        try:
            server = await self._reach()
        except (OSError, ConfigurationError) as error:
            self.client.write(_refusal(f"the tap of ucm certify cannot reach the database: {error}"))
            self.client.close()
            return
        finally:
            self._opening = None
            self._settle()
        if self.client.has_ended and code != _CANCEL:
            server.abort()
            return
        server.write(first)
        if code == _CANCEL:
            server.said = self.client.write
            return
        login, is_followed = _start(first, code)
        clock = asyncio.get_running_loop().time
        conversation = Conversation(login, self.client.write, server.write, self._used, clock)
        conversation.is_lost = not is_followed
        self._conversation = conversation
        self.client.said = conversation.client_says
        server.said = conversation.server_says
        if rest:
            conversation.client_says(rest)
        self._settle()

    async def _reach(self) -> Side:
        """Connect to the server, with TLS where that is asked for. Raises OSError, ConfigurationError."""
        loop, target = asyncio.get_running_loop(), self._target
        answer: asyncio.Future[bytes] = loop.create_future()

        def hear(data: bytes) -> None:
            if not answer.done():
                answer.set_result(data)

        def ended() -> None:
            hear(b"")
            self._server_ended()

        server = self._server = Side(hear, ended, self._settle)
        if target.socket is not None:
            await loop.create_unix_connection(lambda: server, target.socket)
        else:
            await loop.create_connection(lambda: server, target.host, target.port)
        if not target.wants_tls:
            return server
        server.write(_HEAD.pack(_HEAD.size, _SSL))
        said = await answer
        if said == b"S":
            assert server.transport is not None
            server.transport = await _secured(loop, server, target)
        elif said != b"N" or target.needs_tls:
            raise ConfigurationError(f"sslmode is {target.mode}, and the server has no TLS")
        return server

    # The end.

    def _client_ended(self) -> None:
        """What it has said still goes to the server; see ``_settle``."""

    def _server_ended(self) -> None:
        if self._conversation is not None:
            self._conversation.server_ends()
        if self._opening is None:
            self.client.close()

    def _settle(self) -> None:
        """Read what there is room for, and hang up on the one when the other has."""
        server, is_asking = self._server, self._conversation is not None and self._conversation.is_asking
        self.client.read(self._opening is None and not is_asking and not (server is not None and server.is_full))
        if server is not None:
            server.read(is_asking or not self.client.is_full)
        if self.client.has_ended and not is_asking and self._opening is None:
            self.client.close()
            if server is not None:
                server.close()
        if self.client.is_closed and self._opening is None and (server is None or server.was_closed):
            self.over.set()


async def _secured(loop: asyncio.AbstractEventLoop, server: Side, target: Target) -> asyncio.Transport:
    assert server.transport is not None
    name = target.host
    try:
        made = await loop.start_tls(server.transport, server, target.tls(), server_hostname=name)
    except ssl.SSLError as error:
        raise ConfigurationError(f"TLS fails: {error.reason or error}") from None
    assert made is not None
    return made


def _start(first: bytes, code: int) -> tuple[str, bool]:
    """The user that is asked for, and whether the connection can be followed: not a replica's, nor another protocol."""
    words = first[_HEAD.size :].split(b"\0")
    options = dict(zip(words[::2], words[1::2], strict=False))
    is_replica = options.get(b"replication", b"false").lower() not in (b"false", b"off", b"no", b"0")
    return options.get(b"user", b"").decode(errors="replace"), code >> 16 == _VERSION and not is_replica


def _refusal(why: str) -> bytes:
    fields = {"S": "FATAL", "V": "FATAL", "C": "08001", "M": why}
    return message(b"E", b"".join(f"{name}{value}".encode() + b"\0" for name, value in fields.items()) + b"\0")
