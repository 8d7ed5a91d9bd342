"""An app that learns who its user is on the way: from a dependency, from a message, or too late.

The header `login` says who logs in, or a message. That the app believes it is its own business.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, WebSocket
from promise_journal import Door, Journal
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import HTTPConnection

from ucm_middleware import (
    IdentityConflictError,
    Principal,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import AuthenticatedContext, CurrentContext

journal = Journal()
manager = UserContextManager()
app = FastAPI()
handles: dict[str, UserExecutionContext] = {}


def principal(said: str) -> Principal | str:
    """`alice`, or `alice for 5`: the credentials hold for so many seconds."""
    user, _, seconds = said.partition(" for ")
    return Principal(user, datetime.now(UTC) + timedelta(seconds=float(seconds))) if seconds else user


def login(connection: HTTPConnection, context: CurrentContext) -> None:
    """A sync dependency: it runs in the thread pool."""
    context.bind(principal(connection.headers["login"]))


async def login_async(connection: HTTPConnection, context: CurrentContext) -> None:
    context.bind(principal(connection.headers["login"]))


class Early(BaseHTTPMiddleware):
    """Holds the context from before the identity is known, and has a task that does."""

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        context: UserExecutionContext = request.state.user_context
        before, bound = context.user_id, asyncio.Event()
        task = asyncio.create_task(self._look_later(bound))
        response = await call_next(request)
        bound.set()
        journal.note("early", before=before, after=context.user_id, in_task=await task)
        return response

    async def _look_later(self, bound: asyncio.Event) -> str:
        await bound.wait()
        return current_context().user_id


def shown(context: UserExecutionContext) -> dict[str, Any]:
    (live,) = manager.get_active_contexts().values()
    return {
        "user": context.user_id,
        "request_id": context.request_id,
        "listed": live["user_id"],
        "current": current_context().user_id,
        "anonymous": context.is_anonymous,
        "seconds": live["expires_in_seconds"],
    }


@app.get("/sync", dependencies=[Depends(login)])
def after_sync_login(context: CurrentContext) -> dict[str, Any]:
    return shown(context)


@app.get("/async", dependencies=[Depends(login_async)])
async def after_async_login(context: CurrentContext) -> dict[str, Any]:
    return shown(context)


@app.get("/twice", dependencies=[Depends(login), Depends(login_async)])
async def after_two_logins(context: AuthenticatedContext) -> dict[str, Any]:
    return shown(context)


@app.get("/anonymous")
async def anonymous(context: CurrentContext) -> dict[str, Any]:
    return shown(context)


@app.get("/private")
async def private(context: AuthenticatedContext) -> str:
    return context.user_id


@app.get("/private-after-login", dependencies=[Depends(login)])
async def private_after_login(context: AuthenticatedContext) -> str:
    return context.user_id


@app.get("/second")
async def second(then: str, context: CurrentContext, _: Annotated[None, Depends(login)]) -> None:
    """Bind a second identity."""
    try:
        context.bind(then)
    finally:
        journal.note("after the second", user=context.user_id)


USES: dict[str, Callable[[UserExecutionContext], object]] = {
    "resource": lambda context: context.enter_context(nullcontext()),
    "callback": lambda context: context.callback(journal.note, "called"),
    "child": lambda context: context.create_child_context("part of the work"),
}


@app.get("/too-late")
async def too_late(use: str, connection: Request, context: CurrentContext) -> None:
    """Use the context as an anonymous one, then log in."""
    USES[use](context)
    try:
        login(connection, context)
    finally:
        journal.note("after", anonymous=context.is_anonymous)


@app.get("/race")
async def race(context: CurrentContext) -> dict[str, Any]:
    """Two threads bind two users at the same moment."""
    barrier = threading.Barrier(2)

    def bind(user: str) -> str:
        barrier.wait()
        try:
            context.bind(user)
        except IdentityConflictError:
            return "refused"
        return user

    outcomes = await asyncio.gather(asyncio.to_thread(bind, "alice"), asyncio.to_thread(bind, "bob"))
    return {"outcomes": sorted(outcomes), **shown(context)}


@app.get("/hold")
async def hold(context: CurrentContext) -> str:
    handles["visitor"] = context
    journal.note("held", user=context.user_id)
    await journal.gate("let go").passed()
    return context.user_id


@app.get("/bind-another")
async def bind_another(user: str) -> None:
    """Give a stranger's context a user."""
    handles["visitor"].bind(user)


@app.websocket("/ws")
async def connection(websocket: WebSocket, context: CurrentContext) -> None:
    await websocket.accept()
    async for said in websocket.iter_text():
        context.bind(principal(said))
        await websocket.send_json(shown(context))


@app.websocket("/ws-login")
async def login_before_accept(websocket: WebSocket, _: Annotated[None, Depends(login)]) -> None:
    await websocket.accept()


@app.websocket("/ws-private")
async def private_websocket(websocket: WebSocket, context: AuthenticatedContext) -> None:
    await websocket.accept()


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app.add_middleware(Early)
app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify))
app.add_middleware(Door, manager=manager, journal=journal)
