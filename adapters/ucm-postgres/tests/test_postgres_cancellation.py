"""A transaction cancelled at each of its awaits, and connections that die: who comes next gets their own reply."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from postgres_drivers import BODIES, DRIVERS, INSERT, Pool, of, open_pool
from support.contexts import running_as
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import UserContextManager
from ucm_postgres import transaction


@pytest.fixture(params=DRIVERS)
async def pool(
    request: pytest.FixtureRequest, emptied: Database, postgres_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    monkeypatch.setattr(transaction, "GRACE", 0.2)  # so that what hangs for ever does not take the tests as long
    async with open_pool(request.param, emptied.app.at(postgres_proxy.port)) as pool:
        # What is asked and prepared once for each connection is out of the way.
        await write(pool, pool.manager(), "carol", "warm")
        yield pool


async def write(pool: Pool, manager: UserContextManager, user: str, body: str) -> None:
    with running_as(manager, user):
        async with pool.plugin.transaction() as connection:
            await pool.run(connection, "select %s::text", body)
            await pool.run(connection, INSERT, body)


async def next_one(pool: Pool, user: str) -> list[Any]:
    """What the next borrower gets: answers to what they ask, and only what is theirs."""
    with running_as(pool.manager(), user):
        async with asyncio.timeout(15), pool.plugin.transaction() as connection:
            for number in range(3):
                question = f"{user} {number}"
                assert await pool.run(connection, "select %s::text", question) == [(question,)]
            assert await pool.run(connection, "select current_setting('app.user_id')") == [(user,)]
            return of(user, await pool.run(connection, BODIES))


# BEGIN and binding, two statements, COMMIT, reset: at each an answer that does not come.
@pytest.mark.parametrize("answered", range(7))
@pytest.mark.parametrize("direction", ["replies", "requests"])
async def test_whoever_comes_after_a_cancelled_one_gets_their_own_reply(
    pool: Pool, postgres_proxy: TcpProxy, answered: int, direction: Any
) -> None:
    manager = pool.manager()
    postgres_proxy.hold(direction, after=answered)
    task = asyncio.create_task(write(pool, manager, "alice", "milk"))
    held = asyncio.create_task(postgres_proxy.until_held(direction))
    await asyncio.wait((task, held), return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    done, _ = await asyncio.wait((task,), timeout=0.05)
    postgres_proxy.release(direction)
    outcome = (await asyncio.gather(task, return_exceptions=True))[0]
    assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
    held.cancel()
    assert await next_one(pool, "bob") == []
    # Not half of it: all of it or nothing.
    assert await next_one(pool, "alice") in ([], ["milk"])
    assert not manager.get_active_contexts()
