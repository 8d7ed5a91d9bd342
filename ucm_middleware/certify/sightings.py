"""What a run is after: a canary of one user where another sees it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from ucm_middleware.certify.canaries import Canaries, Canary
from ucm_middleware.certify.plain import is_list, is_object

Channel = Literal["body", "header", "event", "log", "span", "setting"]
"""Where it was: in an answer's body or header, a WebSocket's message, a log record or a span made while the other's
request was answered, or a setting of the database connection that it was answered with.
"""

_DEEPEST: Final = 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the application: a channel, the route that the viewer used, and the place in what it sent.

    ``detail`` is a path into JSON such as ``$[].api_key``, a header's name, a logger's, a span's or a setting's.
    """

    channel: Channel
    route: str
    detail: str = ""

    @property
    def near(self) -> tuple[Channel, str]:
        """The same but for the detail: what is taken for the same when steps are taken again."""
        return self.channel, self.route

    def __str__(self) -> str:
        return f"{self.channel} of {self.route}{f' at {self.detail}' if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class Sighting:
    """``owner``'s canary was seen by ``viewer`` in the answer to the request ``number``; ``source`` is the number of
    the request that had brought it in, or None for a secret that the application had from the start.
    """

    place: Place
    viewer: str
    owner: str
    number: int
    source: int | None


class Examiner:
    """Looks for canaries in what users are sent. ``public`` are routes on which everybody may see everything."""

    __slots__ = ("_canaries", "_public")

    def __init__(self, canaries: Canaries, public: Iterable[str]) -> None:
        self._canaries = canaries
        self._public = frozenset(public)

    def in_answer(
        self, viewer: str, route: str, number: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> Iterator[Sighting]:
        """In what a user was answered."""
        for name, value in headers:
            yield from self._in(value, "header", viewer, route, number, _always(name.decode("latin-1").lower()))
        yield from self._in(body, "body", viewer, route, number, partial(self._path, body))

    def in_message(self, viewer: str, route: str, number: int, data: bytes) -> Iterator[Sighting]:
        """In a message of a user's WebSocket, which the step ``number`` opened."""
        return self._in(data, "event", viewer, route, number, partial(self._path, data))

    def in_text(
        self, channel: Channel, viewer: str, route: str, number: int, where: str, text: str
    ) -> Iterator[Sighting]:
        """In a log record, a span or a setting."""
        return self._in(text.encode(errors="replace"), channel, viewer, route, number, _always(where))

    @property
    def users(self) -> tuple[str, ...]:
        """The names of all."""
        return self._canaries.users

    def is_private(self, route: str) -> bool:
        """Whether something is found on it at all."""
        return route not in self._public

    def own(self, viewer: str, data: bytes) -> bool:
        """Whether something of the user's own is in it."""
        return any(canary.owner == viewer for canary in self._canaries.all_in(data))

    def _in(
        self, data: bytes, channel: Channel, viewer: str, route: str, number: int, detail: Callable[[Canary], str]
    ) -> Iterator[Sighting]:
        if route in self._public:
            return
        for canary in self._canaries.of_others(data, viewer):
            yield Sighting(Place(channel, route, detail(canary)), viewer, canary.owner, number, canary.number)

    def _path(self, data: bytes, canary: Canary) -> str:
        """Where in JSON it stands, with empty brackets for any place in a list; nothing where it is no JSON."""
        try:
            return next(self._paths(json.loads(data), "$", canary, _DEEPEST), "")
        except (ValueError, RecursionError):
            return ""

    def _paths(self, value: Any, path: str, canary: Canary, depth: int) -> Iterator[str]:
        if isinstance(value, str):
            if canary in self._canaries.all_in(value.encode(errors="replace")):
                yield path
        elif depth and is_list(value):
            for one in value:
                yield from self._paths(one, f"{path}[]", canary, depth - 1)
        elif depth and is_object(value):
            for name, one in value.items():
                # A key may be a canary itself, or an id: it is not shown then.
                if canary in self._canaries.all_in(name.encode(errors="replace")):
                    yield f"{path}.*"
                yield from self._paths(
                    one, f"{path}.{name}" if name.isidentifier() else f"{path}[*]", canary, depth - 1
                )


def _always(detail: str) -> Callable[[Canary], str]:
    return lambda _: detail
