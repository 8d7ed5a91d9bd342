"""An event as it stands on the wire: JSON, serialised once for all who get it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, Final, cast

from ucm_middleware.errors import InvalidEventError
from ucm_middleware.events.policy import TYPE_RULE, EventPolicy, is_type
from ucm_middleware.ids import validate_id
from ucm_middleware.isolation import key_text, type_name

# As text, not as escapes: users write in all scripts. What is no number in JSON is refused.
# What contains itself nests too deeply, and to look out for it beforehand costs each event more than that one.
_encode: Final = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode

FRAME: Final = 96
"""Bytes that the names of an envelope's fields, its epoch and its sequence take at most, roughly."""


MOST_BITS: Final = 14_000
"""Of a number. Somewhat above, the interpreter refuses to write it in decimal, for the time that this takes."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """To which of a user's connections an event goes: those of a thread, a run, or one by its id; None for any."""

    thread_id: str | None = None
    run_id: str | None = None
    connection_id: str | None = None


TO_ALL: Final = Narrowing()


def narrowing(thread_id: str | None, run_id: str | None, connection_id: str | None) -> Narrowing:
    """The narrowing to all of these. Raises InvalidContextError for what is no id."""
    if thread_id is None and run_id is None and connection_id is None:
        return TO_ALL
    ids = {"thread_id": thread_id, "run_id": run_id, "connection_id": connection_id}
    return Narrowing(**{name: None if value is None else validate_id(value, name) for name, value in ids.items()})


class Origin:
    """Whose events they are, and the thread, the run and the request that they come from, as far as there are any: as
    all events of one origin have it.
    """

    __slots__ = ("text",)

    def __init__(
        self, user_id: str, thread_id: str | None = None, run_id: str | None = None, request_id: str | None = None
    ) -> None:
        # By hand: the encoder takes four times as long for what is all text.
        self.text = (
            f'"user_id":{encode_basestring(user_id)},"thread_id":{_text(thread_id)},"run_id":{_text(run_id)},'
            f'"request_id":{_text(request_id)}'
        )


@dataclass(slots=True)
class Event:
    """An event that has its place in its user's order. ``at`` is a reading of the manager's clock."""

    sequence: int
    text: str
    size: int
    at: float
    narrowing: Narrowing


class Draft:
    """An event that is checked and serialised, and lacks only its place in the order."""

    __slots__ = ("_head", "_size", "_tail", "narrowing", "type")

    def __init__(self, event: object, data: object, origin: Origin, narrowing: Narrowing, policy: EventPolicy) -> None:
        """Raises InvalidEventError for a type or data that break a rule."""
        self.type = _checked_type(event, policy)
        self.narrowing = narrowing
        self._head = f'{{"type":{encode_basestring(self.type)},{origin.text},"timestamp":"{_iso(time.time())}"'
        self._tail = _encoded(data)
        self._size = self._checked_size(policy.max_size)

    @property
    def data_text(self) -> str:
        """The data, as JSON."""
        return self._tail

    @property
    def size(self) -> int:
        """Bytes on the wire, roughly."""
        return self._size

    def packed(self, mark: str) -> bytes:
        """What another worker makes the same draft of; ``mark`` says where it was made, and tells it from others."""
        narrow = self.narrowing
        about = [mark, self.type, self._size, narrow.thread_id, narrow.run_id, narrow.connection_id, len(self._head)]
        return f"{_encode(about)}\n{self._head}{self._tail}".encode()

    @staticmethod
    def unpacked(packed: bytes) -> "tuple[Draft, str]":
        """The draft, and its mark. Raises ValueError for what is none."""
        about, _, text = packed.decode().partition("\n")
        mark, kind, size, thread_id, run_id, connection_id, cut = json.loads(about)
        draft = object.__new__(Draft)
        draft.type = kind
        draft.narrowing = narrowing(thread_id, run_id, connection_id)
        draft._head, draft._tail, draft._size = text[:cut], text[cut:], size
        return draft, mark

    def numbered(self, epoch: str, sequence: int, at: float) -> Event:
        """The event, with its place."""
        text = f'{self._head},"epoch":"{epoch}","sequence":{sequence},"data":{self._tail}}}'
        return Event(sequence, text, self._size, at, self.narrowing)

    def _checked_size(self, most: int) -> int:
        try:
            size = _bytes_of(self._head) + _bytes_of(self._tail) + FRAME
        except UnicodeEncodeError:
            raise InvalidEventError(
                "data", "has text that is no Unicode: half of a surrogate pair", "mend the text"
            ) from None
        if size > most:
            raise InvalidEventError(
                "data", f"makes an event of {size} bytes, and {most} are allowed", "send less, or a reference to it"
            )
        return size


def _checked_type(event: object, policy: EventPolicy) -> str:
    if not is_type(event):
        raise InvalidEventError("event", f"must be {TYPE_RULE}", "give the type of the event, such as 'message'")
    name = cast("str", event)
    if policy.types is not None and name not in policy.types:
        raise InvalidEventError(
            "event", f"{name!r} is of no declared type", f"send one of {', '.join(sorted(policy.types))}, or declare it"
        )
    return name


def _iso(at: float) -> str:
    """A time in seconds since the epoch as ISO 8601 in UTC, to the microsecond."""
    second = int(at)
    return f"{_second(second)}.{int((at - second) * 1e6):06}+00:00"


@lru_cache(maxsize=1)  # of events there are many in a second
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _text(value: str | None) -> str:
    return "null" if value is None else encode_basestring(value)


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _encoded(data: object) -> str:
    try:
        return _encode(data)
    except (TypeError, ValueError, RecursionError):
        path, problem = _culprit(data, "data", 0) or ("data", "nests too deeply, or contains itself")
        raise InvalidEventError(path, problem, "give plain values that JSON has") from None


def _culprit(value: Any, path: str, depth: int) -> tuple[str, str] | None:
    """Where the first value is that JSON has not, and what it is. Never the value."""
    if value is None or isinstance(value, str | bool):
        return None
    if isinstance(value, int):
        return None if value.bit_length() < MOST_BITS else (path, "is a number of thousands of digits")
    if depth > 100:
        return "data", "nests too deeply, or contains itself"
    if isinstance(value, float):
        return None if value - value == 0 else (path, "is no finite number")
    if isinstance(value, dict):
        for name, item in cast("Mapping[object, object]", value).items():
            if not isinstance(name, str | int | float | bool | None):
                return path, f"has a key that is a {type_name(name)}, not text"
            if isinstance(name, float) and name - name != 0:
                return path, "has a key that is no finite number"
            if found := _culprit(item, f"{path}[{key_text(name)}]", depth + 1):
                return found
        return None
    if isinstance(value, list | tuple):
        for index, item in enumerate(cast("Sequence[object]", value)):
            if found := _culprit(item, f"{path}[{index}]", depth + 1):
                return found
        return None
    return path, f"is a {type_name(value)}, which JSON has not"
