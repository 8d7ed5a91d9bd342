"""An app in strict mode on a ledger in PostgreSQL, whose DSN is in the environment."""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import UserContextManager, UserContextMiddleware, current_context
from ucm_postgres.ledger import PostgresLedger

ledger = PostgresLedger(os.environ["LEDGER"], keys=os.environ["KEYS"])
manager = UserContextManager(ledger=ledger, audit="strict", max_contexts_per_user=1000)


async def work(request: Request) -> JSONResponse:
    return JSONResponse([os.getpid(), current_context().request_id])


app = Starlette(
    routes=[Route("/work", work)],
    middleware=[
        Middleware(
            UserContextMiddleware,
            manager=manager,
            identify=lambda connection: connection.headers.get("x-test-user"),
        )
    ],
)
