"""The messages of PostgreSQL's protocol, cut out of the bytes that come; what is of no interest is never held up."""

import struct
from collections.abc import Iterator
from typing import Final

LOOKED_AT: Final = 1024 * 1024
"""Bytes of one message that are kept together; what is behind them passes unseen."""

_HEADER: Final = 5
_LENGTH: Final = struct.Struct("!I")

Piece = tuple[int, bytes]
"""The kind of a message with its bytes, header included; or 0 with bytes of no interest."""


class FramingError(Exception):
    """What came is no message."""


class Cutter:
    """Of one direction. ``wanted`` are the kinds of interest; it may be changed between two pieces."""

    __slots__ = ("_kept", "_passing", "wanted")

    def __init__(self, wanted: frozenset[int]) -> None:
        self.wanted = wanted
        self._kept = b""
        self._passing = 0

    def cut(self, data: bytes) -> Iterator[Piece]:
        """All that is complete by now. The pieces, one behind the other, are the bytes that came. Raises FramingError,
        when ``rest`` has what was not given out.
        """
        buffer = self._kept + data if self._kept else data
        self._kept = b""
        at = min(self._passing, len(buffer))
        self._passing -= at
        # From here on to `at` nothing was of interest.
        begin = 0
        while len(buffer) - at >= _HEADER:
            size = 1 + _LENGTH.unpack_from(buffer, at + 1)[0]
            if size < _HEADER:
                self._kept = buffer[begin:]
                raise FramingError
            if buffer[at] not in self.wanted:
                at += size
                if at > len(buffer):
                    self._passing = at - len(buffer)
                    at = len(buffer)
                continue
            seen = min(size, LOOKED_AT)
            if len(buffer) - at < seen:
                break
            if begin < at:
                yield 0, buffer[begin:at]
            begin = at + seen
            self._passing = size - seen
            yield buffer[at], buffer[at:begin]
            at = begin + min(self._passing, len(buffer) - begin)
            self._passing -= at - begin
        if begin < at:
            yield 0, buffer[begin:at]
        self._kept = buffer[at:]

    def rest(self) -> bytes:
        """What was not given out yet, which is taken away."""
        kept, self._kept = self._kept, b""
        return kept


def message(kind: bytes, payload: bytes) -> bytes:
    """One."""
    return kind + _LENGTH.pack(4 + len(payload)) + payload


def text_at(raw: bytes, at: int) -> tuple[bytes, int]:
    """A text that ends with a zero byte, and where it goes on behind that. Where it is cut off, what there is of it."""
    end = raw.find(b"\0", at)
    return (raw[at:], len(raw)) if end < 0 else (raw[at:end], end + 1)


def values_at(raw: bytes, at: int) -> Iterator[bytes | None]:
    """A counted list of values, None for NULL; of a message that was cut off, those that are complete."""
    if len(raw) < at + 2:
        return
    (count,) = struct.unpack_from("!H", raw, at)
    at += 2
    for _ in range(count):
        if len(raw) < at + 4:
            return
        (size,) = struct.unpack_from("!i", raw, at)
        at += 4
        if size < 0:
            yield None
            continue
        if len(raw) < at + size:
            return
        yield raw[at : at + size]
        at += size


def parameters(bind: bytes, at: int) -> Iterator[bytes | None]:
    """The parameters in a Bind, whose list of formats begins at ``at``."""
    if len(bind) >= at + 2:
        (formats,) = struct.unpack_from("!H", bind, at)
        yield from values_at(bind, at + 2 + 2 * formats)


def without_channel_binding(raw: bytes) -> bytes:
    """A request for authentication with no mechanism that binds it to TLS, which ends at the tap."""
    kept = raw[_HEADER:].replace(b"SCRAM-SHA-256-PLUS\0", b"")
    return message(raw[:1], kept)
