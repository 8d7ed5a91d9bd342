"""A connection that speaks HTTP/1.1: requests may be pipelined, and answers come in their order."""

import asyncio
from collections import deque
from typing import Final, Self

import httptools

from ucm_middleware.certify.lines.answer import LARGEST, Answer, Ending
from ucm_middleware.certify.lines.request import Request

PATIENCE: Final = 5.0
"""Seconds for an answer to come whole."""


class Line(asyncio.Protocol):
    """Not thread-safe. ``is_over`` says that the next request needs another one."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._cut: set[asyncio.Future[Answer]] = set()
        self._begin()

    @classmethod
    async def open(cls, port: int) -> Self:
        """Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(lambda: cls(f"127.0.0.1:{port}"), "127.0.0.1", port)
        return line

    @property
    def is_over(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def send(self, request: Request) -> asyncio.Future[Answer]:
        """Send it behind what was sent before; the future has its answer, whatever becomes of it."""
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            waiter.set_result(Answer("refused"))
            return waiter
        data = request.as_http1(self._host)
        self._waiting.append(waiter)
        match request.manner:
            case "half sent":
                self._transport.write(data[: -max(1, len(request.body or b"") // 2)])
                self._drop_soon()
            case "not waited for":
                self._transport.write(data)
                self._drop_soon()
            case "cut off":
                self._cut.add(waiter)
                self._transport.write(data)
            case "slow":
                self._transport.write(data)
                self._transport.pause_reading()
            case "whole":
                self._transport.write(data)
        return waiter

    def _drop_soon(self) -> None:
        """Once the server has what was written, as far as it takes it."""
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, self.drop)

    def read_on(self) -> None:
        """Read what a slow request left standing."""
        if not self.is_over and self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    async def answer(self, waiter: asyncio.Future[Answer], patience: float = PATIENCE) -> Answer:
        """Wait for an answer. One that is late ends the connection: what comes after it could not be told apart."""
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), patience)
        except TimeoutError:
            self._end("late")
            return await waiter

    def drop(self) -> None:
        """Reset the connection."""
        self._end("dropped by us")

    def close(self) -> None:
        """End it as clients do that are done."""
        if self._transport is not None:
            self._transport.close()

    def _end(self, ending: Ending) -> None:
        """Abort. The first that waits has what was read of its answer, and those behind it have none."""
        if self._transport is not None:
            self._transport.abort()
        if self._waiting:
            self._settle(ending)
        while self._waiting:
            self._waiting.popleft().set_result(Answer("dropped"))

    def _settle(self, ending: Ending) -> None:
        """Answer the first that waits with what was read."""
        waiter = self._waiting.popleft()
        self._cut.discard(waiter)
        waiter.set_result(Answer(ending, self._status, tuple(self._headers), b"".join(self._body)))
        self._begin()

    def _begin(self) -> None:
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._size = 0
        self._is_begun = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end("dropped")

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        # An answer without a length ends with the connection.
        if self._waiting and self._is_begun and exc is None and not self._has_length():
            self._settle("complete")
        self._end("dropped")

    def _has_length(self) -> bool:
        names = {name.lower() for name, _ in self._headers}
        return bool(names & {b"content-length", b"transfer-encoding"})

    # What the parser calls.

    def on_message_begin(self) -> None:
        # An answer that nobody asked for: whoever asked next would be taken for its reader.
        if not self._waiting:
            self._end("dropped")

    def on_status(self, _: bytes) -> None:
        self._status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._is_begun = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        if self._waiting and self._waiting[0] in self._cut:
            self._end("dropped by us")
        self._count(len(body))

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > LARGEST:
            self._end("endless")

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:
            self._begin()
        elif self._waiting:
            self._settle("complete")
