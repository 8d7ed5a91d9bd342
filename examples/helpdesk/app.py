"""A help desk, written the way many applications are written: who is calling is kept in a ContextVar.

That habit is sound in theory, because every request is a task of its own. In practice it leaks: uvicorn can start a
request with the variables that an earlier request on the same keep-alive connection has set (cpython#140947). This
happens to a request that was pipelined behind another, and to every request that comes after a large upload.

The same file runs with the middleware and without: ``HELPDESK_ISOLATION=off`` takes it away, and with it what only a
context can give, a moment at which the request is over and its connection is closed, and the supervisor's pages.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from examples.helpdesk.store import TOKENS, Desk, Note, Ticket, prepare
from examples.helpdesk.supervisor import manager, router
from ucm_middleware import UserContextMiddleware, bearer_token, current_context

DATABASE = os.environ.get("HELPDESK_DATABASE", "helpdesk.sqlite")
ISOLATION = os.environ.get("HELPDESK_ISOLATION", "on") == "on"

current_user: ContextVar[str | None] = ContextVar("current_user", default=None)
current_desk: ContextVar[Desk | None] = ContextVar("current_desk", default=None)


async def sign_in(connection: HTTPConnection) -> None:
    """Note who calls. A request without a token leaves the variable alone: nobody is calling, or so it seems."""
    user = TOKENS.get(connection.headers.get("authorization", "").removeprefix("Bearer "))
    if user is not None:
        current_user.set(user)


def whoami() -> str:
    """The caller, for any code below a handler. Under the middleware ``current_context().user_id`` says the same."""
    user = current_user.get()
    if user is None:
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})
    return user


def my_desk() -> Desk:
    """The caller's database connection: opened at first use, then the same one for the rest of the request."""
    desk = current_desk.get()
    if desk is None:
        desk = Desk(DATABASE, whoami())
        current_desk.set(desk)
        if ISOLATION:
            current_context().closing(desk)  # closed after the last byte, background task or disconnect
    return desk


class NewTicket(BaseModel):
    """``log`` is an attachment: a few lines, or the megabytes that people paste."""

    subject: str
    log: str = ""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Have a database before the first request."""
    prepare(DATABASE)
    yield


app = FastAPI(title="Help desk", lifespan=lifespan, dependencies=[Depends(sign_in)])

if ISOLATION:
    app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(TOKENS.get))
    app.include_router(router)


@app.get("/tickets")
async def list_tickets() -> list[Ticket]:
    """My tickets."""
    return my_desk().tickets()


@app.post("/tickets", status_code=201)
async def create_ticket(new: NewTicket) -> Ticket:
    """File a ticket of mine."""
    return my_desk().add_ticket(new.subject, len(new.log))


@app.get("/tickets/{ticket_id}")
def read_ticket(ticket_id: int) -> Ticket:
    """One ticket of mine. A plain ``def``: FastAPI runs it in a worker thread, where the context is the same."""
    ticket = my_desk().ticket(ticket_id)
    if ticket is None:
        raise HTTPException(404, "you have no such ticket")
    return ticket


@app.post("/tickets/{ticket_id}/remind", status_code=202)
async def remind(ticket_id: int, after_response: BackgroundTasks) -> Ticket:
    """Remind me of a ticket, once the response is out."""
    ticket = read_ticket(ticket_id)

    async def notify() -> None:
        # Asks again who is calling, as code deep in an application does. The response is out, the caller the same.
        my_desk().add_note(f"Reminder for {whoami()}: {ticket.subject}")

    after_response.add_task(notify)
    return ticket


@app.get("/notes")
async def list_notes() -> list[Note]:
    """My notes and reminders."""
    return my_desk().notes()


@app.get("/export")
async def export() -> StreamingResponse:
    """My tickets, one owner and subject a line, as slowly as exports are."""
    desk = my_desk()

    async def lines() -> AsyncIterator[str]:
        for ticket in desk.tickets():
            yield f"{ticket.owner}\t{ticket.subject}\n"
            await asyncio.sleep(0.005)

    return StreamingResponse(lines(), media_type="text/tab-separated-values")


@app.websocket("/chat")
async def chat(socket: WebSocket) -> None:
    """My notes so far, then each new one as it was stored. The context lives as long as the connection."""
    if current_user.get() is None:
        raise WebSocketException(1008, "who are you?")
    await socket.accept()
    desk = my_desk()
    for note in desk.notes():
        await socket.send_json({"owner": note.owner, "text": note.text})
    async for text in socket.iter_text():
        note = desk.add_note(text)
        await socket.send_json({"owner": note.owner, "text": note.text})
