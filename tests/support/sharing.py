"""The isolation report of two users whose work is under way."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import Context
from typing import Any

from support.contexts import running_as
from ucm_middleware import UserContextManager, UserExecutionContext, managed_user_context
from ucm_middleware.isolation import Shared
from ucm_middleware.reachability import IsolationReport

USERS = ("alice", "bob")


async def report_of_two(
    manager: UserContextManager, work: Callable[[UserExecutionContext], AbstractAsyncContextManager[object]]
) -> IsolationReport:
    """Taken while both are inside of their block, each in a task of its own."""
    inside = [asyncio.Event() for _ in USERS]
    leave = asyncio.Event()

    async def one(user_id: str, entered: asyncio.Event) -> None:
        async with managed_user_context(manager.create_isolated_context(user_id)) as context, work(context):
            entered.set()
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        for user_id, entered in zip(USERS, inside, strict=True):
            group.create_task(one(user_id, entered), context=Context())
            await entered.wait()  # so that it is always the second who comes upon what is the first's
        report = manager.isolation_report()
        leave.set()
    return report


def report_of_two_threads(
    manager: UserContextManager, work: Callable[[UserExecutionContext], AbstractContextManager[object]]
) -> IsolationReport:
    """The same with threads."""
    inside = threading.Barrier(len(USERS) + 1)
    leave = threading.Event()

    def one(user_id: str) -> None:
        try:
            with running_as(manager, user_id) as context, work(context):
                inside.wait(20)
                assert leave.wait(20)
        except BaseException:
            inside.abort()
            raise

    with ThreadPoolExecutor(len(USERS)) as threads:
        ending = [threads.submit(one, user_id) for user_id in USERS]
        try:
            inside.wait(20)
            return manager.isolation_report()
        finally:
            leave.set()
            for each in ending:
                each.result()


def shown(report: IsolationReport) -> list[str]:
    """What it found; for a report that is complete."""
    assert report.is_complete
    assert report.contexts == len(USERS)
    return [str(finding) for finding in report.findings]


class Gathering(Shared):  # type: ignore[misc, type-arg]  # pyright: ignore[reportGeneralTypeIssues]
    """Where runs of two users wait for each other, for the report to be taken."""

    def __init__(self) -> None:
        self._came = asyncio.Semaphore(0)
        self._leave: list[asyncio.Event] = []  # of each, since those who wait for one event know of each other

    async def wait(self) -> None:
        """Be inside, until the report is taken."""
        self._leave.append(leave := asyncio.Event())
        self._came.release()
        await leave.wait()

    async def report(
        self, manager: UserContextManager, agent: str, parameters: Mapping[str, Any], *, streams: bool = False
    ) -> IsolationReport:
        """Of two users who run an agent, which waits here."""

        async def run(user_id: str) -> None:
            if streams:
                async with manager.stream_with_agent(user_id, agent, parameters) as events:
                    async for _ in events:
                        pass
            else:
                await manager.execute_with_agent(user_id, agent, parameters)

        async with asyncio.TaskGroup() as group:
            for user_id in USERS:
                group.create_task(run(user_id), context=Context())
            for _ in USERS:
                await self._came.acquire()
            report = manager.isolation_report()
            for leave in self._leave:
                leave.set()
        return report
