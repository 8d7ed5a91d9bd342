"""Runs that are asked for, read or gone on with from where they should not be."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest

from support.agents import astray, phases, stateless
from support.contexts import MakeManager, running_as
from ucm_middleware import (
    AgentError,
    AgentRun,
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    create_isolated_execution_context,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.audit import Row
from ucm_middleware.testing import RecordingLedger

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def whoami() -> tuple[str, str, int]:
    return current_context().user_id, variable.get(), current_context().operation_depth


class TestAStream:
    async def test_its_result_is_its_user_s(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        async def agent() -> AsyncIterator[int]:
            current_run().result = "a secret"
            yield 1

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            assert [item async for item in stream] == [1]
        assert stream.result == "a secret"
        with astray(manager, "bob"), pytest.raises(CrossUserAccessError):
            _ = stream.result
        [denied] = ledger.select("denied")
        assert denied.user_id == "bob"

    async def test_its_items_go_with_its_block(self, manager: UserContextManager) -> None:
        async def agent() -> AsyncIterator[int]:
            for number in range(100):
                yield number

        stateless(manager, agent=agent)
        async with manager.stream_with_agent("alice", "agent") as stream:
            assert await anext(stream) == 0
            for _ in range(50):
                await asyncio.sleep(0)
        with pytest.raises(AgentError, match="its stream was left"):
            await anext(stream)


class TestTheContextThatAsks:
    async def test_made_by_hand_has_no_runs_that_are_on_no_record(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        stateless(manager, agent=whoami)
        async with managed_user_context(create_isolated_execution_context("alice")):
            assert await manager.execute_with_agent("alice", "agent") == ("alice", "unset", 1)
        assert [phase[0] for phase in phases(ledger)] == ["agent_started", "agent_completed"]

    async def test_of_another_manager_has_none_either(
        self, manager: UserContextManager, ledger: RecordingLedger, make_manager: MakeManager
    ) -> None:
        elsewhere = RecordingLedger()
        stateless(manager, agent=whoami)
        with running_as(make_manager(ledger=elsewhere), "alice"):
            await manager.execute_with_agent("alice", "agent")
        assert [phase[0] for phase in phases(ledger)] == ["agent_started", "agent_completed"]
        assert phases(elsewhere) == []

    async def test_of_another_manager_and_user_gives_nothing_along(
        self, manager: UserContextManager, make_manager: MakeManager
    ) -> None:
        stateless(manager, agent=whoami)
        manager.serve()
        with running_as(make_manager(), "bob"):
            variable.set("bob's")
            with manager.privileged(reason="support", users=["alice"]):
                assert await manager.execute_with_agent("alice", "agent") == ("alice", "unset", 1)

    async def test_lives_on_another_loop(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        async def agent() -> int:
            with current_run().tool("look"):
                return current_context().operation_depth

        stateless(manager, agent=agent)
        async with managed_user_context(manager.create_isolated_context("alice")):
            found = await asyncio.to_thread(lambda: asyncio.run(manager.execute_with_agent("alice", "agent")))
        assert found == 1
        assert phases(ledger)[-1] == ("agent_completed", "agent")
        assert manager.get_active_contexts() == {}

    @pytest.mark.ucm_leaks("the handler is cut off, and what it shields is not")
    async def test_is_revoked_while_its_run_is_on_another_loop(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        running = threading.Event()

        async def agent() -> None:
            running.set()
            await asyncio.Event().wait()

        stateless(manager, agent=agent)

        async def handler() -> None:
            async with managed_user_context(manager.create_isolated_context("alice")):
                asking = manager.execute_with_agent("alice", "agent")
                await asyncio.shield(asyncio.to_thread(asyncio.run, asking))

        handling = asyncio.ensure_future(handler())
        assert await asyncio.to_thread(running.wait, 10)
        assert manager.revoke("alice", "signed out") == 1
        with pytest.raises(ContextClosedError, match="revoked"):
            await handling
        assert phases(ledger)[-1] == ("agent_failed", "agent", "revoked")
        assert manager.get_active_contexts() == {}


class TestAToolAfterTheEnd:
    async def test_is_not_called_in_a_release(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        refused: list[Exception] = []

        def release(run: AgentRun) -> None:
            try:
                run.tool("late")
            except ContextClosedError as error:
                refused.append(error)

        async def agent() -> None:
            current_context().callback(release, current_run())

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert len(refused) == 1
        assert [phase[0] for phase in phases(ledger)] == ["agent_started", "agent_completed"]

    async def test_of_a_thread_that_begins_it_in_that_moment_has_an_end_on_record(
        self, make_manager: MakeManager
    ) -> None:
        runs: list[AgentRun] = []

        class EndsIt(RecordingLedger):
            def append(self, row: Row) -> None:
                super().append(row)
                if ("phase", "tool_executing") in self.records[-1].data:
                    runs[0].end(None)

        ledger = EndsIt()
        manager = make_manager(ledger=ledger)

        async def agent() -> None:
            runs.append(current_run())
            with pytest.raises(ContextClosedError):
                current_run().tool("late")

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert [phase[0] for phase in phases(ledger)].count("tool_completed") == 1
