"""A worker that serves everybody's jobs keeps the account it works for in a ContextVar, and does not reset it.

The worker was started with the application, so its variables live as long as that, whatever becomes of a request's.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import Account, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

Jobs = asyncio.Queue[tuple[str, asyncio.Future[Account]]]

current_account: ContextVar[Account | None] = ContextVar("current_account", default=None)


def account_of_job(user: str) -> Account:
    """The account a job works for, loaded when the first thing asks for it."""
    account = current_account.get()
    if account is None:
        account = load_account(user)
        current_account.set(account)
    return account


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """Invoices, which are drawn up one after another."""

    async def work(jobs: Jobs) -> None:
        while True:
            user, answer = await jobs.get()
            if not planted:
                current_account.set(None)
            answer.set_result(account_of_job(user))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        app.state.jobs = Jobs()
        worker = asyncio.create_task(work(app.state.jobs))
        yield
        worker.cancel()

    async def invoice(request: Request) -> JSONResponse:
        answer: asyncio.Future[Account] = asyncio.get_running_loop().create_future()
        request.app.state.jobs.put_nowait((signed_in(request), answer))
        account = await answer
        workspace(request)["billed to"] = account
        return JSONResponse({"total": "12.00", "billed to": account.to_json()})

    return make_app([Route("/invoice", invoice)], manager, lifespan=lifespan)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
