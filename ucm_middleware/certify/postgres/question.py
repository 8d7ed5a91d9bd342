"""What the server is asked in between: the settings in force, in a way that leaves nothing and changes nothing."""

from collections.abc import Iterable, Mapping
from typing import Final

from ucm_middleware.certify.postgres.framing import message, values_at

_NAME: Final = b"_ucm_certify\0"
_CLOSE: Final = message(b"C", b"S" + _NAME)
_SYNC: Final = message(b"S", b"")

_PASSING: Final = frozenset(b"ANS")
"""Kinds that the server sends at any time: notifications, notices, parameters."""


class Question:
    """Which values some settings have. Its statement and portal are named, since a simple query would take the client's
    unnamed ones away. It is closed first too: a cancellation that came late may have hit the one before.
    """

    __slots__ = ("_names", "failure", "is_answered", "values")

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self.values: Mapping[str, str] | None = None
        self.failure = b""
        self.is_answered = False

    def to_bytes(self) -> bytes:
        """As it is sent, in one piece."""
        # The names are of letters, digits, dots, underscores and dollars.
        columns = ", ".join(f"pg_catalog.current_setting('{name}', true)" for name in self._names)
        return b"".join(
            [
                _CLOSE,
                message(b"P", _NAME + f"select {columns}".encode() + b"\0\0\0"),
                message(b"B", _NAME + _NAME + b"\0\0" * 3),
                message(b"E", _NAME + b"\0" * 4),
                _CLOSE,
                _SYNC,
            ]
        )

    def takes(self, kind: int, raw: bytes) -> bool:
        """Whether a message of the server's belongs to the answer."""
        if kind in _PASSING:
            return False
        if kind == ord("D"):
            values = [value.decode(errors="replace") if value else "" for value in values_at(raw, 5)]
            self.values = dict(zip(self._names, values, strict=False))
        elif kind == ord("E"):
            self.values, self.failure = None, raw
        elif kind == ord("Z"):
            self.is_answered = True
        return True
