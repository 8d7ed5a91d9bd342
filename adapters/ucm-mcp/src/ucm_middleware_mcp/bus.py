"""Subscriptions of the protocol of 2026: what a user's code publishes reaches that user's streams."""

import logging
from collections.abc import Callable

import anyio.lowlevel
from mcp.server.subscriptions import ServerEvent

from ucm_middleware import current_context

logger = logging.getLogger(__name__)

Listener = Callable[[ServerEvent], None]


class UserSubscriptionBus:
    """A ``SubscriptionBus`` for ``MCPServer(subscriptions=...)`` and ``ListenHandler``, in this process.

    A stream belongs to the user whose request opened it, and hears what that user's code publishes. What concerns
    everybody goes through ``publish_to_everyone``.
    """

    def __init__(self) -> None:
        self._listeners: dict[object, tuple[str, Listener]] = {}

    async def publish(self, event: ServerEvent) -> None:
        """Tell the streams of the user whom this code runs for.

        Raises ContextNotFoundError in code that runs for nobody, ContextClosedError in code that outlived its context.
        """
        user_id = current_context().user_id
        await self._tell([listener for owner, listener in self._listeners.values() if owner == user_id], event)

    async def publish_to_everyone(self, event: ServerEvent) -> None:
        """Tell all streams that asked for such events: nothing in it may be one user's."""
        await self._tell([listener for _, listener in self._listeners.values()], event)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Listen for the user whom this code runs for. Raises ContextNotFoundError in code that runs for nobody."""
        token = object()
        self._listeners[token] = current_context().user_id, listener

        def unsubscribe() -> None:
            self._listeners.pop(token, None)

        return unsubscribe

    async def _tell(self, listeners: list[Listener], event: ServerEvent) -> None:
        for listener in listeners:
            try:
                listener(event)
            except Exception:  # one stream must not keep an event from the others
                logger.exception("a listener of MCP events failed")
        await anyio.lowlevel.checkpoint()
