"""What tying a transaction on PostgreSQL to its user costs: round trips, and time beside one that is not tied. And what
a request pays that touches no database.

The server is the one of the tests; run it with ``PYTHONPATH=tests``, as tox does.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import asyncpg  # type: ignore[import-untyped]
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.drive import requests
from benchmarks.report import finish, parser, show
from benchmarks.rows import raw_app
from benchmarks.timing import Cell, Samples, ratio, take_turns
from support.postgres import Login, start_postgres
from support.tcp_proxy import TcpProxy, start_tcp_proxy
from ucm_middleware import UserContextManager, UserContextMiddleware, managed_user_context
from ucm_postgres import asyncpg as ucm_asyncpg
from ucm_postgres import psycopg as ucm_psycopg
from ucm_sqlalchemy import SQLAlchemy

MOST_ROUND_TRIPS: Final = {"psycopg": 0, "asyncpg": 1, "SQLAlchemy, psycopg": 0, "SQLAlchemy, asyncpg": 1}
"""How many round trips more a transaction may take because it is tied to its user."""

MOST_UNTOUCHED: Final = 1.05
"""What a request that touches no database may take with an adapter, in what it takes without. No clock is better."""

STATEMENT: Final = "select 1"

Step = Callable[[], Awaitable[object]]
"""One transaction with one statement."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same transaction, not tied and tied. Both on connections that are reset in the same way."""

    bare: Step
    bound: Step
    plugin: object


@asynccontextmanager
async def psycopg_pair(login: Login) -> AsyncGenerator[Pair]:
    async with AsyncConnectionPool(login.dsn, min_size=1, max_size=1, reset=ucm_psycopg.reset) as pool:
        database = ucm_psycopg.PsycopgPool(pool)

        async def bare() -> None:
            async with pool.connection() as connection, connection.transaction():
                await connection.execute(STATEMENT)

        async def bound() -> None:
            async with database.transaction() as connection:
                await connection.execute(STATEMENT)

        yield Pair(bare, bound, database)


@asynccontextmanager
async def asyncpg_pair(login: Login) -> AsyncGenerator[Pair]:
    untyped: Any = asyncpg
    async with untyped.create_pool(login.dsn, min_size=1, max_size=1, reset=ucm_asyncpg.reset) as pool:
        database = ucm_asyncpg.AsyncpgPool(pool)

        async def bare() -> None:
            async with pool.acquire() as connection, connection.transaction():
                await connection.fetch(STATEMENT)

        async def bound() -> None:
            async with database.transaction() as connection:
                await connection.fetch(STATEMENT)

        yield Pair(bare, bound, database)


@asynccontextmanager
async def sqlalchemy_pair(url: str) -> AsyncGenerator[Pair]:
    async with AsyncExitStack() as stack:
        untied, tied = (create_async_engine(url, pool_size=1, max_overflow=0) for _ in range(2))
        stack.push_async_callback(untied.dispose)
        stack.push_async_callback(tied.dispose)
        database = SQLAlchemy(tied)
        yield Pair(_on_one_connection(untied, stack), _on_one_connection(tied, stack), database)


def _on_one_connection(engine: AsyncEngine, stack: AsyncExitStack) -> Step:
    # What a reset at its return costs is not counted: the connection is kept.
    kept: list[Any] = []

    async def step() -> None:
        if not kept:
            kept.append(await stack.enter_async_context(engine.connect()))
        async with kept[0].begin():
            await kept[0].execute(text(STATEMENT))

    return step


Pairs = Mapping[str, Callable[[Login], Any]]

PAIRS: Final[Pairs] = {
    "psycopg": psycopg_pair,
    "asyncpg": asyncpg_pair,
    "SQLAlchemy, psycopg": lambda login: sqlalchemy_pair(login.url("postgresql+psycopg")),
    "SQLAlchemy, asyncpg": lambda login: sqlalchemy_pair(login.url("postgresql+asyncpg")),
}


@asynccontextmanager
async def running(pair: Callable[[Login], Any], login: Login) -> AsyncGenerator[Pair]:
    """A pair, in a context of alice's."""
    async with pair(login) as made:
        manager = UserContextManager(plugins=[made.plugin])
        async with managed_user_context(manager.create_isolated_context("alice")):
            for step in (made.bare, made.bound):
                for _ in range(10):  # until what is prepared once is prepared
                    await step()
            yield made


async def round_trips(step: Step, proxy: TcpProxy, count: int = 20) -> float:
    """How many a transaction takes. They are counted once all have ended, resets too."""
    before = proxy.round_trips
    for _ in range(count):
        await step()
    await step()  # which waits for the reset of the one before
    return (proxy.round_trips - before) / (count + 1)


async def measured(pair: Callable[[Login], Any], login: Login, rounds: int) -> dict[str, float]:
    """Round trips through a proxy; microseconds without one, in turns, and the median of the rounds' ratios."""
    with start_tcp_proxy(login.host, login.port) as proxy:
        async with running(pair, login.at(proxy.port)) as made:
            bare, bound = await round_trips(made.bare, proxy), await round_trips(made.bound, proxy)
    times: dict[str, list[float]] = {"bare": [], "bound": []}
    async with running(pair, login) as made:
        for at in range(rounds):
            for name, step in (("bare", made.bare), ("bound", made.bound))[:: 1 if at % 2 else -1]:
                times[name].append(await _microseconds(step))
    ratios = [bound / bare for bound, bare in zip(times["bound"], times["bare"], strict=True)]
    return {
        "bare_round_trips": bare,
        "bound_round_trips": bound,
        "bare_us": statistics.median(times["bare"]),
        "bound_us": statistics.median(times["bound"]),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


async def _microseconds(step: Step, count: int = 100) -> float:
    start = time.perf_counter()
    for _ in range(count):
        await step()
    return (time.perf_counter() - start) / count * 1e6


def untouched(rounds: int) -> Samples:
    """Nanoseconds of a request to the least application, which touches no database, with each adapter and with none."""
    loop = asyncio.new_event_loop()

    def cell(*plugins: object) -> Cell:
        app = UserContextMiddleware(raw_app, manager=UserContextManager(plugins=plugins))

        def run(count: int) -> int:
            start = time.thread_time_ns()
            loop.run_until_complete(requests(app, count))
            return time.thread_time_ns() - start

        return run

    async def adapters() -> dict[str, object]:
        url = "postgresql://nobody@localhost/nowhere"  # no connection is ever made
        untyped: Any = asyncpg
        return {
            "psycopg": ucm_psycopg.PsycopgPool(AsyncConnectionPool(url, open=False, reset=ucm_psycopg.reset)),
            "asyncpg": ucm_asyncpg.AsyncpgPool(untyped.create_pool(url, reset=ucm_asyncpg.reset)),
            "SQLAlchemy": SQLAlchemy(create_async_engine(url.replace("postgresql", "postgresql+psycopg"))),
        }

    try:
        cells = {name: cell(plugin) for name, plugin in loop.run_until_complete(adapters()).items()}
        return take_turns({"none": cell(), **cells}, rounds)
    finally:
        loop.close()


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=15)
    options = options_parser.parse_args()
    with start_postgres() as server, server.database(notes=False) as database:
        figures = {name: asyncio.run(measured(pair, database.app, options.rounds)) for name, pair in PAIRS.items()}
    show(
        "A transaction with one statement, not tied to a user and tied",
        ["", "round trips", "tied", "µs", "tied, µs", "x"],
        [
            [
                name,
                f"{of['bare_round_trips']:.2f}",
                f"{of['bound_round_trips']:.2f}",
                f"{of['bare_us']:.0f}",
                f"{of['bound_us']:.0f}",
                f"{of['ratio']:.2f} ({of['lowest']:.2f} to {of['highest']:.2f})",
            ]
            for name, of in figures.items()
        ],
    )
    idle = untouched(options.rounds * 20)  # so many that the machine's moods come out even
    ratios = {name: ratio(idle, name, "none") for name in idle}
    show(
        "A request that touches no database",
        ["adapter", "µs of CPU", "x"],
        [[name, f"{statistics.median(idle[name]) / 1e3:.1f}", f"{of:.3f}"] for name, of in ratios.items()],
    )
    added = {name: of["bound_round_trips"] - of["bare_round_trips"] for name, of in figures.items()}
    missed = [
        f"{name}: {added[name]:.2f} round trips more a transaction, at most {most}"
        for name, most in MOST_ROUND_TRIPS.items()
        if added[name] > most + 0.05
    ]
    missed += [
        f"{name}: a request that touches no database takes {of:.3f} of one without, at most {MOST_UNTOUCHED:g}"
        for name, of in ratios.items()
        if of > MOST_UNTOUCHED
    ]
    finish(options, {"transactions": figures, "untouched": ratios}, missed)


if __name__ == "__main__":
    main()
