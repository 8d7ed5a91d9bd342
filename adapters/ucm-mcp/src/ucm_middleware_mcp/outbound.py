"""What a server sends to a client by itself: requests and notifications, for the session's own user only."""

from collections.abc import Mapping
from typing import Any

from mcp.shared.dispatcher import CallOptions, Outbound

from ucm_middleware.host import ContextHost


class OwnedChannel:
    """A way to one session's client. Code of another user's that got hold of it is refused, and that is recorded.

    Everything else of the channel is what it was.
    """

    __slots__ = ("_channel", "_host", "_owner")

    def __init__(self, channel: Outbound, host: ContextHost, owner: str) -> None:
        self._channel = channel
        self._host = host
        self._owner = owner

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        """Ask the client. Raises CrossUserAccessError for code of another user."""
        self._host.require_owner(self._owner, "mcp_send")
        return await self._channel.send_raw_request(method, params, opts)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        """Tell the client. Raises CrossUserAccessError for code of another user."""
        self._host.require_owner(self._owner, "mcp_send")
        await self._channel.notify(method, params, opts)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        """Tell the client how far the call has come. Raises CrossUserAccessError for code of another user."""
        self._host.require_owner(self._owner, "mcp_send")
        await self._channel.progress(progress, total, message)  # type: ignore[attr-defined] # where the SDK calls it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)
