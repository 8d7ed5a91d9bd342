"""What two users share whose transactions are open on one pool: nothing, unless somebody gives them the same."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from psycopg_pool import ConnectionPool

from postgres_drivers import BODIES, DRIVERS, INSERT, open_pool
from support.postgres import Database
from support.sharing import report_of_two, report_of_two_threads, shown
from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_postgres.psycopg_threads import PsycopgThreadPool, reset

CONNECTIONS = {"psycopg": "AsyncConnection", "asyncpg": "PoolConnectionProxy"}


@pytest.mark.parametrize("driver", DRIVERS)
async def test_connections_and_cursors_on_one_pool_share_nothing(emptied: Database, driver: str) -> None:
    async with open_pool(driver, emptied.app, size=4) as pool:

        @asynccontextmanager
        async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
            keep = context.agent_context
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, INSERT, f"of {context.user_id}")
                keep["rows"] = await pool.run(connection, BODIES)
                if driver == "psycopg":
                    keep["cursor"] = cursor = connection.cursor()
                    await cursor.execute(BODIES.encode())
                else:
                    keep["prepared"] = await connection.prepare(BODIES)
                yield

        assert shown(await report_of_two(pool.manager(), work)) == []


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_connection_that_both_have_is_found(emptied: Database, driver: str) -> None:
    async with open_pool(driver, emptied.app, size=2) as pool:
        first: list[Any] = []

        @asynccontextmanager
        async def work(context: UserExecutionContext) -> AsyncGenerator[None]:
            async with pool.plugin.transaction() as connection:
                first.append(connection)
                context.agent_context["given"] = first[0]
                yield

        found = shown(await report_of_two(pool.manager(), work))
        assert found == [f"alice.transaction is bob.agent_context['given']<target> ({CONNECTIONS[driver]})"]


class TestThreads:
    @pytest.fixture
    def pool(self, emptied: Database) -> Generator[PsycopgThreadPool[Any]]:
        with ConnectionPool(emptied.app.dsn, min_size=2, max_size=2, reset=reset, open=True) as raw:
            yield PsycopgThreadPool(raw)

    def test_share_nothing(self, pool: PsycopgThreadPool[Any]) -> None:
        @contextmanager
        def work(context: UserExecutionContext) -> Generator[None]:
            with pool.transaction() as connection:
                context.agent_context["cursor"] = connection.execute(BODIES)
                yield

        assert shown(report_of_two_threads(UserContextManager(plugins=[pool]), work)) == []
        assert shown(report_of_two_threads(UserContextManager(), work)) != []  # which has not been told

    def test_that_have_the_same_connection_are_found(self, pool: PsycopgThreadPool[Any]) -> None:
        both: list[Any] = []

        @contextmanager
        def work(context: UserExecutionContext) -> Generator[None]:
            with pool.transaction() as connection:
                both.append(connection)
                context.agent_context["given"] = both
                yield

        found = shown(report_of_two_threads(UserContextManager(plugins=[pool]), work))
        assert any(" (list)" in one for one in found)
