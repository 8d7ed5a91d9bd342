"""A WebSocket client on a bare socket, for what no well-behaved client does: it stops reading, and sends nonsense."""

import json
import socket
import struct
from types import TracebackType
from typing import Any, Self

from .observer import token_of
from .servers import HOST, Server
from .waiting import PATIENCE

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
SMALL = 4096
"""Bytes of the receive buffer of a client that is to be stalled soon."""

Frame = tuple[int, bytes]
"""Opcode and payload."""


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    final: bool = True,
    reserved: int = 0,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """The bytes of a frame, whose header may say what is not so. RFC 6455, section 5.2."""
    said = len(payload) if length is None else length
    head = bytes([(0x80 if final else 0) | reserved << 4 | opcode])
    mask_bit = 0x80 if masked else 0
    if said < 126:
        head += bytes([mask_bit | said])
    elif said < 0x10000:
        head += struct.pack("!BH", mask_bit | 126, said)
    else:
        head += struct.pack("!BQ", mask_bit | 127, said)
    return head + (b"\0\0\0\0" if masked else b"") + payload


class RawWebSocket:
    """One connection, accepted; closed at the end of its ``with`` block. It answers no ping.

    ``receive_buffer`` is what its kernel takes in while it does not read; the system's default when None.
    """

    def __init__(self, server: Server, user: str | None, path: str, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((HOST, server.port))
        self._incoming = self.socket.makefile("rb", buffering=SMALL)
        headers = {
            "Host": f"{HOST}:{server.port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
            **token_of(user),
        }
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.send("\r\n".join(lines).encode())
        status = self._incoming.readline()
        assert b" 101 " in status, status
        while self._incoming.readline().strip():
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send any bytes."""
        self.socket.sendall(data)

    def read(self) -> Frame | None:
        """The next frame that is no ping or pong; None when the connection has ended."""
        while (found := self._frame()) is not None:
            if found[0] not in (PING, PONG):
                return found
        return None

    def events(self, last_sequence: int) -> list[dict[str, Any]]:
        """The events up to this one."""
        found: list[dict[str, Any]] = []
        while not found or found[-1]["sequence"] < last_sequence:
            got = self.read()
            assert got is not None, "the connection ended before"
            assert got[0] == TEXT, got
            found.append(json.loads(got[1]))
        return found

    def read_to_the_end(self) -> int | None:
        """Read all that there is. The close code; None where the socket ended without one."""
        while (found := self.read()) is not None:
            opcode, payload = found
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big") if payload else 1005
        return None

    def close(self) -> None:
        self._incoming.close()
        self.socket.close()

    def _frame(self) -> Frame | None:
        try:
            head = self._incoming.read(2)
            if len(head) < 2:
                return None
            length = head[1] & 0x7F
            if length >= 126:
                size = 2 if length == 126 else 8
                length = int.from_bytes(self._incoming.read(size), "big")
            payload = self._incoming.read(length)
        except ConnectionError:
            return None
        return (head[0] & 0x0F, payload) if len(payload) == length else None
