"""PostgreSQL shows each user their own rows, and who that is was said with ``SET``, which outlives the transaction.

The connection goes back into the pool with it, and the next who borrows it and says nothing is that user. The database
is the one in ``GALLERY_POSTGRES``, the DSN of a role that may create a table, and no superuser: those see all rows.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, LiteralString

from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.gallery.common import USERS, load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager

Connection = AsyncConnection[DictRow]

TABLE = """
create table if not exists gallery_notes (user_id text primary key, api_key text not null, is_public bool not null);
alter table gallery_notes enable row level security, force row level security;
drop policy if exists own_or_public on gallery_notes;
create policy own_or_public on gallery_notes
    using (is_public or user_id = nullif(current_setting('app.user_id', true), ''));
"""
NOTE = "insert into gallery_notes values (%s, %s, false) on conflict do nothing"


async def set_user(connection: Connection, user: str, scope: LiteralString = "set local") -> None:
    """Tell the database who the user is: to the end of the transaction, or with ``set`` to that of the connection."""
    await connection.execute(sql.SQL(scope + " app.user_id = {}").format(user))


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """Notes, of one's own and for everybody."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        options = {"row_factory": dict_row}
        dsn = os.environ["GALLERY_POSTGRES"]
        # Of one connection, so that the next to borrow gets that of the one before: under load any pool comes to that.
        async with AsyncConnectionPool[Connection](dsn, kwargs=options, min_size=1, open=False) as pool:
            async with pool.connection() as connection:
                await connection.execute(TABLE)
                for user in USERS:
                    await set_user(connection, user)
                    await connection.execute(NOTE, [user, load_account(user).api_key])
            app.state.pool = pool
            yield

    async def answer(request: Request, connection: Connection) -> JSONResponse:
        rows: list[dict[str, Any]] = await (await connection.execute("select * from gallery_notes")).fetchall()
        workspace(request)["notes"] = rows
        return JSONResponse(rows)

    async def notes(request: Request) -> JSONResponse:
        user = signed_in(request)
        async with request.app.state.pool.connection() as connection:
            await set_user(connection, user, "set" if planted else "set local")
            return await answer(request, connection)

    async def notices(request: Request) -> JSONResponse:
        signed_in(request)
        async with request.app.state.pool.connection() as connection:
            return await answer(request, connection)

    return make_app([Route("/notes", notes), Route("/notices", notices)], manager, lifespan=lifespan)


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
