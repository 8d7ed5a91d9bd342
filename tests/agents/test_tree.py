"""Runs inside of runs: the user stays, the tree is on record, and it ends somewhere."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from support.agents import Waiting, phases, stateless
from support.tracing import Sdk, about, carried, context_of, installed, written
from ucm_middleware import (
    ContextClosedError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    agent_run,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    with installed(Sdk()) as sdk:
        yield sdk


def parents(ledger: RecordingLedger) -> dict[str, str]:
    """The parent of each child context that is on record, by the names of what they do."""
    opened = ledger.select("child_opened")
    names = {record.request_id: str(dict(record.data)["operation"]) for record in opened}
    return {
        names[record.request_id]: names.get(str(dict(record.data)["parent_request_id"]), "root") for record in opened
    }


async def test_agents_as_tools_form_a_tree_of_one_user(manager: UserContextManager, ledger: RecordingLedger) -> None:
    async def planner(task: str) -> tuple[Any, Any]:
        return await asyncio.gather(
            manager.execute_with_agent("alice", "searcher", {"task": task}),
            manager.execute_with_agent("alice", "writer", {"task": task}),
        )

    async def searcher(task: str) -> str:
        return f"searched {task} {await manager.execute_with_agent('alice', 'reader')}"

    async def writer(task: str) -> str:
        return f"wrote {task} as {current_context().user_id}"

    async def reader() -> int:
        return current_context().operation_depth

    stateless(manager, planner=planner, searcher=searcher, writer=writer, reader=reader)
    found = await manager.execute_with_agent("alice", "planner", {"task": "it"})
    assert list(found) == ["searched it 3", "wrote it as alice"]
    assert parents(ledger) == {"planner": "root", "searcher": "planner", "writer": "planner", "reader": "searcher"}
    assert {record.user_id for record in ledger.records} == {"alice"}


async def test_hand_offs_that_a_framework_makes_itself(manager: UserContextManager, ledger: RecordingLedger) -> None:
    async def triage() -> tuple[str, str]:
        outer = current_run()
        async with agent_run(outer.context, "billing", {"reason": "an invoice"}) as run:
            assert current_run() is run
            assert current_context() is run.context
            with run.tool("invoices"):
                inner = current_run().agent_name
        assert current_run() is outer
        return inner, current_run().agent_name

    stateless(manager, triage=triage)
    assert await manager.execute_with_agent("alice", "triage") == ("billing", "triage")
    assert parents(ledger) == {"triage": "root", "billing": "triage"}
    assert phases(ledger) == [
        ("agent_started", "triage"),
        ("agent_started", "billing"),
        ("tool_executing", "billing", "invoices"),
        ("tool_completed", "billing", "invoices"),
        ("agent_completed", "billing"),
        ("agent_completed", "triage"),
    ]


async def test_a_child_of_a_run_that_is_no_run_belongs_to_it(manager: UserContextManager) -> None:
    async def agent() -> str:
        child = current_context().create_child_context("a step")
        with managed_user_context(child):
            return current_run().agent_name

    stateless(manager, agent=agent)
    assert await manager.execute_with_agent("alice", "agent") == "agent"


async def test_another_user_s_agent_is_not_called_from_a_run(manager: UserContextManager) -> None:
    async def mine() -> None:
        await manager.execute_with_agent("bob", "his")

    async def his() -> None:
        raise AssertionError("it ran")

    stateless(manager, mine=mine, his=his)
    with pytest.raises(CrossUserAccessError):
        await manager.execute_with_agent("alice", "mine")


async def test_the_tree_is_so_deep_and_no_deeper_and_the_error_names_the_agent(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    refused: list[ContextLimitError] = []

    async def deeper() -> int:
        try:
            return int(await manager.execute_with_agent("alice", "deeper"))
        except ContextLimitError as error:
            refused.append(error)
            return current_context().operation_depth

    stateless(manager, deeper=deeper)
    assert await manager.execute_with_agent("alice", "deeper") == 10
    [error] = refused
    assert error.scope == "depth"
    assert "agent 'deeper' was not run" in str(error)
    assert [phase[0] for phase in phases(ledger)] == ["agent_started"] * 10 + ["agent_completed"] * 10


async def test_what_ends_a_run_ends_those_inside_of_it(manager: UserContextManager, ledger: RecordingLedger) -> None:
    waiting = Waiting()

    async def outer() -> None:
        await manager.execute_with_agent("alice", "inner")

    stateless(manager, outer=outer, inner=waiting)
    with pytest.raises(TimeoutError):
        await manager.execute_with_agent("alice", "outer", timeout=0.05)
    ends = {(phase[1], phase[0]) for phase in phases(ledger) if phase[0] in ("agent_completed", "agent_failed")}
    assert ends == {("inner", "agent_failed"), ("outer", "agent_failed")}
    assert manager.get_active_contexts() == {}


async def test_a_run_left_by_its_parent_does_not_go_on(manager: UserContextManager) -> None:
    waiting = Waiting()
    left: list[asyncio.Task[Any]] = []

    async def outer() -> None:
        left.append(asyncio.create_task(manager.execute_with_agent("alice", "inner")))
        await waiting.started.acquire()

    stateless(manager, outer=outer, inner=waiting)
    await manager.execute_with_agent("alice", "outer")
    with pytest.raises(ContextClosedError):
        await left[0]
    with pytest.raises(ContextNotFoundError):
        current_run()


async def test_spans_have_the_tree_and_the_names_of_the_conventions(
    sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def outer() -> None:
        with current_run().tool("delegate", "call_1"), sdk.tracer.start_as_current_span("in the tool"):
            await manager.execute_with_agent("alice", "inner")

    async def inner() -> None:
        with pytest.raises(OSError, match="gone"), current_run().tool("read"):
            raise OSError("gone")

    stateless(manager, outer=outer, inner=inner)
    await manager.execute_with_agent("alice", "outer")
    tool, read = sdk.one("execute_tool delegate"), sdk.one("execute_tool read")
    run, sub_run, own = sdk.one("invoke_agent outer"), sdk.one("invoke_agent inner"), sdk.one("in the tool")
    for span, parent in ((tool, run), (own, tool), (sub_run, own), (read, sub_run)):
        assert span.parent is not None
        assert span.parent.span_id == context_of(parent).span_id, span.name
    assert dict(about(tool)).items() >= {
        ("gen_ai.operation.name", "execute_tool"),
        ("gen_ai.tool.name", "delegate"),
        ("gen_ai.tool.call.id", "call_1"),
        ("gen_ai.agent.name", "outer"),
        ("ucm.outcome", "ok"),
    }
    assert about(run)["gen_ai.operation.name"] == "invoke_agent"
    assert about(read)["ucm.outcome"] == "failed"
    assert read.status.is_ok is False
    assert (read.end_time or 0) > (read.start_time or 0)
    assert carried(sdk.spans) == written(ledger.records)
    assert sdk.metric("ucm.record.unexported") == 0
    assert sdk.metric("ucm.agent.stragglers") == 0
