"""What the app of each framework does, in the framework's words."""

import asyncio
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from starlette.requests import HTTPConnection

from ucm_middleware import UserContextManager, UserContextMiddleware, current_context
from ucm_middleware.types import AnyASGIApp

manager = UserContextManager()
ended: dict[str, list[str]] = {}
"""By user, what has happened to requests that were cut off, in order."""

_left: ContextVar[str | None] = ContextVar("left", default=None)


def served(app: AnyASGIApp) -> UserContextMiddleware:
    """The app with the middleware around it. The header names the user, as a test may do."""
    return UserContextMiddleware(app, manager=manager, identify=_user_of, ttl=2.0)


def _user_of(connection: HTTPConnection) -> str | None:
    return connection.headers.get("user")


def user() -> str:
    """Who this runs as, and what is left of who ran before."""
    user_id = current_context().user_id
    assert user_id is not None
    return user_id


async def whoami() -> dict[str, Any]:
    """Who is seen in the handler, a thread and a task of it; and whom an earlier request has left."""
    left = _left.get()
    _left.set(user())
    return {
        "handler": user(),
        "thread": await asyncio.to_thread(user),
        "task": await asyncio.create_task(_user()),
        "left": left,
    }


async def _user() -> str:
    return user()


async def late(user_id: str) -> dict[str, Any]:
    """The identity is found out in the handler."""
    current_context().bind(user_id)
    return {"handler": user()}


def denied() -> dict[str, Any]:
    """Ask for somebody else's context."""
    manager.get_context("bob")
    return {}


async def wait() -> dict[str, Any]:
    """Until it is cut off."""
    happened = ended.setdefault(user(), [])
    current_context().callback(happened.append, "released")
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        happened.append("ended")
    return {}


async def ticks() -> AsyncGenerator[bytes]:
    """The same as a stream."""
    happened = ended.setdefault(user(), [])
    current_context().callback(happened.append, "released")
    try:
        while True:
            yield b"tick\n"
            await asyncio.sleep(0.01)
    finally:
        happened.append("ended")


def said(text: str) -> dict[str, Any]:
    """The answer to a message."""
    return {"handler": user(), "said": text}
