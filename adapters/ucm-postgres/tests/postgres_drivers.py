"""The drivers behind one face, so that a test runs on each."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from support.postgres import Login
from support.waiting import wait_until
from ucm_middleware import UserContextManager, managed_user_context
from ucm_postgres import Binding
from ucm_postgres import asyncpg as ucm_asyncpg
from ucm_postgres import psycopg as ucm_psycopg
from ucm_postgres.transaction import UserTransactions

DRIVERS = ("psycopg", "asyncpg")

INSERT = "insert into notes (body) values (%s)"
BODIES = "select user_id, body from notes order by id"

Reset = Literal["return", "begin", "none"]


@dataclass
class Pool:
    """A pool of one driver. ``plugin`` is the adapter's; ``borrow`` is what there is without the adapter."""

    driver: str
    raw: Any
    plugin: UserTransactions[Any]

    async def run(self, connection: Any, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement with %s for parameters; its rows."""
        if self.driver == "psycopg":
            cursor = await connection.execute(statement.encode(), parameters or None)
            return await cursor.fetchall() if cursor.description else []
        return [tuple(row) for row in await connection.fetch(numbered(statement), *parameters)]

    def statement(self, statement: str) -> str:
        """A statement as the driver takes it."""
        return statement if self.driver == "psycopg" else numbered(statement)

    @asynccontextmanager
    async def borrow(self) -> AsyncGenerator[Any]:
        """A connection, given back well; with psycopg committed."""
        if self.driver == "psycopg":
            async with self.raw.connection() as connection:
                yield connection
        else:
            async with self.raw.acquire() as connection:
                yield connection

    async def settled(self) -> None:
        """Until all connections are back: psycopg's pool resets them in a task of its own."""
        if self.driver == "psycopg":
            are_back = lambda: self.raw.get_stats()["pool_available"] == self.raw.min_size  # noqa: E731
            await asyncio.to_thread(wait_until, are_back, "all connections are back")

    def manager(self, **options: Any) -> UserContextManager:
        return UserContextManager(plugins=[self.plugin], **options)


def numbered(statement: str) -> str:
    """$1, $2, ... for each %s."""
    numbers = count(1)
    first, *rest = statement.split("%s")
    return first + "".join(f"${next(numbers)}{part}" for part in rest)


@asynccontextmanager
async def open_pool(
    driver: str,
    login: Login,
    *,
    size: int = 1,
    binding: Binding | None = None,
    reset: Reset = "return",
    prepares: bool = True,
    timeout: float = 10,
) -> AsyncGenerator[Pool]:
    """A pool of ``size`` connections, and the adapter on it.

    With reset="none" the pool is what the driver makes of it by default, and the adapter is not to be used.
    """
    mode: Literal["return", "begin"] = "return" if reset == "return" else "begin"
    if driver == "psycopg":
        given = ucm_psycopg.reset if reset == "return" else None
        options = {} if prepares else {"prepare_threshold": None}
        raw: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
            login.dsn, min_size=size, max_size=size, open=False, reset=given, kwargs=options, timeout=timeout
        )
        async with raw:
            await raw.wait()
            yield Pool(driver, raw, ucm_psycopg.PsycopgPool(raw, binding, reset=mode))
        return
    given_too = {"return": ucm_asyncpg.reset, "begin": nothing, "none": None}[reset]
    cache: dict[str, Any] = {} if prepares else {"statement_cache_size": 0}
    pool = await asyncpg.create_pool(login.dsn, min_size=size, max_size=size, reset=given_too, **cache)
    try:
        yield Pool(driver, pool, ucm_asyncpg.AsyncpgPool(pool, binding, reset=mode))
    finally:
        pool.terminate()


async def nothing(connection: object) -> None:
    """A reset that resets nothing, where asyncpg would do some of it at the return."""


def of(user: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The bodies, all of them this user's."""
    assert {owner for owner, *_ in rows} <= {user}
    return [body for _, body in rows]


async def crowd(pool: Pool, *, users: int, rounds: int) -> None:
    """So many users at once, each of whom reads, writes, fails and forges; raises when one sees what is another's."""
    manager = pool.manager()

    async def one(user: str, other: str) -> None:
        async with managed_user_context(manager.create_isolated_context(user)):
            for number in range(rounds):
                with contextlib.suppress(ZeroDivisionError):
                    async with pool.plugin.transaction() as connection:
                        await pool.run(connection, INSERT, "rolled back")
                        raise ZeroDivisionError
                async with pool.plugin.transaction() as connection:
                    assert of(user, await pool.run(connection, BODIES)) == [f"{user} {past}" for past in range(number)]
                    await pool.run(connection, INSERT, f"{user} {number}")
                    await asyncio.sleep(0)
                    for forged in FORGED:
                        await refused(pool, connection, forged, other)
                    assert (
                        await pool.run(connection, "update notes set body = body where user_id = %s returning 1", other)
                        == []
                    )
                    assert await pool.run(connection, "select user_id from notes where user_id <> %s", user) == []

    tasks = [
        asyncio.create_task(one(f"user{number}", f"user{(number + 1) % users}"), context=Context())
        for number in range(users)
    ]
    await asyncio.gather(*tasks)


FORGED = (
    "insert into notes (user_id, body) values (%s, 'forged')",
    "update notes set user_id = %s",
)


async def refused(pool: Pool, connection: Any, statement: str, *parameters: object) -> None:
    """Run what row-level security must refuse, in a savepoint."""
    with pytest.raises((psycopg.errors.InsufficientPrivilege, asyncpg.InsufficientPrivilegeError), match="row-level"):
        async with connection.transaction():
            await pool.run(connection, statement, *parameters)
