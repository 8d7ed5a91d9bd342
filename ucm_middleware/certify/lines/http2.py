"""A connection that speaks HTTP/2 in the clear: requests of several users at once, each on a stream of its own."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from ucm_middleware.certify.lines.answer import LARGEST, Answer, Ending
from ucm_middleware.certify.lines.request import Request

_LARGEST_BODY: Final = 16 * 1024
"""Bytes of a request's body: what the first window of a connection has room for, without waiting for more."""


@dataclass(slots=True)
class _Stream:
    waiter: asyncio.Future[Answer]
    status: int = 0
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytearray = field(default_factory=bytearray)


class MultiplexedLine(asyncio.Protocol):
    """Not thread-safe. Bodies of more than 16 KiB are refused by ``takes``."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._transport: asyncio.Transport | None = None
        self._connection = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._streams: dict[int, _Stream] = {}
        self._is_told_to_go = False

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
        return self._is_told_to_go or self._transport is None or self._transport.is_closing()

    def send(self, request: Request) -> asyncio.Future[Answer]:
        """Send it on a stream of its own; the future has its answer, whatever becomes of it."""
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self.is_over:
            waiter.set_result(Answer("refused"))
            return waiter
        stream = self._connection.get_next_available_stream_id()
        self._streams[stream] = _Stream(waiter)
        try:
            self._connection.send_headers(stream, self._head(request), end_stream=request.body is None)
            if request.body is not None:
                self._send_body(stream, request.body)
        except ProtocolError:
            # More streams than the server takes, or it has just ended the connection.
            del self._streams[stream]
            waiter.set_result(Answer("refused"))
        self._flush()
        return waiter

    def _head(self, request: Request) -> list[tuple[str, str]]:
        names = [(name.lower(), value) for name, value in request.headers]
        authority = next((value for name, value in names if name == "host"), self._authority)
        return [
            (":method", request.method),
            (":scheme", "http"),
            (":authority", authority),
            (":path", request.target),
            *(each for each in names if each[0] != "host"),
        ]

    def _send_body(self, stream: int, body: bytes) -> None:
        if len(body) > self._connection.local_flow_control_window(stream):
            self._give_up(stream, "refused")
        else:
            self._connection.send_data(stream, body, end_stream=True)

    async def answer(self, waiter: asyncio.Future[Answer], patience: float) -> Answer:
        """Wait for an answer; of one that is late the stream ends, and the others' go on."""
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), patience)
        except TimeoutError:
            for number in [number for number, stream in self._streams.items() if stream.waiter is waiter]:
                self._give_up(number, "late")
            self._flush()
            return await waiter

    def _give_up(self, number: int, ending: Ending) -> None:
        """Reset one stream. Its answer is what was read of it."""
        self._settle(number, ending)
        with suppress(ProtocolError):
            self._connection.reset_stream(number, ErrorCodes.CANCEL)

    def _settle(self, number: int, ending: Ending) -> None:
        stream = self._streams.pop(number)
        stream.waiter.set_result(Answer(ending, stream.status, stream.headers, bytes(stream.body)))

    def drop(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()
        self._end_all()

    def close(self) -> None:
        """End it as clients do that are done."""
        if not self.is_over:
            with suppress(ProtocolError):
                self._connection.close_connection()
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        data = self._connection.data_to_send()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _drop_after(self, last: int | None) -> None:
        """A server that goes says up to which stream it answers: there will be nothing on those behind it."""
        for number in [number for number in self._streams if number > (last or 0)]:
            self._settle(number, "dropped")

    def _end_all(self) -> None:
        for number in [*self._streams]:
            self._settle(number, "dropped")

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
            if isinstance(event, ConnectionTerminated):
                self._is_told_to_go = True
                self._drop_after(event.last_stream_id)
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
                said = next((value for name, value in headers if name == b":status"), b"")
                stream.status = int(said) if said.isdigit() else 0
                stream.headers = tuple(each for each in headers if not each[0].startswith(b":"))
            case DataReceived():
                stream.body += event.data
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if len(stream.body) > LARGEST:
                    self._give_up(event.stream_id, "endless")
            case StreamEnded():
                self._settle(event.stream_id, "complete")
            case StreamReset():
                self._settle(event.stream_id, "dropped")
            case _:
                pass
