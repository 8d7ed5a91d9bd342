"""wrap_handler: one function for both servers of the library."""

from collections.abc import Awaitable, Callable
from typing import Any, Unpack, overload

from websockets.asyncio.server import ServerConnection as AsyncioConnection
from websockets.sync.server import ServerConnection as SyncConnection

from ucm_middleware.callables import is_asynchronous
from ucm_middleware.manager import UserContextManager
from ucm_middleware.websocket.websockets.asyncio_server import AsyncioHandler
from ucm_middleware.websocket.websockets.settings import Settings
from ucm_middleware.websocket.websockets.sync_server import SyncHandler


@overload
def wrap_handler(
    handler: Callable[[AsyncioConnection], Awaitable[None]],
    *,
    manager: UserContextManager,
    **settings: Unpack[Settings],
) -> AsyncioHandler: ...


@overload
def wrap_handler(
    handler: Callable[[SyncConnection], None],
    *,
    manager: UserContextManager,
    **settings: Unpack[Settings],
) -> SyncHandler: ...


def wrap_handler(
    handler: Callable[[Any], Any], *, manager: UserContextManager, **settings: Unpack[Settings]
) -> AsyncioHandler | SyncHandler:
    """The handler for ``serve``, of ``websockets.asyncio.server`` when it is asynchronous, else of
    ``websockets.sync.server``. Give ``serve`` its connections too::

        handler = wrap_handler(chat, manager=manager, identify=bearer_token(users_by_token.get))
        async with serve(handler, "localhost", 8765, create_connection=handler.create_connection) as server: ...

    Each connection is identified in the handshake, before the ``process_request`` of ``serve``, which runs in the
    connection's context as the handler does. Who is refused gets an HTTP status. A handler that is served without its
    connections raises ConfigurationError and serves nobody.

    The settings are those of ``UserContextMiddleware``. ``max_message_size`` holds besides the ``max_size`` of
    ``serve``, whichever is less; the fragments of ``recv_streaming`` are one message. A message of the handler's own is
    not limited.

    When the user is revoked, the context expires, the server drains or the client does not keep up with its events, the
    connection is closed with the code for it. An asynchronous handler is cancelled. A thread cannot be: from then on
    the context refuses its use, and the connection's methods raise; what the context holds is released when the handler
    has returned, or after 5 seconds.

    Of the sync server: ``identify``, and plugins that identify, may be asynchronous but must have nothing to wait for.
    Raises ConfigurationError for plugins that wrap contexts or messages, since they need an event loop.
    """
    kind = AsyncioHandler if is_asynchronous(handler) else SyncHandler
    return kind(handler, manager=manager, **settings)
