"""An app in which a handle of one user's gets into everybody's hands: a module global, a thread, a stream."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from promise_journal import Door, Journal

from ucm_middleware import UserContextError, UserContextManager, UserContextMiddleware, bearer_token, revoke_handle
from ucm_middleware.fastapi import CurrentContext

journal = Journal()
manager = UserContextManager()
app = FastAPI()


class Mailbox:
    """What an adapter would give out."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.letters = sqlite3.connect(":memory:", check_same_thread=False)
        self.letters.execute("create table letters (body text)")
        self.letters.execute("insert into letters values (?)", (f"to {user}",))

    def read(self) -> Any:
        journal.note("reached", user=self.user)
        return self.letters.execute("select body from letters").fetchone()[0]

    async def aread(self) -> Any:
        return self.read()

    async def stream(self) -> AsyncIterator[Any]:
        while True:
            yield self.read()

    def close(self) -> None:
        self.letters.close()


stashed: dict[str, Any] = {}


@app.get("/hold")
async def hold(context: CurrentContext) -> Any:
    """Own a mailbox, leave all that leads to it where others find it, and stay until the test says so."""
    mailbox = context.own(context.closing(Mailbox(context.user_id)))
    stashed.update(handle=mailbox, method=mailbox.read, coroutine=mailbox.aread(), stream=mailbox.stream())
    journal.note("held", user=context.user_id)
    await journal.gate("let go").passed()
    stashed["coroutine"].close()
    return mailbox.read()


@app.get("/use/{what}")
async def use(what: str) -> Any:
    """Nothing here catches what the product raises."""
    if what == "handle":
        return stashed["handle"].read()
    if what == "method":
        return stashed["method"]()
    if what == "coroutine":
        return await stashed["coroutine"]
    if what == "revoke":
        return revoke_handle(stashed["handle"])
    return await anext(stashed["stream"])


@app.get("/use-in-thread")
def use_in_thread() -> Any:
    return stashed["handle"].read()


@app.get("/own")
async def own(context: CurrentContext) -> Any:
    """What a sync tool does: in a thread of the pool, with and without the context."""
    mailbox = context.own(context.closing(Mailbox(context.user_id)))
    loop = asyncio.get_running_loop()
    return [
        await asyncio.to_thread(mailbox.read),
        await loop.run_in_executor(None, mailbox.read),
        await mailbox.aread(),
        await anext(mailbox.stream()),
    ]


@app.get("/outlive")
async def outlive(context: CurrentContext, background: BackgroundTasks) -> str:
    """Start a tool in a thread that goes on when the request has ended."""
    mailbox = context.own(context.closing(Mailbox(context.user_id)), name="mailbox")
    started = threading.Event()

    def tool() -> None:
        journal.note("during", answer=mailbox.read())
        started.set()
        journal.gate("later").passed_in_thread()
        try:
            mailbox.read()
        except UserContextError as error:
            journal.note("after", kind=type(error).__name__, text=str(error))

    threading.Thread(target=tool, daemon=True).start()
    await asyncio.to_thread(started.wait)
    return context.request_id


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app.add_middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify))
app.add_middleware(Door, manager=manager, journal=journal)
