"""Where workers share their users: no answer begins under a lease that is lost."""

# pyright: reportPrivateUsage=false

from collections.abc import Awaitable
from typing import Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.types import Message, Send

_BEGINNINGS: Final = frozenset(
    {"http.response.start", "websocket.http.response.start", "websocket.accept", "websocket.send"}
)


class LeasedAnswer:
    """Stands between the app and the server's ``send``, nearest to the server: events pass through it too."""

    __slots__ = ("_context", "_send")

    def __init__(self, context: UserExecutionContext, send: Send) -> None:
        self._context = context
        self._send = send

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on. Raises ContextClosedError, and closes the context, where the lease is lost."""
        if message["type"] in _BEGINNINGS:
            require_lease(self._context)
        return self._send(message)


def require_lease(context: UserExecutionContext) -> None:
    """Raise ContextClosedError, with the context closed, where its lease is lost."""
    lifetime = context._lifetime
    context.close_if_lost()
    if lifetime.reason == "lost":
        raise context._closed_error()
