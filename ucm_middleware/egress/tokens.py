"""What a token is, by what it is found again in a text, and how runs of letters and digits are taken out of one."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Final, NamedTuple, cast
from urllib.parse import unquote_to_bytes

from ucm_middleware.errors import InvalidContextError

LONGEST: Final = 4096
"""Bytes of a value."""

LETTERS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

SLICE: Final = 65_536
"""Bytes that are looked at in one go, or wait to be."""

SHORTEST: Final = 3
"""Letters of a run by which a value is looked up: what else must stand there is checked then."""

_SHAPE: Final = re.compile(rb"[A-Za-z0-9._~+/=:-]+\Z")
_RUN: Final = re.compile(rb"[A-Za-z0-9]+")
_WIDE: Final = re.compile(rb"[A-Za-z0-9_-]+")
_TIMED_UUID: Final = re.compile(rb"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-1[0-9a-fA-F]{3}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\Z")
_BLANKS: Final = bytes(code if code in LETTERS else 32 for code in range(256))
_ALPHABETS: Final = (LETTERS + b"-_.~+/=:", LETTERS + b"-_", LETTERS)
_ESCAPE: Final = rb"(?:\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|\\[0-7]{3}|\\[a-z]|%[0-9A-Fa-f]{2})"
_GLUED: Final = re.compile(_ESCAPE + rb"([A-Za-z0-9]+)")
_UNICODE: Final = re.compile(rb"\\u00([0-7][0-9A-Fa-f])")


class Token(NamedTuple):
    """``run`` is what is looked up: letters and digits. ``checked`` is what must stand there: the run with ``before``
    bytes before it and ``after`` behind.
    """

    run: bytes
    checked: bytes
    before: int
    after: int


def token_of(value: object, min_entropy: float, field: str = "value") -> Token:
    """How a value is found again. Raises InvalidContextError, without the value, for what is no token.

    It is found by its best run of letters and digits: where that alone has not the entropy, together with the run
    around it that may have ``-`` and ``_`` in it too (a UUID), else with all of the value (base64). Of what begins as a
    JWT does, the signature stands for it: the headers of all users' are the same.
    """
    if not isinstance(value, str | bytes):
        raise InvalidContextError(field, f"is {type(value).__name__}, not text or bytes", "give the token itself")
    data = as_bytes(value)
    if not data or len(data) > LONGEST or not _SHAPE.match(data):
        rule = f"is no token: 1 to {LONGEST} letters, digits and . _ ~ + / = : -, with no blanks"
        raise InvalidContextError(field, rule, "protect the token alone, not the text around it")
    if _TIMED_UUID.match(data):
        raise InvalidContextError(
            field, "is a UUID of version 1, which is made of the time and can be guessed", "make one with uuid4()"
        )
    part = data
    if data.startswith(b"eyJ") and data.count(b".") >= 2:
        part = data.rsplit(b".", 1)[1] or data
    run = max(_RUN.findall(part), key=_bits, default=b"")
    if _bits(run) >= min_entropy:
        return Token(run, run, 0, 0)
    run = max(_RUN.findall(part), key=_worth, default=b"")
    if len(run) >= SHORTEST:
        wide = next(found for found in _WIDE.findall(part) if run in _RUN.findall(found))
        for checked in (wide, part):
            if _bits(b"".join(_RUN.findall(checked))) >= min_entropy:
                before = _place_of(run, checked)
                return Token(run, checked, before, len(checked) - before - len(run))
    raise InvalidContextError(
        field,
        f"has less than {min_entropy:g} bits of entropy, as estimated from a run of its letters and digits",
        "protect what is made at random, such as secrets.token_urlsafe(32)",
    )


def runs(data: bytes) -> list[bytes]:
    """The runs of letters and digits in a text; those that follow an escape, of JSON or of a URL, without its letters
    too.
    """
    found = data.translate(_BLANKS).split()
    if b"\\" in data or b"%" in data:
        found += _GLUED.findall(data)
    return found


def places(data: bytes) -> "Iterator[re.Match[bytes]]":
    """The same, with where they stand: in the last group of each match."""
    return chain(re.finditer(rb"([A-Za-z0-9]+)", data), _GLUED.finditer(data))


def pieces(data: bytes) -> Iterator[bytes]:
    """A long text in pieces that are each complete: the runs of all of it would take many times its memory."""
    rest = b""
    for start in range(0, len(data), SLICE):
        complete, rest = cut(rest + data[start : start + SLICE])
        yield complete
    yield rest


def as_bytes(data: object) -> bytes:
    """A text as the bytes of it; none of what is no text. Bytes that may change are copied."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode(errors="replace")
    return bytes(cast("bytearray", data)) if isinstance(data, bytearray | memoryview) else b""


def given_runs(data: bytes) -> list[bytes]:
    """The runs in what a client sent, also once its escapes are undone."""
    found = runs(data)
    if b"%" in data:
        found += runs(unquote_to_bytes(data))
    if b"\\" in data:
        found += runs(_UNICODE.sub(lambda match: bytes((int(match[1], 16),)), data))
    return found


def cut(data: bytes) -> tuple[bytes, bytes]:
    """A text that goes on, in two: what is complete, and the run at its end, with the escape it may begin with. A run
    is of what values are made of; where that never ends, of letters and digits.
    """
    for alphabet in _ALPHABETS:
        complete = data.rstrip(alphabet)
        if complete.endswith((b"\\", b"%")):
            complete = complete[:-1]
        if len(data) - len(complete) <= 2 * LONGEST:
            return complete, data[len(complete) :]
    return data, b""


def _place_of(run: bytes, wide: bytes) -> int:
    return next(match.start() for match in _RUN.finditer(wide) if match[0] == run)


def _worth(run: bytes) -> float:
    """By which run to look up: rather not by what may be a word, which many values and texts have."""
    return _bits(run) / 2 if run.isalpha() else _bits(run)


def _bits(run: bytes) -> float:
    """An estimate, from above: by the alphabet that was used, and how evenly. Counting up and repeating have none."""
    if len(run) < 2:
        return 0.0
    digits = any(48 <= code < 58 for code in run)
    is_hex = re.fullmatch(rb"[0-9a-f]+|[0-9A-F]+", run) is not None
    lower, upper = run.lower() != run and run.upper() != run, run.isalpha()
    size = 10 if run.isdigit() else 16 if is_hex else (52 if lower else 26) + (0 if upper else 10 * digits)
    steps = [(after - before) % 256 for before, after in pairwise(run)]
    period = next((at for at in range(1, len(run) // 2 + 1) if run.startswith(run[at:])), None)
    even = 0.0 if period is not None else min(_shannon(run), _shannon(steps))
    return len(run) * min(math.log2(size), 1.5 * even)


def _shannon(items: "bytes | list[int]") -> float:
    return -sum(count / len(items) * math.log2(count / len(items)) for count in Counter(items).values())
