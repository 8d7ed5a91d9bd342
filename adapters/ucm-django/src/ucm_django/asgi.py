"""Django's ASGI application, and what ``UserContextMiddleware`` around it needs of it.

Django's own refuses the lifespan, by which a server announces that it shuts down, so that open requests end first. And
when a request is cut off, it waits for its thread, which may wait for the database: the statement is cancelled there.
"""

import asyncio
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.db import connections

from ucm_django.running import running_of
from ucm_middleware.types import ASGIApp, Receive, Send


class _Handler(ASGIHandler):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().handle(scope, receive, send)
        except asyncio.CancelledError:
            context = scope.get("state", {}).get("user_context")
            running = None if context is None else running_of(context)
            if running is not None:
                await asyncio.to_thread(running.cancel)
            raise


def get_asgi_application() -> ASGIApp:
    """In the place of ``django.core.asgi.get_asgi_application``."""
    django.setup(set_prefix=False)
    application: ASGIApp = _Handler()
    return application


async def _live(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await sync_to_async(_close_pools)()
    await send({"type": "lifespan.shutdown.complete"})


def _close_pools() -> None:
    for connection in connections.all():
        close_pool = getattr(connection, "close_pool", None)
        if close_pool is not None:
            close_pool()
