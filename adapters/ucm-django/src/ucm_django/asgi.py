"""Django's ASGI application with a lifespan, which Django's own refuses.

A server announces by it that it shuts down, and then ``UserContextMiddleware`` lets open requests end first.
"""

from typing import Any

from asgiref.sync import sync_to_async
from django.core import asgi
from django.db import connections

from ucm_middleware.types import ASGIApp, Receive, Scope, Send


def get_asgi_application() -> ASGIApp:
    """Django's, with a lifespan that closes the pools of connections in the end."""
    application: Any = asgi.get_asgi_application()

    async def with_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await application(scope, receive, send)
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await sync_to_async(_close_pools)()
        await send({"type": "lifespan.shutdown.complete"})

    return with_lifespan


def _close_pools() -> None:
    for connection in connections.all():
        close_pool = getattr(connection, "close_pool", None)
        if close_pool is not None:
            close_pool()
