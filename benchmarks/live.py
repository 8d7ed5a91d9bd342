"""Holds many requests, connections or contexts open at once, for the benchmarks that look at them meanwhile."""

# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count, islice
from typing import Final

from starlette.requests import HTTPConnection

from benchmarks.drive import Conversation, Exchange, http_scope, websocket_scope
from benchmarks.rows import BARE, EVERYTHING, FLOOR, ROWS, Wrap, raw_app
from ucm_middleware import UserContextManager, UserContextMiddleware
from ucm_middleware.audit import Row, Trail
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send
from ucm_middleware.websocket.asgi import AsgiConnection
from ucm_middleware.websocket.limits import MessageLimits

Hold = Callable[[int], AbstractAsyncContextManager[None]]
"""``async with hold(number):`` so many are live in the block."""

TTL: Final = 3600.0
MOST: Final = 10_000_000
LIMITS: Final = MessageLimits()


class _NoLedger:
    """Keeps nothing: a ledger is bounded as a whole, and would blur what is held for each context."""

    def append(self, row: Row) -> None:
        pass

    def trail(self, user_id: str | None) -> Trail | None:
        return None

    def knows(self, user_id: str) -> bool:
        return True


def manager_of_many() -> UserContextManager:
    """For any number of contexts, none of which goes on record."""
    return UserContextManager(
        max_contexts=MOST,
        max_anonymous_contexts=MOST,
        max_contexts_per_user=MOST,
        max_connections_per_user=MOST,
        ttl=TTL,
        ledger=_NoLedger(),
    )


def _many_users(app: ASGIApp) -> ASGIApp:
    """Everything on, each request another user's."""
    numbers = count()

    def identify(connection: HTTPConnection) -> str:
        return f"user-{next(numbers):09}"

    return UserContextMiddleware(app, manager=manager_of_many(), identify=identify)


WRAPS: Final[dict[str, Wrap]] = {**{name: ROWS[name] for name in (BARE, FLOOR, "firewall")}, EVERYTHING: _many_users}
"""The rows, with everything on for as many users as there are requests."""


def through(wrap: Wrap, *, websocket: bool = False) -> Hold:
    """Requests or connections that have come through the wrap and wait in the app, each in a task of its own."""
    go = asyncio.Event()
    arrived = 0

    async def waiting_app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal arrived
        arrived += 1
        await go.wait()
        await raw_app(scope, receive, send)

    app = wrap(waiting_app)

    def start() -> asyncio.Task[None]:
        peer = Conversation(0) if websocket else Exchange()
        scope = websocket_scope() if websocket else http_scope()
        return asyncio.ensure_future(_serve(app, scope, peer))

    @asynccontextmanager
    async def hold(number: int) -> AsyncGenerator[None]:
        already = arrived
        tasks = [start() for _ in range(number)]
        await asyncio.sleep(0)
        try:
            if arrived - already != number:
                raise RuntimeError(f"{arrived - already} of {number} requests reached the app; nothing was measured")
            yield
        finally:
            go.set()
            await asyncio.gather(*tasks)
            go.clear()

    return hold


async def _serve(app: ASGIApp, scope: Scope, peer: Exchange | Conversation) -> None:
    await app(scope, peer.receive, peer.send)


def made_by_hand() -> Hold:
    """Contexts from ``create_isolated_context``, which the manager alone holds."""
    manager = manager_of_many()
    return _held_by(manager, manager.create_isolated_context)


def opened_for_connections() -> Hold:
    """Contexts as the middleware opens them, without the requests, which nothing public gives."""
    manager = manager_of_many()
    return _held_by(manager, lambda user_id: manager._open_for_connection(user_id, TTL, None, False))


def accepted_for_events() -> Hold:
    """WebSockets that were accepted and wait, each another user's: their contexts, and all that sends them events.
    Not what any app and server hold besides: a scope, a task, a transport.
    """
    manager = manager_of_many()
    users = _users()

    @asynccontextmanager
    async def hold(number: int) -> AsyncGenerator[None]:
        held = [await accepted(manager, user_id) for user_id in islice(users, number)]
        yield
        manager.cleanup_all_contexts()
        del held

    return hold


async def accepted(manager: UserContextManager, user_id: str) -> tuple[Receive, Send]:
    """A WebSocket of a user as the middleware opens it, whose server takes all and does nothing with it."""
    context = manager._open_for_connection(user_id, TTL, None, True)
    connection = AsgiConnection(context, manager._hub, LIMITS, _no_message, _take, b"", per_message=False)
    await connection.send({"type": "websocket.accept"})
    return connection.receive, connection.send


async def _no_message() -> Message:
    raise RuntimeError("nobody reads here")


async def _take(message: Message) -> None: ...


def _users() -> Iterator[str]:
    """Ids, which are the app's own, and not weighed."""
    return iter([f"user-{number:09}" for number in range(1_000_000)])


def _held_by(manager: UserContextManager, open_one: Callable[[str], object]) -> Hold:
    next_user = _users()

    @asynccontextmanager
    async def hold(number: int) -> AsyncGenerator[None]:
        for _ in range(number):
            open_one(next(next_user))
        yield
        manager.cleanup_all_contexts()

    return hold
