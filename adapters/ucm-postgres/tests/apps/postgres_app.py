"""Notes over HTTP, each user's own, on a pool of two connections. What the environment names: the driver, the DSN."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from psycopg_pool import ConnectionPool

from postgres_drivers import BODIES, INSERT, Pool, open_pool
from support.postgres import Login
from ucm_middleware import UserContextManager, UserContextMiddleware
from ucm_postgres.psycopg_threads import PsycopgThreadPool, reset

LOGIN = Login(**json.loads(os.environ["UCM_TEST_LOGIN"]))
THREADS: ConnectionPool[Any] = ConnectionPool(LOGIN.dsn, min_size=1, max_size=2, open=False, reset=reset)
threads = PsycopgThreadPool(THREADS)
manager = UserContextManager()
pools: list[Pool] = []


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    driver = os.environ["UCM_TEST_DRIVER"]
    with THREADS:
        # Nobody resets the connections of the second: not at the return, and nobody begins a transaction on it.
        async with open_pool(driver, LOGIN, size=2) as pool, open_pool(driver, LOGIN, reset="begin") as unbound:
            pools.extend((pool, unbound))
            yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    UserContextMiddleware,
    manager=manager,
    identify=lambda connection: connection.headers.get("x-test-user"),
    cancel_on_disconnect=True,
)


@app.get("/notes")
async def notes() -> list[tuple[Any, ...]]:
    pool, _ = pools
    async with pool.plugin.transaction() as connection:
        return await pool.run(connection, BODIES)


@app.post("/notes/{body}")
async def add(body: str) -> None:
    pool, _ = pools
    async with pool.plugin.transaction() as connection:
        await pool.run(connection, INSERT, body)
        # What would stay with the connection.
        await pool.run(connection, "select set_config('app.user_id', current_setting('app.user_id'), false)")
        if body == "refused":
            raise HTTPException(418)


@app.get("/threads/notes")
def notes_in_a_thread() -> list[tuple[Any, ...]]:
    with threads.transaction() as connection:
        found: list[tuple[Any, ...]] = connection.execute(BODIES).fetchall()
        return found


@app.post("/threads/notes/{body}")
def add_in_a_thread(body: str) -> None:
    with threads.transaction() as connection:
        connection.execute(INSERT, [body])


@app.get("/unbound/notes")
async def unbound() -> list[tuple[Any, ...]]:
    """What there is without the adapter, on the connection that is next: its session's user is whoever was last."""
    _, pool = pools
    async with pool.borrow() as connection:
        return await pool.run(connection, BODIES)


@app.post("/unbound/user/{user}")
async def set_unbound(user: str) -> None:
    _, pool = pools
    async with pool.borrow() as connection:
        await pool.run(connection, "select set_config('app.user_id', %s, false)", user)


@app.get("/slow")
async def slow() -> None:
    pool, _ = pools
    async with pool.plugin.transaction() as connection:
        await pool.run(connection, INSERT, "never")
        await pool.run(connection, "select pg_sleep(20)")
