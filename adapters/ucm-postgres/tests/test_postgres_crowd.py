"""Many users at once on few connections: nobody reads or writes a row of another's."""

import asyncio
from contextvars import Context
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest

from postgres_drivers import DRIVERS, INSERT, crowd, open_pool
from support.contexts import running_as
from support.postgres import Database
from ucm_postgres import Binding

CONFLICT = (psycopg.errors.SerializationFailure, asyncpg.SerializationError)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("size", [1, 2, 3])
async def test_fifty_users_see_and_write_their_own(emptied: Database, driver: str, size: int) -> None:
    async with open_pool(driver, emptied.app, size=size, timeout=50) as pool:
        await crowd(pool, users=50, rounds=2)
    with psycopg.connect(emptied.superuser.dsn) as connection:
        rows = connection.execute("select user_id, array_agg(body order by id) from notes group by 1").fetchall()
    assert dict(rows) == {f"user{number}": [f"user{number} {past}" for past in range(2)] for number in range(50)}


@pytest.mark.parametrize("driver", DRIVERS)
async def test_without_a_binding_that_the_policies_read_nobody_sees_anything(emptied: Database, driver: str) -> None:
    async with open_pool(driver, emptied.app, binding=Binding(setting="app.other")) as pool:
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.TaskGroup() as group:
                group.create_task(crowd(pool, users=2, rounds=1))
    assert "row-level security" in str(failed.value.exceptions[0])


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_retry_is_the_same_users(emptied: Database, driver: str) -> None:
    """Two tasks count up the same row; the one that loses tries again, as the same user."""
    emptied.execute("create table if not exists counts (user_id text, n int); grant select, update on counts to {app}")
    emptied.execute("truncate counts; insert into counts values ('alice', 0)")
    async with open_pool(driver, emptied.app, size=2) as pool:
        manager = pool.manager()
        both = asyncio.Barrier(2)
        tries: list[str] = []

        async def count_up(first: bool) -> None:
            async with pool.plugin.transaction(isolation_level="SERIALIZABLE") as connection:
                [(user, n)] = await pool.run(connection, "select current_setting('app.user_id'), n from counts")
                tries.append(user)
                if first:
                    await both.wait()
                await pool.run(connection, "update counts set n = %s where user_id = %s", n + 1, user)

        async def with_retry() -> None:
            with running_as(manager, "alice"):
                try:
                    await count_up(True)
                except CONFLICT:
                    await count_up(False)

        tasks: list[Any] = [asyncio.create_task(with_retry(), context=Context()) for _ in range(2)]
        await asyncio.gather(*tasks)
        assert tries == ["alice"] * 3
        with psycopg.connect(emptied.superuser.dsn) as connection:
            assert connection.execute("select n from counts").fetchall() == [(2,)]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_leak_is_there_when_connections_are_bound_for_their_session(emptied: Database, driver: str) -> None:
    """What many applications do in place of this: a SET on a pooled connection."""
    async with open_pool(driver, emptied.app, reset="none") as pool:
        async with pool.borrow() as connection:
            await pool.run(connection, "select set_config('app.user_id', 'alice', false)")
            await pool.run(connection, INSERT, "milk")
        seen = []
        async with pool.borrow() as connection:  # nobody's
            seen = await pool.run(connection, "select body from notes")
        assert seen == ([("milk",)] if driver == "psycopg" else [])
