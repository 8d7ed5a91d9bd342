"""Events among many connections, in this process: the servers are functions that take all and do nothing."""

import asyncio
from time import thread_time_ns
from typing import Any, Final

from benchmarks.event_servers import DATA, EVENT
from benchmarks.live import accepted, manager_of_many
from benchmarks.timing import Cell, ratio, take_turns
from ucm_middleware import UserContextManager
from ucm_middleware.types import Receive, Send

USER: Final = "user-who-is-sent-to"
ALONE: Final = "alone"
AMONG: Final = "among others"


class Counted(dict[str, Any]):
    """Knows how often it was serialised."""

    def __init__(self) -> None:
        super().__init__(DATA)
        self.times = 0

    def items(self) -> Any:
        self.times += 1
        return super().items()


def serialisations(connections: int) -> int:
    """How often an event to so many connections of a user is serialised."""

    async def send() -> int:
        manager = manager_of_many()
        held = [await accepted(manager, USER) for _ in range(connections)]
        data = Counted()
        delivery = await manager.send_event(USER, EVENT, data)
        if delivery.delivered != len(held):
            raise RuntimeError(f"{delivery.delivered} of {connections} connections had the event")
        manager.cleanup_all_contexts()
        return data.times

    return asyncio.run(send())


def among(idle: int, rounds: int) -> float:
    """The CPU of an event to one connection where so many others are idle, in that of one where there are none."""
    with asyncio.Runner() as runner:
        populations = {ALONE: runner.run(_population(0)), AMONG: runner.run(_population(idle))}
        cells = {name: _cell(runner, manager) for name, (manager, _) in populations.items()}
        return ratio(take_turns(cells, rounds), AMONG, ALONE)


async def _population(idle: int) -> tuple[UserContextManager, list[tuple[Receive, Send]]]:
    manager = manager_of_many()
    users = [USER, *(f"user-{number:09}" for number in range(idle))]
    return manager, [await accepted(manager, user) for user in users]


def _cell(runner: asyncio.Runner, manager: UserContextManager) -> Cell:
    async def send(count: int) -> int:
        begun = thread_time_ns()
        for _ in range(count):
            await manager.send_event(USER, EVENT, DATA)
        return thread_time_ns() - begun

    return lambda count: runner.run(send(count))
