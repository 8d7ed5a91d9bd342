"""An app whose handlers are cut off in the middle of what a cancellation does not end: a thread, a deaf task, a group.

With GRACE in the environment, handlers get so many seconds to end.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import mock

from fastapi import FastAPI, Request, Response, WebSocket
from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import (
    UserContextError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import AuthenticatedContext

if "GRACE" in os.environ:
    mock.patch("ucm_middleware.teardown.HANDLER_GRACE", float(os.environ["GRACE"])).start()

journal = Journal()
manager = UserContextManager()
app = FastAPI()


working: dict[str, UserExecutionContext] = {}
"""The context of the request of each user that is under way."""


def begin(context: UserExecutionContext) -> None:
    working[context.user_id] = context
    journal.note("working", user=context.user_id)


class Connection:
    lent_to = "nobody"


@contextmanager
def lent(connection: Connection, user: str) -> Iterator[Connection]:
    connection.lent_to = user
    try:
        yield connection
    finally:
        connection.lent_to = "nobody"
        journal.note("released", user=user)


def outcome(use: Callable[[], object]) -> str:
    try:
        use()
    except UserContextError as error:
        return type(error).__name__
    return "nothing was raised"


@app.get("/thread")
def thread(context: AuthenticatedContext) -> str:
    connection = context.enter_context(lent(Connection(), context.user_id))
    handle = context.own(connection)
    begin(context)
    journal.gate("query").passed_in_thread()
    journal.note("use", name="a handle", outcome=outcome(lambda: handle.lent_to))
    journal.note("query", lent_to=connection.lent_to)
    return "done"


@app.get("/deaf")
async def deaf(context: AuthenticatedContext) -> str:
    async def release() -> None:
        journal.note("releasing")
        await journal.gate("release").passed()

    context.callback(release)
    begin(context)
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await journal.gate("go on").passed()
    for name, use in (
        ("current context", current_context),
        ("data", lambda: context.agent_context),
        ("a new context", lambda: manager.create_isolated_context(context.user_id)),
    ):
        journal.note("use", name=name, outcome=outcome(use))
    return "done"


async def fail_in_a_group() -> None:
    """The group has nothing to do any more but to wait when its task fails; before Python 3.13 it leaves a mark."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
    except* LookupError:
        pass


@app.get("/caught")
async def caught(context: AuthenticatedContext) -> None:
    await fail_in_a_group()
    begin(context)
    await asyncio.Event().wait()


@app.websocket("/caught")
async def caught_on_a_connection(websocket: WebSocket, context: AuthenticatedContext) -> None:
    await websocket.accept()
    await fail_in_a_group()
    begin(context)
    await websocket.receive_text()


def sign_out() -> int:
    return manager.revoke(current_context().user_id, "signed out")


@app.post("/sign-out/thread")
def sign_out_in_a_thread(context: AuthenticatedContext) -> int:
    return sign_out()


async def sign_out_here(request: Request) -> Response:
    return JSONResponse(sign_out())


@app.post("/sign-out/task")
async def sign_out_in_a_task(context: AuthenticatedContext) -> int:
    async def work() -> int:
        return sign_out()

    async with asyncio.TaskGroup() as group:
        signing_out = group.create_task(work())
    return signing_out.result()


class PassingOn(BaseHTTPMiddleware):
    """Runs the endpoint in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


below = Starlette(routes=[Route("/sign-out", sign_out_here, methods=["POST"])], middleware=[Middleware(PassingOn)])
app.mount("/base-middleware", below)


@app.websocket("/sign-out")
async def sign_out_on_a_connection(websocket: WebSocket, context: AuthenticatedContext) -> None:
    await websocket.accept()
    await asyncio.to_thread(sign_out)
    await websocket.send_text("still there")


@app.websocket("/sign-out/task")
async def sign_out_beside_a_connection(websocket: WebSocket, context: AuthenticatedContext) -> None:
    async def work() -> None:
        sign_out()

    await websocket.accept()
    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        await websocket.receive_text()


@app.post("/drain")
async def drain(context: AuthenticatedContext, timeout: float) -> int:
    return await manager.drain(timeout)


async def close(request: Request) -> Response:
    """As the sweeper, a revocation and a drain do it."""
    working[request.path_params["user"]].close(request.path_params["reason"])
    return JSONResponse(None)


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app.add_middleware(
    UserContextMiddleware,
    manager=manager,
    identify=bearer_token(verify),
    cancel_on_disconnect=True,
)
door = [Route("/door/close/{user}/{reason}", close, methods=["POST"])]
app.add_middleware(Door, manager=manager, journal=journal, routes=door)
