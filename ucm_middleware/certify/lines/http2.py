"""A connection that speaks HTTP/2 in the clear: requests of several users at once, each on a stream of its own."""

import asyncio
from dataclasses import dataclass, field
from typing import Final, Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from ucm_middleware.certify.lines.answer import LARGEST, Answer
from ucm_middleware.certify.lines.request import Request

_LARGEST_BODY: Final = 16 * 1024
"""Bytes of a request's body: what the first window of a connection has room for, without waiting for more."""


@dataclass(slots=True)
class _Stream:
    waiter: asyncio.Future[Answer]
    status: int = 0
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: list[bytes] = field(default_factory=list[bytes])


class MultiplexedLine(asyncio.Protocol):
    """Not thread-safe. Bodies of more than 16 KiB are refused by ``takes``."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._transport: asyncio.Transport | None = None
        self._connection = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._streams: dict[int, _Stream] = {}

    @classmethod
    async def open(cls, port: int) -> Self:
        """Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(lambda: cls(f"127.0.0.1:{port}"), "127.0.0.1", port)
        return line

    @staticmethod
    def takes(request: Request) -> bool:
        """Whether it can be sent over such a line."""
        return request.manner == "whole" and len(request.body or b"") <= _LARGEST_BODY

    @property
    def is_over(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def send(self, request: Request) -> asyncio.Future[Answer]:
        """Send it on a stream of its own; the future has its answer, whatever becomes of it."""
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self.is_over:
            waiter.set_result(Answer("refused"))
            return waiter
        stream = self._connection.get_next_available_stream_id()
        self._streams[stream] = _Stream(waiter)
        names = [
            (":method", request.method),
            (":scheme", "http"),
            (":authority", self._authority),
            (":path", request.target),
            *((name.lower(), value) for name, value in request.headers),
        ]
        self._connection.send_headers(stream, names, end_stream=request.body is None)
        if request.body is not None:
            self._connection.send_data(stream, request.body, end_stream=True)
        self._flush()
        return waiter

    async def answer(self, waiter: asyncio.Future[Answer], patience: float) -> Answer:
        """Wait for an answer; one that is late ends the connection."""
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), patience)
        except TimeoutError:
            self.drop()
            return await waiter

    def drop(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()
        self._end_all()

    def close(self) -> None:
        """End it as clients do that are done."""
        if not self.is_over:
            self._connection.close_connection()
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(self._connection.data_to_send())

    def _end_all(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.waiter.set_result(Answer("dropped", stream.status, stream.headers, b"".join(stream.body)))

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connection.initiate_connection()
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._connection.receive_data(data)
        except ProtocolError:
            self.drop()
            return
        for event in events:
            self._take(event)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end_all()

    def _take(self, event: Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", 0) or 0)
        if stream is None:
            return
        match event:
            case ResponseReceived():
                headers = [(bytes(name), bytes(value)) for name, value in event.headers]
                stream.status = next((int(value) for name, value in headers if name == b":status"), 0)
                stream.headers = tuple(each for each in headers if not each[0].startswith(b":"))
            case DataReceived():
                stream.body.append(event.data)
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if sum(map(len, stream.body)) > LARGEST:
                    self.drop()
            case StreamEnded():
                del self._streams[event.stream_id]
                stream.waiter.set_result(Answer("complete", stream.status, stream.headers, b"".join(stream.body)))
            case StreamReset():
                del self._streams[event.stream_id]
                stream.waiter.set_result(Answer("dropped", stream.status, stream.headers, b"".join(stream.body)))
            case _:
                pass
