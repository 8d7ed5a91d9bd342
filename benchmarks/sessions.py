"""What it costs that a transaction of SQLAlchemy's is a user's: the same one on the same engine, bound and unbound.

Time on the wall, since it is made of waits. How many round trips there are is counted in
adapters/ucm-sqlalchemy/tests/test_sqlalchemy_network.py.
"""

import asyncio
import statistics
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Final

from benchmarks.report import finish, parser, show
from ucm_middleware import UserContextManager, managed_user_context

MOST: Final = 3.0
"""How many times as long a bound transaction of one statement may take as an unbound one."""

KINDS: Final = ("unbound", "bound", "reset at begin", "unit of work")

Run = Callable[[], Awaitable[None]]


@asynccontextmanager
async def runs(url: str) -> AsyncGenerator[dict[str, Run]]:
    """A transaction of one statement each way, each with an engine of its own and one connection."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

    from ucm_sqlalchemy import SQLAlchemy

    plain, bound, resetting = (create_async_engine(url, pool_size=1, max_overflow=0) for _ in range(3))
    database = SQLAlchemy(bound)
    SQLAlchemy(resetting, reset="begin")
    statement = text("select 1")

    async def on(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.execute(statement)

    async def unit_of_work() -> None:
        async with database.unit_of_work() as session:
            await session.execute(statement)

    yield dict(zip(KINDS, (lambda: on(plain), lambda: on(bound), lambda: on(resetting), unit_of_work), strict=True))
    for engine in (plain, bound, resetting):
        await engine.dispose()


async def measure(dsn: str, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Microseconds of a transaction, the median of the rounds, in each of which every kind has its turn."""
    figures: dict[str, dict[str, float]] = {}
    for driver in ("psycopg", "asyncpg"):
        manager = UserContextManager()
        url = dsn.replace("postgresql://", f"postgresql+{driver}://", 1)
        async with runs(url) as kinds, managed_user_context(manager.create_isolated_context("alice")):
            samples: dict[str, list[float]] = {name: [] for name in kinds}
            for at in range(rounds + 1):
                for name in sorted(kinds, reverse=at % 2 == 1):
                    started = perf_counter()
                    for _ in range(count):
                        await kinds[name]()
                    samples[name].append((perf_counter() - started) / count * 1e6)
        # The first round is what each has to do once.
        figures[driver] = {name: statistics.median(taken[1:]) for name, taken in samples.items()}
    return figures


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dsn", help="a PostgreSQL, such as postgresql://app:secret@127.0.0.1/app")
    options_parser.add_argument("--rounds", type=int, default=9)
    options_parser.add_argument("--count", type=int, default=200)
    options = options_parser.parse_args()
    if options.dsn is None:
        print("a PostgreSQL is needed: give --dsn postgresql://...; nothing is written to it", file=sys.stderr)
        sys.exit(2)
    figures = asyncio.run(measure(options.dsn, options.rounds, options.count))
    rows: list[list[Any]] = [
        [driver, *(f"{taken[kind]:.0f}" for kind in KINDS), f"{ratio(taken):.2f}"] for driver, taken in figures.items()
    ]
    show("A transaction of one statement, microseconds on the wall", ["driver", *KINDS, "bound / unbound"], rows)
    missed = [
        f"{driver}: {ratio(taken):.2f} times as long, at most {MOST:g}"
        for driver, taken in figures.items()
        if ratio(taken) > MOST
    ]
    finish(options, figures, missed)


def ratio(taken: dict[str, float]) -> float:
    """A bound transaction in the time of one that is not."""
    return taken["bound"] / taken["unbound"]


if __name__ == "__main__":
    main()
