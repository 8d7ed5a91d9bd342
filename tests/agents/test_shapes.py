"""What frameworks give for an agent, a stream and a tool: methods and partials of objects, streams that are awaited
first or closed by a block, tools that yield or run on a loop of their own.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import Any, Self

import pytest

from support.agents import phases
from support.contexts import MakeManager
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    AgentError,
    ContextClosedError,
    UserExecutionContext,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger


class Slotted:
    """An agent that cannot be referred to weakly."""

    __slots__ = ()

    async def run(self, prompt: str = "", *, loud: bool = False) -> str:
        return prompt.upper() if loud else prompt

    async def stream(self) -> AsyncGenerator[int]:
        yield 1


class Plain(Slotted):
    """One that can be."""


SHARED = Plain()


@pytest.mark.parametrize(
    "factory",
    [
        lambda context: SHARED.run,
        lambda context: partial(SHARED.run, loud=True),
        lambda context: partial(partial(SHARED.run, loud=True), "hello"),
    ],
    ids=["method", "partial", "partial of a partial"],
)
async def test_methods_and_partials_of_one_object_are_refused(
    make_manager: MakeManager, factory: Callable[[UserExecutionContext], Any]
) -> None:
    manager = make_manager()
    manager.register_agent("shared", factory)
    await manager.execute_with_agent("alice", "shared")
    with pytest.raises(AgentError, match="a Plain that another run had already"):
        await manager.execute_with_agent("bob", "shared")


@pytest.mark.parametrize("kind", [Slotted, Plain])
async def test_methods_of_new_objects_run_and_nothing_is_kept_of_them(
    make_manager: MakeManager, kind: type[Slotted]
) -> None:
    manager = make_manager()
    manager.register_agent("method", lambda context: kind().run)
    manager.register_agent("partial", lambda context: partial(kind().run, loud=True))
    for _ in range(3):
        assert await manager.execute_with_agent("alice", "method", {"prompt": "hello"}) == "hello"
        assert await manager.execute_with_agent("bob", "partial", {"prompt": "hello"}) == "HELLO"
    assert [manager._catalog.find(name)._made for name in ("method", "partial")] == [{}, {}]


async def test_a_partial_of_a_function_is_no_shared_agent(make_manager: MakeManager) -> None:
    async def answer(user_id: str) -> str:
        return user_id

    manager = make_manager()
    manager.register_agent("partial", lambda context: partial(answer, context.user_id))
    assert await manager.execute_with_agent("alice", "partial") == "alice"
    assert await manager.execute_with_agent("bob", "partial") == "bob"


class BlockStream:
    """A stream that is iterated, awaited for nothing but itself, and closed by leaving its block."""

    def __init__(self) -> None:
        self.closed_as: list[str] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await asyncio.sleep(0)
        return 1

    def __await__(self) -> Generator[Any, Any, Self]:
        yield from asyncio.sleep(0).__await__()
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed_as.append(current_context().user_id)


async def test_a_stream_that_is_a_block_is_left_when_it_is_broken_off(make_manager: MakeManager) -> None:
    manager = make_manager()
    stream = BlockStream()
    manager.register_agent("stream", lambda context: lambda: stream)
    async with manager.stream_with_agent("alice", "stream") as items:
        assert await anext(items) == 1
    assert stream.closed_as == ["alice"]


async def test_what_runs_where_it_is_read_is_no_result(make_manager: MakeManager) -> None:
    manager = make_manager()
    stream = BlockStream()

    async def answer() -> BlockStream:
        return stream

    manager.register_agent("stream", lambda context: lambda: stream)
    manager.register_agent("later", lambda context: answer, stateless=True)
    with pytest.raises(AgentError, match=r"gives a stream; run it with manager\.stream_with_agent"):
        await manager.execute_with_agent("alice", "stream")
    with pytest.raises(AgentError, match="came to a BlockStream, which would run where it is read"):
        await manager.execute_with_agent("alice", "later")
    assert stream.closed_as == ["alice"]


def count_up(most: int) -> Generator[int, None, str]:
    yield from range(most)
    if most == 2:
        raise LookupError
    return "counted"


async def acount_up(most: int) -> AsyncGenerator[int]:
    for number in count_up(most):
        yield number


class BlockingCounter:
    def __call__(self, most: int) -> Generator[int, None, str]:
        return (yield from count_up(most))


class AsyncCounter:
    async def __call__(self, most: int) -> AsyncGenerator[int]:
        async for number in acount_up(most):
            yield number


async def first_of(items: Any, enough: int) -> list[int]:
    """Read either kind of generator, and break it off after a number."""
    numbers: list[int] = []
    is_asynchronous = hasattr(items, "aclose")
    while not numbers or numbers[-1] != enough:
        try:
            numbers.append(await anext(items) if is_asynchronous else next(items))
        except (StopIteration, StopAsyncIteration):
            return numbers
    await items.aclose() if is_asynchronous else items.close()
    return numbers


YIELDING: list[Callable[..., Any]] = [count_up, acount_up, partial(count_up), BlockingCounter(), AsyncCounter()]


@pytest.mark.parametrize("tool", YIELDING, ids=["blocking", "async", "partial", "object", "async object"])
async def test_a_tool_that_yields_is_told_of_until_its_last_item(
    make_manager: MakeManager, tool: Callable[..., Any]
) -> None:
    ledger = RecordingLedger()
    manager = make_manager(ledger=ledger)

    async def answer(most: int, enough: int = 9) -> list[int]:
        counting = current_run().wrap_tool(tool, "count")(most)
        return await first_of(counting, enough)

    manager.register_agent("counter", lambda context: answer, stateless=True)
    assert await manager.execute_with_agent("alice", "counter", {"most": 3}) == [0, 1, 2]
    assert await manager.execute_with_agent("alice", "counter", {"most": 3, "enough": 1}) == [0, 1]
    with pytest.raises(LookupError):
        await manager.execute_with_agent("alice", "counter", {"most": 2})
    records = [record for record in ledger.select("agent_run") if dict(record.data)["phase"] == "tool_completed"]
    assert [dict(record.data)["tool"] for record in records] == ["count"] * 3
    assert [dict(record.data).get("error") for record in records] == [None, "GeneratorExit", "LookupError"]


async def test_what_a_tool_returns_that_yields_is_kept(make_manager: MakeManager) -> None:
    manager = make_manager()

    async def answer() -> str:
        counting = current_run().wrap_tool(count_up)(1)
        assert next(counting) == 0
        with pytest.raises(StopIteration) as end:
            next(counting)
        return str(end.value.value)

    manager.register_agent("counter", lambda context: answer, stateless=True)
    assert await manager.execute_with_agent("alice", "counter") == "counted"


class Failing:
    """A tool that is an object, and to be awaited."""

    async def __call__(self) -> None:
        await asyncio.sleep(0)
        raise LookupError


@pytest.mark.parametrize("tool", [Failing(), partial(Failing())], ids=["object", "partial"])
async def test_an_object_that_is_awaited_is_told_of_until_its_end(
    make_manager: MakeManager, tool: Callable[..., Any]
) -> None:
    ledger = RecordingLedger()
    manager = make_manager(ledger=ledger)
    manager.register_agent("agent", lambda context: current_run().wrap_tool(tool, "fail"), stateless=True)
    with pytest.raises(LookupError):
        await manager.execute_with_agent("alice", "agent")
    assert ("tool_completed", "agent", "fail", "failed") in phases(ledger)


async def test_a_tool_that_yields_in_a_thread_is_listed_when_it_outlives_its_run(make_manager: MakeManager) -> None:
    manager = make_manager()
    began, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> Generator[int]:
        began.set()
        goes_on.wait(PATIENCE)
        yield 1

    async def answer() -> None:
        tool = current_run().wrap_tool(work)

        def read() -> None:
            list(tool())
            ended.set()

        threading.Thread(target=read).start()
        await asyncio.to_thread(began.wait, PATIENCE)

    manager.register_agent("worker", lambda context: answer, stateless=True)
    await manager.execute_with_agent("alice", "worker")
    [straggler] = manager.get_stragglers()
    assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "worker", "work")
    goes_on.set()
    await asyncio.to_thread(ended.wait, PATIENCE)
    assert manager.get_stragglers() == []


async def test_an_async_tool_on_a_loop_of_its_own_is_listed_when_it_outlives_its_run(make_manager: MakeManager) -> None:
    manager = make_manager()
    began, goes_on = threading.Event(), threading.Event()
    refused: list[type[Exception]] = []

    class Session:
        def query(self) -> str:
            return "rows"

    async def work() -> None:
        session = current_context().db_session
        assert session.query() == "rows"
        began.set()
        await asyncio.to_thread(goes_on.wait, PATIENCE)
        try:
            session.query()
        except ContextClosedError as error:
            refused.append(type(error))

    async def answer() -> None:
        tool = current_run().wrap_tool(work)
        await asyncio.to_thread(lambda: asyncio.run(tool()))

    manager.register_agent("worker", lambda context: answer, stateless=True)
    async with managed_user_context(manager.create_isolated_context("alice", db_session=Session())):
        task = asyncio.create_task(manager.execute_with_agent("alice", "worker"))
        await asyncio.to_thread(wait_until, began.is_set, "the tool has begun")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [straggler] = manager.get_stragglers()
        assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "worker", "work")
        goes_on.set()
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler has ended")
    assert refused == [ContextClosedError]
