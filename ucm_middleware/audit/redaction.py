"""What of an application's data goes into a record: plain values, bounded, and nothing whose name says it is secret.

Names are taken apart into words (``apiKey``, ``api-key`` and ``API_KEY`` are two each), and words are matched whole: a
``tokenizer`` is no token. docs/reference/audit-records.md has the rules.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice, pairwise
from typing import Any, Final, TypeVar, cast

from ucm_middleware.audit.records import UserMention
from ucm_middleware.isolation import type_name

T = TypeVar("T")

REDACTED: Final = "<redacted>"

MOST_BYTES: Final = 8192
"""How long one application's data may be in a record, as JSON, non-ASCII characters escaped."""

MOST_CHARACTERS: Final = 1024
"""How long one text may be."""

MOST_DEPTH: Final = 16
"""How deep containers may nest."""

_LEAST: Final = 64  # room for a note on what is left out
_RESERVE: Final = (MOST_DEPTH + 1) * _LEAST  # each container that is cut has one
_MOST_ITEMS: Final = MOST_BYTES // 4
_MOST_BITS: Final = 256

_WORD: Final = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+|\d+")
_SECRET: Final = frozenset({"authorization", "pwd", "jwt", "otp", "pin", "cvv", "cvc", "phpsessid", "jsessionid"})
_SECRET_ENDING: Final = re.compile(
    r"(?:password|passwd|passphrase|secret|token|cookie|credential|apikey|accesskey|privatekey|sessionid)s?$"
)
_SECRET_PAIRS: Final = frozenset(
    {
        *(("api", "key"), ("access", "key"), ("private", "key"), ("signing", "key"), ("encryption", "key")),
        *(("session", "id"), ("session", "key"), ("auth", "key"), ("pass", "word"), ("pass", "phrase")),
    }
)
_ABOUT_IT: Final = frozenset(
    {*("count", "counts", "length", "limit", "size", "usage", "used", "budget", "total", "type", "ttl", "age")}
)


def is_secret(name: str) -> bool:
    """Whether what stands under this name is kept out of records."""
    words = [word.lower() for word in _WORD.findall(name[:MOST_CHARACTERS])]
    if not words or words[-1] in _ABOUT_IT:  # a token_count
        return False
    return any(map(_is_secret_word, words)) or not _SECRET_PAIRS.isdisjoint(pairwise(words))


def _is_secret_word(word: str) -> bool:
    return word in _SECRET or _SECRET_ENDING.search(word) is not None


def for_record(data: Mapping[str, object]) -> dict[str, Any]:
    """A copy of an application's data as it may stand in a record.

    ``json.dumps(copy, allow_nan=False)`` is at most ``MOST_BYTES`` long. Never raises: what is no plain value is shown
    by the name of its type, and what is left out by a note of how much it was.
    """
    shown = _Copy(MOST_BYTES - _RESERVE).value(data, "", 0)
    return cast("dict[str, Any]", shown) if isinstance(shown, dict) else {"unreadable": shown}


def text_for_record(text: str) -> str:
    """The text, cut to ``MOST_CHARACTERS``, which any UTF-8 file can hold."""
    excess = len(text) - MOST_CHARACTERS
    if excess > 0:
        text = f"{text[:MOST_CHARACTERS]}... ({excess} characters more)"
    # Half a surrogate pair is in no encoding.
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class _Copy:
    """One copy under way. ``left`` is how many bytes there is room for."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def value(self, value: object, name: str, depth: int, *, is_item: bool = False) -> object:
        """A value that stands under this name, or is an item of a sequence."""
        kind = type_name(value)
        try:
            if value is None or isinstance(value, bool):
                return self._taken(value)
            if name and is_secret(name) and not _is_number_of_tokens(name, value):
                return self._taken(REDACTED)
            if isinstance(value, str):
                return self._text(value)
            if isinstance(value, int | float):
                return self._taken(_number(value))
            if isinstance(value, Mapping):
                return self._mapping(cast("Mapping[object, object]", value), depth)
            if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray | memoryview | range):
                return self._items(cast("Iterable[object]", value), depth, may_be_pair=is_item)
        except Exception as error:  # noqa: BLE001 - an object of the application's own may raise anything
            return self._taken(f"<{kind}, which raised {type_name(error)}>")
        return self._taken(f"<{kind}>")

    def _text(self, text: str) -> str:
        shown = text_for_record(str.__str__(text))
        size = _size(shown)
        if size > self.left:
            return self._taken(f"<{len(text)} characters left out>")
        self.left -= size
        return UserMention(shown) if isinstance(text, UserMention) else shown

    def _mapping(self, mapping: Mapping[object, object], depth: int) -> object:
        if depth >= MOST_DEPTH:
            return self._taken(f"<{type_name(mapping)}, nested too deeply>")
        self.left -= 2
        shown: dict[str, object] = {}
        for key, item in list(islice(mapping.items(), _MOST_ITEMS)):
            name = text_for_record(str.__str__(key)) if isinstance(key, str) else _key(key)
            size = _size(name) + 4
            if self.left < size + _LEAST:
                shown["..."] = f"<{len(mapping) - len(shown)} more left out>"
                break
            self.left -= size
            shown[name] = self.value(item, name, depth + 1)
        return shown

    def _items(self, items: Iterable[object], depth: int, *, may_be_pair: bool) -> object:
        if depth >= MOST_DEPTH:
            return self._taken(f"<{type_name(items)}, nested too deeply>")
        self.left -= 2
        found = list(islice(items, _MOST_ITEMS))
        is_pair = may_be_pair and len(found) == 2 and isinstance(found[0], str)  # a header, say, of a list of them
        name = str(found[0]) if is_pair else ""
        shown: list[object] = []
        for item in found:
            if self.left < _LEAST + 2:
                shown.append(f"<{_length(items, found) - len(shown)} more left out>")
                break
            self.left -= 2
            shown.append(self.value(item, name if shown else "", depth + 1, is_item=True))
        return shown

    def _taken(self, value: T) -> T:
        self.left -= _size(value)
        return value


def _is_number_of_tokens(name: str, value: object) -> bool:
    """How many tokens a model took is what people write down most."""
    return isinstance(value, int | float) and name.lower().endswith("tokens")


def _size(value: object) -> int:
    return len(json.dumps(value))


def _length(items: Iterable[object], found: list[object]) -> int:
    return len(items) if isinstance(items, Sequence | Set) else len(found)


def _number(number: float) -> object:
    if isinstance(number, float):
        return float(number) if math.isfinite(number) else f"<{type_name(number)}>"
    return int(number) if number.bit_length() <= _MOST_BITS else f"<{type_name(number)}>"


def _key(key: object) -> str:
    if key is None or isinstance(key, bool):
        return str(key)
    return str(_number(key)) if isinstance(key, int | float) else f"<{type_name(key)}>"
