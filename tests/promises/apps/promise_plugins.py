"""An app whose plugin implements every hook, and writes down what it is called for."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, WebSocket
from promise_journal import Door, Journal
from starlette.requests import HTTPConnection

from ucm_middleware import (
    CrossUserAccessError,
    Principal,
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    agent_run,
    current_context,
    hookimpl,
)
from ucm_middleware.fastapi import AuthenticatedContext, CurrentContext
from ucm_middleware.types import Message

journal = Journal()
wrapped_in: ContextVar[tuple[str, ...]] = ContextVar("wrapped_in", default=())


class Session:
    """Stands for a database session."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.user: str | None = None


class Plugin:
    """Knows users by their bearer token, and notes everything."""

    @asynccontextmanager
    async def wrap(self, what: str, context: UserExecutionContext, **details: Any) -> AsyncGenerator[None]:
        journal.note(f"enter {what}", user=context.user_id, **details)
        await asyncio.sleep(0)
        token = wrapped_in.set((*wrapped_in.get(), what))
        try:
            yield
        except BaseException as error:
            journal.note(f"error in {what}", user=context.user_id, error=type(error).__name__, **details)
            raise
        finally:
            wrapped_in.reset(token)
            await asyncio.sleep(0)  # a cancellation must not come in here
            journal.note(f"leave {what}", user=context.user_id, **details)

    @hookimpl
    async def ucm_identify(self, connection: HTTPConnection) -> Principal | None:
        _, _, token = connection.headers.get("authorization", "").partition(" ")
        if not token:
            return None
        await asyncio.sleep(0)
        if not token.startswith("token-of-"):
            raise UnauthenticatedError("an unknown token")
        return Principal(token.removeprefix("token-of-"))

    @hookimpl
    def ucm_derive_key(self, context: UserExecutionContext, kind: str, client_id: str) -> str:
        return f"{context.user_id}/{kind}/{client_id}"

    @hookimpl
    def ucm_around_context(self, context: UserExecutionContext) -> AbstractAsyncContextManager[None]:
        return self.wrap("context", context)

    @hookimpl
    def ucm_around_message(self, context: UserExecutionContext, message: Message) -> AbstractAsyncContextManager[None]:
        if message.get("text") == "forbidden":
            raise UnauthenticatedError("not this")
        return self.wrap("message", context, text=message.get("text"))

    @hookimpl
    def ucm_around_resource(self, context: UserExecutionContext, name: str) -> AbstractAsyncContextManager[None]:
        return self.wrap("resource", context, name=name)

    @hookimpl
    def ucm_around_agent_run(self, context: UserExecutionContext, agent_name: str) -> AbstractAsyncContextManager[None]:
        return self.wrap("run", context, agent=agent_name)

    @hookimpl
    def ucm_bind_session(self, context: UserExecutionContext, session: Session) -> None:
        if session.name == "broken":
            raise RuntimeError("the database does not answer")
        session.user = context.user_id

    @hookimpl
    def ucm_context_opened(self, context: UserExecutionContext) -> None:
        journal.note("opened", user=context.user_id)

    @hookimpl
    def ucm_context_bound(self, context: UserExecutionContext, anonymous_id: str) -> None:
        journal.note("bound", user=context.user_id, before=anonymous_id)

    @hookimpl
    def ucm_context_closed(self, context: UserExecutionContext, reason: str) -> None:
        journal.note("closed", user=context.user_id, reason=reason)
        raise RuntimeError("a notification that fails")

    @hookimpl
    def ucm_access_denied(self, user_id: str | None, action: str) -> None:
        journal.note("denied", user=user_id, action=action)


manager = UserContextManager(plugins=[Plugin()])
app = FastAPI()


@app.get("/who")
async def who(context: CurrentContext) -> dict[str, Any]:
    return {"user": context.user_id, "wrapped_in": wrapped_in.get()}


@app.get("/who-in-a-thread")
def who_in_a_thread(context: AuthenticatedContext) -> dict[str, Any]:
    session = context.bind_session(Session("sync"))
    return {"user": context.user_id, "session": session.user, "wrapped_in": wrapped_in.get()}


@app.get("/login")
async def login(user: str, context: CurrentContext) -> dict[str, Any]:
    context.bind(user)
    return {"user": context.user_id}


@app.get("/work")
async def work(context: AuthenticatedContext) -> dict[str, Any]:
    @asynccontextmanager
    async def database() -> AsyncGenerator[Session]:
        journal.note("connect", user=context.user_id)
        yield Session("pooled")
        journal.note("disconnect", user=context.user_id)

    session = context.bind_session(await context.enter_async_context(database(), name="db"))
    async with agent_run(context, "search", {"query": "x"}) as run:
        in_the_run = {"user": current_context().user_id, "wrapped_in": wrapped_in.get(), "is_run": run.context.is_open}
    return {
        "session": session.user,
        "run": in_the_run,
        "after": wrapped_in.get(),
        "key": context.derive_key("thread", "7"),
    }


@app.get("/broken-session")
async def broken_session(context: AuthenticatedContext) -> None:
    context.bind_session(Session("broken"))


@app.get("/steal")
async def steal(context: AuthenticatedContext) -> None:
    try:
        manager.get_context("bob")
    except CrossUserAccessError:
        journal.note("refused", user=context.user_id)
        raise


@app.get("/hold")
async def hold(context: AuthenticatedContext) -> str:
    journal.note("held", user=context.user_id)
    await journal.gate("let go").passed()
    return context.user_id


@app.websocket("/ws")
async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_json({"text": text, "wrapped_in": wrapped_in.get()})


app.add_middleware(UserContextMiddleware, manager=manager, ttl=60, cancel_on_disconnect=True)
app.add_middleware(Door, manager=manager, journal=journal)
