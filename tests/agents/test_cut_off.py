"""Runs that are cut off: on record why, at the time that was promised, and with nothing left to them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.agents import Waiting, phases, stateless
from support.contexts import MakeManager
from ucm_middleware import (
    AgentError,
    AgentPolicy,
    AgentTimeoutError,
    ContextClosedError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.agents import launch
from ucm_middleware.testing import RecordingLedger


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HANDLER_GRACE", 0.05)


class Stubborn:
    """An agent that ignores its cancellation, until it is let go. ``contexts`` are those of its runs."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.contexts: list[UserExecutionContext] = []

    async def __call__(self) -> str:
        self.contexts.append(current_context())
        self.started.set()
        while not self.go_on.is_set():
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
        return "done"

    async def stream(self) -> AsyncIterator[str]:
        yield "first"
        yield await self()


@pytest.fixture
async def stubborn() -> AsyncIterator[Stubborn]:
    agent = Stubborn()
    yield agent
    agent.go_on.set()
    for _ in range(20):
        await asyncio.sleep(0)


class TestTheReason:
    @pytest.mark.parametrize("reason", ["revoked", "expired", "shutdown"])
    async def test_is_that_of_the_context_around_it(
        self, manager: UserContextManager, ledger: RecordingLedger, reason: Any
    ) -> None:
        waiting = Waiting()
        stateless(manager, outer=lambda: manager.execute_with_agent("alice", "inner"), inner=waiting)
        request = manager.create_isolated_context("alice")

        async def handler() -> None:
            async with managed_user_context(request):
                await manager.execute_with_agent("alice", "outer")

        handling = asyncio.ensure_future(handler())
        await waiting.started.acquire()
        request.close(reason)  # and its teardown waits for the handler
        with pytest.raises(ContextClosedError):
            await handling
        assert phases(ledger)[-2:] == [("agent_failed", "inner", reason), ("agent_failed", "outer", reason)]

    async def test_is_the_deadline_for_what_noticed_that_first(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def busy() -> None:
            context = current_context()
            while context.lifetime.permits_use:  # the loop gets no turn, so no timer fires
                pass
            context.require_usable()

        stateless(manager, busy=busy)
        with pytest.raises(AgentTimeoutError):
            await manager.execute_with_agent("alice", "busy", timeout=0.01)
        assert phases(ledger)[-1] == ("agent_failed", "busy", "expired")

    async def test_is_not_said_of_one_that_failed_before(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            raise OSError("no disk")

        stateless(manager, agent=agent)
        with pytest.raises(OSError, match="no disk"):
            await manager.execute_with_agent("alice", "agent")
        assert phases(ledger)[-1] == ("agent_failed", "agent", "failed")


class TestTheTime:
    @pytest.mark.usefixtures("short_grace")
    async def test_of_a_stream_whose_agent_ignores_its_end(
        self, manager: UserContextManager, ledger: RecordingLedger, stubborn: Stubborn
    ) -> None:
        stateless(manager, agent=stubborn.stream)
        items = []
        with pytest.raises(AgentTimeoutError, match="ignored its cancellation"):
            async with manager.stream_with_agent("alice", "agent", timeout=0.05) as stream:
                async for item in stream:
                    items.append(item)
        assert items == ["first"]
        assert phases(ledger)[-1] == ("agent_failed", "agent", "expired")
        assert [one.agent for one in manager.get_stragglers()] == ["agent"]

    async def test_begins_before_what_plugins_wrap_it_with(self, make_manager: MakeManager) -> None:
        class Slow:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_agent_run(self, context: Any, agent_name: str, parameters: Any) -> AsyncIterator[None]:
                await asyncio.Event().wait()
                yield

        manager = make_manager(plugins=[Slow()], agents=AgentPolicy(max_runs_per_user=1))
        stateless(manager, agent=Waiting())
        for _ in range(2):  # it leaves its place, too
            with pytest.raises(AgentTimeoutError):
                await manager.execute_with_agent("alice", "agent", timeout=0.02)
        assert manager.get_active_contexts() == {}

    async def test_holds_for_one_that_closed_its_own_context(self, manager: UserContextManager) -> None:
        ended: list[str] = []

        async def agent() -> None:
            current_context().close()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("ended")

        stateless(manager, agent=agent)
        with pytest.raises(AgentTimeoutError):
            await manager.execute_with_agent("alice", "agent", timeout=0.02)
        assert ended == ["ended"]

    async def test_is_over_whatever_the_agent_makes_of_its_cancellation(self, manager: UserContextManager) -> None:
        async def failing() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise OSError("the tool was broken off")

        async def grouped() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(failing())

        stateless(manager, failing=failing, grouped=grouped)
        for name in ("failing", "grouped"):
            with pytest.raises(AgentTimeoutError) as raised:
                await manager.execute_with_agent("alice", name, timeout=0.02)
            assert isinstance(raised.value.__cause__, (OSError, ExceptionGroup))

    @pytest.mark.usefixtures("short_grace")
    async def test_is_not_that_of_the_releases(self, manager: UserContextManager) -> None:
        async def agent() -> str:
            current_context().callback(asyncio.sleep, 0.2)
            return "done"

        stateless(manager, agent=agent)
        assert await manager.execute_with_agent("alice", "agent", timeout=0.05) == "done"
        assert manager.get_stragglers() == []

    @pytest.mark.usefixtures("short_grace")
    async def test_of_its_releases_is_waited_for_by_who_is_cancelled(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        started = asyncio.Event()
        released: list[str] = []

        async def release() -> None:
            await asyncio.sleep(0.2)
            released.append("released")

        async def agent() -> None:
            current_context().callback(release)
            started.set()
            await asyncio.Event().wait()

        stateless(manager, agent=agent)
        running = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert released == ["released"]
        assert "ignored its cancellation" not in caplog.text


class TestWhatIsLeftToIt:
    @pytest.mark.usefixtures("short_grace")
    @pytest.mark.parametrize("how", ["cancelled", "out of time"])
    async def test_no_context_while_its_request_goes_on(
        self, manager: UserContextManager, stubborn: Stubborn, how: str
    ) -> None:
        stateless(manager, agent=stubborn)
        async with managed_user_context(manager.create_isolated_context("alice", db_session=[])) as request:
            seconds = None if how == "cancelled" else 0.05
            running = asyncio.ensure_future(manager.execute_with_agent("alice", "agent", timeout=seconds))
            await stubborn.started.wait()
            if how == "cancelled":
                running.cancel()
            with pytest.raises((asyncio.CancelledError, AgentTimeoutError)):
                await running
            assert request.is_open
            [context] = stubborn.contexts
            with pytest.raises(ContextClosedError):
                context.require_usable()
            assert len(manager.get_stragglers()) == 1
            stubborn.go_on.set()

    async def test_nothing_when_the_code_that_waits_is_thrown_away(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        waiting = Waiting()
        stateless(manager, agent=waiting)

        async def asks() -> None:
            with contextlib.suppress(ContextClosedError):
                await manager.execute_with_agent("alice", "agent")

        coroutine = asks()
        coroutine.send(None)
        await waiting.started.acquire()
        coroutine.close()  # as a loop does with what is left when it is closed
        for _ in range(20):
            await asyncio.sleep(0)
        assert phases(ledger)[-1] == ("agent_failed", "agent", "cancelled")
        assert manager.get_active_contexts() == {}

    async def test_the_reader_of_a_stream_that_somebody_left_is_told(self, manager: UserContextManager) -> None:
        async def agent() -> AsyncIterator[int]:
            yield 1
            await asyncio.Event().wait()

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            assert await anext(stream) == 1
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
        with pytest.raises(AgentError, match="its stream was left") as raised:
            await reading
        assert "cancelled itself" not in str(raised.value)
