"""The websockets library: each connection of ``serve`` in a user context of its own."""

from ucm_middleware.websocket.websockets.wrapping import wrap_handler

__all__ = ["wrap_handler"]
