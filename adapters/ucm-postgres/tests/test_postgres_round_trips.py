"""What the binding costs on the wire, counted by a proxy, beside the same transaction without it."""

from typing import Any

import pytest

from postgres_drivers import DRIVERS, Pool, open_pool
from support.contexts import running_as
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_postgres import Binding

# Beyond BEGIN. asyncpg prepares the binding once on each connection, or each time where it may keep nothing.
EXTRA = {
    ("psycopg", "return", True): 0,
    ("psycopg", "return", False): 0,
    ("psycopg", "begin", True): 0,
    ("psycopg", "begin", False): 0,
    ("asyncpg", "return", True): 1,
    ("asyncpg", "return", False): 2,
    ("asyncpg", "begin", True): 2,
    ("asyncpg", "begin", False): 3,
}


@pytest.mark.parametrize("prepares", [True, False])
@pytest.mark.parametrize("reset", ["return", "begin"])
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_transaction_begins_with_so_many_round_trips_more(
    emptied: Database, postgres_proxy: TcpProxy, driver: str, reset: Any, prepares: bool
) -> None:
    login = emptied.app.at(postgres_proxy.port)
    binding = Binding(role=emptied.app.user)
    async with open_pool(driver, login, reset=reset, prepares=prepares, binding=binding) as pool:
        manager = pool.manager()
        unbound = await begin_unbound(pool, postgres_proxy)
        bound = 0
        for _ in range(2):  # the second time, with what is prepared once
            with running_as(manager, "alice"):
                await pool.settled()
                before = postgres_proxy.round_trips
                async with pool.plugin.transaction() as connection:
                    bound = postgres_proxy.round_trips - before
                    await pool.run(connection, "select 1")
        assert (unbound, bound) == (1, 1 + EXTRA[driver, reset, prepares])


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_context_that_asks_the_database_nothing_pays_nothing(
    emptied: Database, postgres_proxy: TcpProxy, driver: str
) -> None:
    async with open_pool(driver, emptied.app.at(postgres_proxy.port)) as pool:
        manager = pool.manager()
        before = postgres_proxy.round_trips
        with running_as(manager, "alice"):
            pass
        manager.create_context_with_transaction("alice").close()
        assert postgres_proxy.round_trips == before


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_statement_of_a_transaction_costs_what_it_costs_without(
    emptied: Database, postgres_proxy: TcpProxy, driver: str
) -> None:
    async with open_pool(driver, emptied.app.at(postgres_proxy.port)) as pool:
        manager = pool.manager()
        with running_as(manager, "alice"):
            async with pool.plugin.transaction() as connection:
                await pool.run(connection, "select 1")
                before = postgres_proxy.round_trips
                await pool.run(connection, "select 1")
                assert postgres_proxy.round_trips - before == 1


async def begin_unbound(pool: Pool, proxy: TcpProxy) -> int:
    """Round trips until an unbound transaction can be used."""
    async with pool.borrow() as connection:
        before = proxy.round_trips
        async with connection.transaction():
            return proxy.round_trips - before
