"""Where in a text something stands: the path in JSON, else the member or the name before it."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from ucm_middleware.audit.redaction import text_for_record

_MEMBER: Final = re.compile(rb'"([^"\\]{1,64})"\s*:')
_MOST: Final = 262_144
_DEEPEST: Final = 32


class Fields:
    """The fields of one text, which is read as JSON once."""

    __slots__ = ("_data", "_document")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._document: Any = None
        if data[:64].lstrip()[:1] in (b"{", b"[", b'"') and len(data) <= _MOST:
            with suppress(ValueError, RecursionError):  # cut off, or of several documents
                self._document = json.loads(data)

    def at(self, start: int, end: int) -> str:
        """``$.items[0].token`` where the text is JSON, else the last member's name before it, else "text"."""
        run = self._data[start:end].decode("ascii")
        found = next(_paths(self._document, "$", run, 0), None)
        if found is not None:
            return text_for_record(found)
        names = _MEMBER.findall(self._data[max(0, start - 512) : start])
        name = names[-1].decode(errors="replace") if names else "text"
        return "text" if run in name else text_for_record(name)


def _paths(value: Any, path: str, run: str, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        if run in value:
            yield path
    elif depth < _DEEPEST and isinstance(value, dict):
        for name, item in cast("dict[str, Any]", value).items():
            if run in name:  # a name that is the value itself must not be shown
                yield f"{path}.<name>"
            else:
                yield from _paths(item, f"{path}.{name}", run, depth + 1)
    elif depth < _DEEPEST and isinstance(value, list):
        for index, item in enumerate(cast("Sequence[Any]", value)):
            yield from _paths(item, f"{path}[{index}]", run, depth + 1)
