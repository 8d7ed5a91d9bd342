"""A small HTTP/1.1 client on a bare socket, for what no well-behaved client does.

It keeps one connection, puts several requests into one segment, sends half a request and drops the line.
"""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .servers import HOST, Server
from .waiting import PATIENCE


@dataclass(frozen=True)
class RawResponse:
    """One response; header names are in lower case, the body is whole and without transfer coding."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def build_request(
    path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
) -> bytes:
    """The bytes of one request. A body gets its Content-Length; `headers` may override that."""
    fields = {"Host": "test"} | ({"Content-Length": str(len(body))} if body else {}) | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class RawConnection:
    """One keep-alive connection, closed at the end of its `with` block."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection((HOST, server.port), timeout=PATIENCE)
        # Without this the kernel may hold back a small request until the last answer was acknowledged.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def request(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> RawResponse:
        """Send one request and read its response."""
        self.send(build_request(path, method=method, headers=headers, body=body))
        return self.read_response()

    def pipeline(self, *requests: bytes) -> list[RawResponse]:
        """Send all `requests` (see `build_request`) in one segment, then read as many responses."""
        self.send(b"".join(requests))
        return [self.read_response() for _ in requests]

    def send(self, data: bytes) -> None:
        """Send any bytes: half a request, several, or nonsense."""
        self.socket.sendall(data)

    def read_response(self) -> RawResponse:
        """Read the next response, with its Content-Length or chunked body; `EOFError` if the server hung up before."""
        status_line = self._line()
        status = int(status_line.split(" ", 2)[1])
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self._exactly(int(headers.get("content-length", "0")))
        return RawResponse(status, headers, body)

    def hung_up(self) -> bool:
        """Wait for the server's next sign; True if that is the end of the connection, False if it is data."""
        try:
            return not self._incoming.peek(1)
        except ConnectionResetError:
            return True

    def half_close(self) -> None:
        """Send FIN: we have nothing more to say, and still read."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Drop the line with RST, as a crashed client's kernel does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Drop the line with FIN, reading no more. Unread data turns that into RST."""
        self._incoming.close()
        self.socket.close()

    def _line(self) -> str:
        line = self._incoming.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError(f"the connection ended in the head of a response, after {line!r}")
        return line[:-2].decode("latin-1")

    def _chunk(self) -> bytes:
        size = int(self._line().partition(";")[0], 16)
        data = self._exactly(size)
        # Servers send no trailers unless asked: the empty line after the last chunk ends the body.
        self._line()
        return data

    def _exactly(self, count: int) -> bytes:
        data = self._incoming.read(count)
        if len(data) < count:
            raise EOFError(f"the connection ended {count - len(data)} bytes before the end of a body")
        return data
