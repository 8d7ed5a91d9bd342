"""Django's ASGI application, and what ``UserContextMiddleware`` around it needs of it.

Django's own refuses the lifespan, by which a server announces that it shuts down, so that open requests end first. And
when a request is cut off, it waits for its thread, which may wait for the database: the statement is cancelled there.
Django serves a request in tasks of its own, to which nobody tells that it is cut off: they are ended here.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

import django
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.db import connections

from ucm_django.running import Running, running_of
from ucm_middleware.types import ASGIApp, Message, Receive, Send
from ucm_middleware.waiting import uncancelled

_EXCHANGE: Final = "ucm_django.exchange"
"""Where in the scope the exchange stands."""


class _Exchange:
    """The tasks that Django serves one request in: one listens to the client, one runs the view and answers."""

    __slots__ = ("_is_cut_off", "_receive", "_tasks")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_cut_off = False

    def receive(self) -> Awaitable[Message]:
        self.join()
        return self._receive()

    def join(self) -> None:
        """The running task is one of them. Raises CancelledError when the request has been cut off before it began."""
        if self._is_cut_off:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)

    async def cut_off(self, running: Running | None) -> None:
        """Cancel the tasks, and the statements that their threads wait for, and wait until the tasks have ended."""
        self._is_cut_off = True
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        ending = asyncio.create_task(_ended(others, running))
        try:
            await uncancelled(ending)  # below BaseHTTPMiddleware a cancellation arrives again and again
        finally:
            ending.result()


async def _ended(tasks: set[asyncio.Task[Any]], running: Running | None) -> None:
    if running is not None:
        await asyncio.to_thread(running.cancel)
    await asyncio.gather(*tasks, return_exceptions=True)


class _Handler(ASGIHandler):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        scope[_EXCHANGE] = exchange = _Exchange(receive)
        try:
            await super().handle(scope, exchange.receive, send)
        except asyncio.CancelledError:
            context = scope.get("state", {}).get("user_context")
            await exchange.cut_off(None if context is None else running_of(context))
            raise

    async def run_get_response(self, request: Any) -> Any:
        request.scope[_EXCHANGE].join()
        return await super().run_get_response(request)


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
