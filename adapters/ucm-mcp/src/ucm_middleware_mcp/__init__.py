"""MCP servers whose calls run as their caller: an adapter of ucm-middleware."""

from ucm_middleware_mcp.bus import UserSubscriptionBus
from ucm_middleware_mcp.events import UserEventStore
from ucm_middleware_mcp.plugin import MCP, USER_VARIABLE

__all__ = ["MCP", "USER_VARIABLE", "UserEventStore", "UserSubscriptionBus"]
