"""A small application with the middleware in it: notes in an SQLite file, settings, an audit desk and sockets.

`Authorization: Bearer <user>` is who asks; `Bearer <user>+<seconds>` has so many seconds left. Needs NOTEBOOK_FILE,
where the notes are kept, and NOTEBOOK_SETTINGS, a settings file.
"""

import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse

from ucm_middleware import (
    EVERYONE,
    IsolatedEnvironment,
    Principal,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
)
from ucm_middleware.fastapi import AuthenticatedContext, CurrentContext


def verify(token: str) -> Principal:
    user_id, _, seconds = token.partition("+")
    expires_at = datetime.now(UTC) + timedelta(seconds=float(seconds)) if seconds else None
    return Principal(user_id, expires_at)


manager = UserContextManager(environment=IsolatedEnvironment(os.environ["NOTEBOOK_SETTINGS"]))
app = FastAPI()
app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify))

open_databases: set[int] = set()

with contextlib.closing(sqlite3.connect(os.environ["NOTEBOOK_FILE"])) as setup:
    setup.execute("create table if not exists notes (owner text not null, text text not null)")


@contextlib.contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    """One transaction, committed when the work ends well."""
    database = sqlite3.connect(os.environ["NOTEBOOK_FILE"], timeout=30, isolation_level=None, check_same_thread=False)
    open_databases.add(id(database))
    try:
        database.execute("begin immediate")
        yield database
        database.execute("commit")
    finally:
        database.close()  # rolls back what was not committed
        open_databases.discard(id(database))


def database_of(context: AuthenticatedContext) -> sqlite3.Connection:
    """The user's own transaction, as long as the context."""
    # Not asynchronous: it waits for its turn to write, and must not do so on the event loop.
    return context.enter_context(transaction(), name="the notes")


Database = Annotated[sqlite3.Connection, Depends(database_of)]


@app.get("/ids")
async def ids(context: CurrentContext) -> dict[str, Any]:
    context.agent_context["seen"] = context.user_id
    return context.to_dict()


@app.get("/ids-from-a-thread")
def ids_from_a_thread(context: CurrentContext) -> dict[str, Any]:
    assert current_context() is context
    return context.to_dict()


@app.get("/children")
async def children(context: AuthenticatedContext) -> list[dict[str, Any]]:
    child = context.create_child_context("outline")
    return [context.to_dict(), child.to_dict(), child.create_child_context("detail").to_dict()]


@app.put("/settings/{name}")
async def set_setting(name: str, value: str, context: CurrentContext) -> dict[str, str | None]:
    context.environment.set(name, value)
    return {"here": context.environment.get(name), "process": os.environ.get(name)}


@app.get("/settings/{name}")
async def get_setting(name: str, context: CurrentContext) -> dict[str, str | None]:
    return {
        "here": context.environment.get(name),
        "process": os.environ.get(name),
        "environment": context.environment.environment.value,
    }


@app.post("/notes")
async def write(text: str, context: AuthenticatedContext, database: Database) -> None:
    database.execute("insert into notes values (?, ?)", (context.user_id, text))
    if text == "a mistake":
        raise LookupError("of the application")


@app.get("/notes")
async def read(context: AuthenticatedContext, database: Database) -> list[str]:
    return [text for (text,) in database.execute("select text from notes where owner = ?", (context.user_id,))]


@app.get("/notes/stream")
async def stream(context: AuthenticatedContext, database: Database) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for (text,) in database.execute("select text from notes where owner = ?", (context.user_id,)):
            yield f"{text}\n"

    return StreamingResponse(lines())


@app.get("/of/{user_id}")
async def reach(user_id: str) -> None:
    manager.get_context(user_id)


@app.get("/teapot")
async def teapot() -> None:
    raise HTTPException(418)


@app.get("/broken-off")
async def broken_off() -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield "one part"
        raise LookupError("in the middle")

    return StreamingResponse(parts())


@app.get("/trail")
async def own_trail(context: AuthenticatedContext, request: Request) -> dict[str, Any] | None:
    context.audit_metadata["ticket"] = request.query_params.get("ticket")
    return manager.get_audit_trail(context.user_id)


@app.get("/audit/{user_id}")
async def audit(user_id: str, reason: str) -> dict[str, Any] | None:
    with manager.privileged(reason=reason, users=[user_id]):
        return manager.get_audit_trail(user_id)


@app.get("/operator")
async def operator(context: CurrentContext) -> dict[str, Any]:
    with manager.privileged(reason="monitoring", users=EVERYONE):
        others = [
            shown for shown in manager.get_active_contexts().values() if shown["request_id"] != context.request_id
        ]
        return {"live": others, "isolated": manager.validate_isolation(), "databases": len(open_databases)}


@app.websocket("/socket")
async def socket(websocket: WebSocket, context: AuthenticatedContext) -> None:
    await websocket.accept()
    await websocket.send_json(context.to_dict())
    count = context.agent_context.setdefault("messages", [])
    async for text in websocket.iter_text():
        if text == "a mistake":
            raise LookupError("of the application")
        if text.startswith("reach "):
            manager.get_context(text.removeprefix("reach "))
        count.append(text)
        await websocket.send_json({"user": current_context().user_id, "messages": count})


@app.websocket("/login")
async def login(websocket: WebSocket, context: CurrentContext) -> None:
    await websocket.accept()
    async for user_id in websocket.iter_text():
        context.bind(user_id)
        await websocket.send_json(shown(context))


def shown(context: UserExecutionContext) -> dict[str, Any]:
    return {"user_id": context.user_id, "request_id": context.request_id}
