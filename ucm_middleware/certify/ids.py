"""Ids that users were told of things of theirs, to be asked for again: by themselves, and by others."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from ucm_middleware.certify.plain import is_list, is_object
from ucm_middleware.certify.schema import Route

_KEPT: Final = 8
"""Of each user and collection, the newest."""

_LOOKED_AT: Final = 20
"""Objects of one answer."""


class Ids:
    """By user, and by collection: the path up to the first parameter."""

    __slots__ = ("_kept", "_wanted")

    def __init__(self, routes: Iterable[Route]) -> None:
        self._wanted = frozenset(route.collection for route in routes if route.takes_id)
        self._kept: dict[tuple[str, str], deque[str]] = {}

    def keep(self, user: str, route: Route, body: bytes) -> None:
        """Keep what an answer calls an id, where some route takes one."""
        if route.collection not in self._wanted:
            return
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return
        kept = self._kept.setdefault((user, route.collection), deque(maxlen=_KEPT))
        for found in _ids_in(value):
            if found not in kept:
                kept.append(found)

    def of(self, user: str, route: Route, choice: int) -> str | None:
        """One that the user was told, or None."""
        kept = self._kept.get((user, route.collection))
        return kept[choice % len(kept)] if kept else None


def _ids_in(value: Any) -> Iterator[str]:
    """Of an object, of the objects in a list, or of those in an object's ``items``."""
    objects = value.get("items", [value]) if is_object(value) else value
    if not is_list(objects):
        return
    for one in filter(is_object, objects[:_LOOKED_AT]):
        for name, found in one.items():
            if (name in ("id", "uuid") or name.endswith("_id")) and isinstance(found, str | int):
                text = str(found)
                if text.isascii() and text.replace("-", "").replace("_", "").isalnum():
                    yield text
