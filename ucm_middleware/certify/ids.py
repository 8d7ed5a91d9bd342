"""Ids that users were told of things of theirs, to be asked for again: by themselves, and by others."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.plain import is_list, is_object
from ucm_middleware.certify.schema import Route
from ucm_middleware.certify.sowing import is_id

_KEPT: Final = 8
"""Of each user and collection, the newest."""

_LOOKED_AT: Final = 20
"""Objects of one list."""

_LONGEST: Final = 128
"""Characters of an id; what is longer is no id, or none that fits into a path."""


class Ids:
    """By user, and by collection: the path up to the first parameter."""

    __slots__ = ("_canaries", "_kept", "_wanted")

    def __init__(self, routes: Iterable[Route], canaries: Canaries) -> None:
        self._canaries = canaries
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

    @property
    def is_empty(self) -> bool:
        """Whether nobody was told one that others can ask by."""
        return not any(self._is_plain(one) for kept in self._kept.values() for one in kept)

    def of(self, user: str, route: Route, choice: int, asker: str) -> str | None:
        """One that the user was told, for ``asker`` to ask by, or None.

        Nobody asks by what another's canary is in, as in ids that clients choose: an answer may say what it was asked.
        """
        kept = [one for one in self._kept.get((user, route.collection), ()) if self._may_ask(asker, one)]
        return kept[choice % len(kept)] if kept else None

    def _may_ask(self, asker: str, found: str) -> bool:
        return not any(self._canaries.of_others(found.encode(), asker))

    def _is_plain(self, found: str) -> bool:
        return not any(self._canaries.all_in(found.encode()))


def _ids_in(value: Any) -> Iterator[str]:
    """Of an object, of the objects in a list, and of those in the lists that an object has, as ``items``."""
    lists = [value] if is_list(value) else []
    if is_object(value):
        lists = [[value], *(one for one in value.values() if is_list(one))]
    for one in (one for each in lists for one in each[:_LOOKED_AT] if is_object(one)):
        for name, found in one.items():
            if is_id(name) and isinstance(found, str | int) and not isinstance(found, bool):
                text = str(found)
                if len(text) <= _LONGEST and text.isascii() and text.replace("-", "").replace("_", "").isalnum():
                    yield text
