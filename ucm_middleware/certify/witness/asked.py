"""Which request is being answered, for whatever is logged meanwhile."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ucm_middleware.certify.witness.wire import NUMBER


@dataclass(slots=True)
class Asked:
    """A request, for as long as it is answered: what its variables outlive it in belongs to nobody."""

    number: int | None


class Marker:
    """An ASGI middleware that says which request it is. The application is called in the variables it is called in
    without it, but for this one. ``at_first`` is called before the first request, when the application is up.
    """

    def __init__(self, app: ASGIApp, variable: ContextVar[Asked | None], at_first: Callable[[], None]) -> None:
        self.app = app
        self._variable = variable
        self._at_first: Callable[[], None] | None = at_first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self._at_first is not None:
            at_first, self._at_first = self._at_first, None
            at_first()
        asked = Asked(_number_of(scope["headers"]))
        self._variable.set(asked)
        try:
            await self.app(scope, receive, send)
        finally:
            asked.number = None


def _number_of(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    name = NUMBER.encode()
    found = next((value for key, value in headers if key == name), b"")
    return int(found) if found.isdigit() else None
