"""What it costs that a transaction on PostgreSQL is a user's: the same one on the same pool, bound and unbound.

Time on the wall, since it is made of waits: on one machine a round trip is short, and what the client does weighs all the
more. How many round trips there are is counted in adapters/ucm-postgres/tests/test_postgres_round_trips.py.
"""

import asyncio
import secrets
import statistics
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Final

from benchmarks.report import finish, parser, show
from ucm_middleware import UserContextManager, managed_user_context

MOST: Final = 3.0
"""How many times as long a bound transaction of one statement may take as an unbound one on a pool with the reset."""

KINDS: Final = ("unbound", "reset", "bound", "signed")

Run = Callable[[], Awaitable[None]]


@asynccontextmanager
async def psycopg_runs(dsn: str) -> AsyncGenerator[dict[str, Run]]:
    """A transaction of one statement each way."""
    from psycopg_pool import AsyncConnectionPool

    from ucm_postgres import Binding
    from ucm_postgres.psycopg import PsycopgPool, reset

    plain: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False)
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False, reset=reset)
    bound, signed = PsycopgPool(pool), PsycopgPool(pool, Binding(signed=True))

    async def unbound(pool: AsyncConnectionPool[Any]) -> None:
        async with pool.connection() as connection, connection.transaction():
            await connection.execute("select 1")

    async def with_user(database: PsycopgPool[Any]) -> None:
        async with database.transaction() as connection:
            await connection.execute("select 1")

    async with plain, pool:
        await asyncio.gather(plain.wait(), pool.wait())
        yield dict(
            zip(
                KINDS,
                (lambda: unbound(plain), lambda: unbound(pool), lambda: with_user(bound), lambda: with_user(signed)),
                strict=True,
            )
        )


@asynccontextmanager
async def asyncpg_runs(dsn: str) -> AsyncGenerator[dict[str, Run]]:
    """The same with the other driver."""
    import asyncpg  # type: ignore[import-untyped]

    from ucm_postgres import Binding
    from ucm_postgres.asyncpg import AsyncpgPool, reset

    plain = await asyncpg.create_pool(dsn, min_size=1, max_size=1)
    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=1, reset=reset)
    bound, signed = AsyncpgPool(pool), AsyncpgPool(pool, Binding(signed=True))

    async def unbound(pool: Any) -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("select 1")

    async def with_user(database: AsyncpgPool) -> None:
        async with database.transaction() as connection:
            await connection.execute("select 1")

    try:
        yield dict(
            zip(
                KINDS,
                (lambda: unbound(plain), lambda: unbound(pool), lambda: with_user(bound), lambda: with_user(signed)),
                strict=True,
            )
        )
    finally:
        plain.terminate()
        pool.terminate()


async def measure(dsn: str, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Microseconds of a transaction, the median of the rounds, in each of which every kind has its turn."""
    figures: dict[str, dict[str, float]] = {}
    for driver, opened in (("psycopg", psycopg_runs), ("asyncpg", asyncpg_runs)):
        manager = UserContextManager(secret=secrets.token_urlsafe(32))
        async with opened(dsn) as runs, managed_user_context(manager.create_isolated_context("alice")):
            samples: dict[str, list[float]] = {name: [] for name in runs}
            for at in range(rounds + 1):
                for name in sorted(runs, reverse=at % 2 == 1):
                    started = perf_counter()
                    for _ in range(count):
                        await runs[name]()
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
    rows = [
        [driver, *(f"{taken[kind]:.0f}" for kind in KINDS), f"{ratio(taken):.2f}"] for driver, taken in figures.items()
    ]
    show(
        "A transaction of one statement, microseconds on the wall",
        ["driver", "unbound", "unbound, with the reset", "bound", "signed", "bound / unbound with the reset"],
        rows,
    )
    missed = [
        f"{driver}: {ratio(taken):.2f} times as long, at most {MOST:g}"
        for driver, taken in figures.items()
        if ratio(taken) > MOST
    ]
    finish(options, figures, missed)


def ratio(taken: dict[str, float]) -> float:
    """A bound transaction in the time of one that is not, both with the reset."""
    return taken["bound"] / taken["reset"]


if __name__ == "__main__":
    main()
