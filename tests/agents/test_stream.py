"""Streams: one task drives them as the user who began them, whoever reads."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.agents import astray, phases, stateless
from support.contexts import MakeManager, running_as
from ucm_middleware import (
    AgentError,
    AgentPolicy,
    AgentTimeoutError,
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger


async def count(n: int) -> AsyncIterator[tuple[int, str]]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number, current_context().user_id


def numbers(n: int, user: str = "alice") -> list[tuple[int, str]]:
    return [(number, user) for number in range(n)]


async def test_its_items_come_in_order_and_then_its_result(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def agent() -> AsyncIterator[int]:
        yield 1
        yield 2
        current_run().result = "three"

    stateless(manager, agent=agent)
    async with manager.stream_with_agent("alice", "agent") as stream:
        assert [item async for item in stream] == [1, 2]
        assert stream.result == "three"
    assert phases(ledger) == [("agent_started", "agent"), ("agent_completed", "agent")]
    assert manager.get_active_contexts() == {}


class TestWhoReads:
    async def test_any_task_may_and_it_still_runs_as_who_began_it(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        with running_as(manager, "alice"):
            stream = await manager.stream_with_agent("alice", "agent", {"n": 3}).__aenter__()
            in_a_task = await asyncio.create_task(anext(stream))
            in_a_child = current_context().create_child_context("reads")
            async with managed_user_context(in_a_child):
                in_another_context = await anext(stream)
            assert [in_a_task, in_another_context, await anext(stream)] == numbers(3)
            await stream.__aexit__(None, None, None)

    async def test_code_in_no_context_may(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        items: asyncio.Queue[Any] = asyncio.Queue()
        begun: asyncio.Queue[Any] = asyncio.Queue()

        async def background() -> None:
            stream = await begun.get()
            async for item in stream:
                items.put_nowait(item)

        task = asyncio.create_task(background())
        with running_as(manager, "alice"):
            async with manager.stream_with_agent("alice", "agent", {"n": 3}) as stream:
                begun.put_nowait(stream)
                await task
        assert [items.get_nowait() for _ in range(3)] == numbers(3)

    async def test_another_user_may_not_and_changes_nothing(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        stateless(manager, agent=count)
        with running_as(manager, "alice") as alice:
            stream = await manager.stream_with_agent("alice", "agent", {"n": 3}).__aenter__()
            with (
                astray(manager, "bob"),
                pytest.raises(CrossUserAccessError, match="stream of an agent"),
            ):
                await anext(stream)
            assert current_context() is alice
            assert [item async for item in stream] == numbers(3)
            await stream.__aexit__(None, None, None)
        [denied] = ledger.select("denied")
        assert denied.user_id == "bob"

    async def test_a_grant_covers_it(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        with running_as(manager, "alice"):
            stream = await manager.stream_with_agent("alice", "agent", {"n": 1}).__aenter__()
            with astray(manager, "bob"), manager.privileged(reason="shared screen", users=["alice"]):
                assert await anext(stream) == (0, "alice")
            await stream.__aexit__(None, None, None)

    async def test_one_at_a_time(self, manager: UserContextManager) -> None:
        async def agent() -> AsyncIterator[int]:
            await asyncio.Event().wait()
            yield 1

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(ConfigurationError, match="one reader at a time"):
                await anext(stream)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader

    async def test_a_reader_that_gave_up_loses_no_item(self, manager: UserContextManager) -> None:
        go_on = asyncio.Event()

        async def agent() -> AsyncIterator[int]:
            await go_on.wait()
            yield 1

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(stream)
            go_on.set()
            assert await anext(stream) == 1

    async def test_only_on_its_own_loop(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        async with manager.stream_with_agent("alice", "agent", {"n": 1}) as stream:

            async def elsewhere() -> None:
                await anext(stream)

            with pytest.raises(ConfigurationError, match="on the event loop that it was entered on"):
                await asyncio.to_thread(asyncio.run, elsewhere())

    async def test_only_inside_of_its_block_which_is_entered_once(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        stream = manager.stream_with_agent("alice", "agent", {"n": 1})
        with pytest.raises(ConfigurationError, match="async with"):
            await anext(stream)
        with pytest.raises(ConfigurationError, match="no result"):
            _ = stream.result
        async with stream:
            with pytest.raises(ConfigurationError, match="entered once"):
                await stream.__aenter__()


class TestItsEnd:
    async def test_broken_off_it_is_cancelled_and_closed_where_it_ran(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        ended: list[tuple[str, str]] = []

        async def agent() -> AsyncIterator[int]:
            task = asyncio.current_task()
            try:
                for number in range(1000):
                    yield number
            finally:
                assert asyncio.current_task() is task
                ended.append((current_context().user_id, current_run().agent_name))

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            async for item in stream:
                assert item == 0
                break
        assert ended == [("alice", "agent")]
        assert phases(ledger)[-1] == ("agent_failed", "agent", "cancelled")
        assert manager.get_active_contexts() == {}

    async def test_it_runs_no_further_ahead_than_it_may(self, make_manager: MakeManager) -> None:
        manager = make_manager(agents=AgentPolicy(queue_items=3))
        made: list[int] = []

        async def agent() -> AsyncIterator[int]:
            for number in range(100):
                made.append(number)
                yield number

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(made) == 4  # three wait, and one is held
            assert await anext(stream) == 0
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(made) == 5
            assert [item async for item in stream] == list(range(1, 100))

    async def test_what_it_raises_comes_after_its_items(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> AsyncIterator[int]:
            yield 1
            raise OSError("broken")

        stateless(manager, agent=agent)
        items = []
        async with manager.stream_with_agent("alice", "agent") as stream:
            with pytest.raises(OSError, match="broken"):
                async for item in stream:
                    items.append(item)
        assert items == [1]
        assert phases(ledger)[-1] == ("agent_failed", "agent", "failed")
        with pytest.raises(ConfigurationError, match="no result"):
            _ = stream.result

    async def test_the_deadline_holds_while_nobody_reads(self, manager: UserContextManager) -> None:
        async def agent() -> AsyncIterator[int]:
            yield 1
            await asyncio.Event().wait()

        stateless(manager, agent=agent)
        with pytest.raises(AgentTimeoutError):
            async with manager.stream_with_agent("alice", "agent", timeout=0.05) as stream:
                async for item in stream:
                    assert item == 1

    async def test_it_ends_with_the_context_that_it_was_begun_in(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> AsyncIterator[int]:
            yield 1
            await asyncio.Event().wait()

        stateless(manager, agent=agent)
        async with managed_user_context(manager.create_isolated_context("alice")):
            stream = await manager.stream_with_agent("alice", "agent").__aenter__()
            assert await anext(stream) == 1
        with pytest.raises(ContextClosedError):
            await anext(stream)
        await stream.__aexit__(None, None, None)
        assert phases(ledger)[-1] == ("agent_failed", "agent", "finished")

    async def test_an_error_that_nobody_read_up_to_is_logged_by_its_kind(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def agent() -> AsyncIterator[int]:
            yield 1
            raise OSError("a secret")

        stateless(manager, agent=agent)
        with caplog.at_level(logging.WARNING):
            async with manager.stream_with_agent("alice", "agent") as stream:
                assert await anext(stream) == 1
                for _ in range(20):
                    await asyncio.sleep(0)
        gc.collect()
        assert "a stream that was broken off failed: OSError" in caplog.text
        assert "a secret" not in caplog.text

    async def test_the_block_s_own_error_goes_first(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        with pytest.raises(ValueError, match="mine"):
            async with manager.stream_with_agent("alice", "agent", {"n": 9}):
                raise ValueError("mine")


class TestTheWrongWay:
    async def test_a_stream_is_not_executed(self, manager: UserContextManager) -> None:
        stateless(manager, agent=count)
        with pytest.raises(AgentError, match=r"agent 'agent': gives a stream; .*stream_with_agent"):
            await manager.execute_with_agent("alice", "agent", {"n": 1})

    async def test_what_gives_no_stream_is_not_read_as_one(self, manager: UserContextManager) -> None:
        async def agent() -> int:
            return 7

        def plain() -> int:
            return 7

        stateless(manager, agent=agent, plain=plain)
        for name, problem in (("agent", "gives no stream.*execute_with_agent"), ("plain", "is to be asynchronous")):
            with pytest.raises(AgentError, match=problem):
                async with manager.stream_with_agent("alice", name) as stream:
                    await anext(stream)
