"""The ASGI shapes, as the specification names them."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

AnyASGIApp = Callable[..., Awaitable[None]]
"""An application of whichever framework: each has types of its own for the three arguments."""
