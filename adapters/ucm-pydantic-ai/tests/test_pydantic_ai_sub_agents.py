"""Agents in the tools of agents: sub-runs of the same user, as a tree that the trail shows."""

import asyncio
import threading
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.test import TestModel

from ucm_middleware import (
    ContextLimitError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import Prepared, PydanticAI, UserRuns


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(ledger: RecordingLedger) -> UserContextManager:
    return UserContextManager(plugins=[PydanticAI()], ledger=ledger)


def where() -> str:
    run = current_run()
    return f"{run.agent_name} at {run.context.operation_depth} for {current_context().user_id}"


def phases(ledger: RecordingLedger) -> list[tuple[object, object]]:
    """What was told of which agent, in order."""
    told = [dict(record.data) for record in ledger.select("agent_run")]
    return [(data["phase"], data["agent"]) for data in told]


def parents(ledger: RecordingLedger, user_id: str) -> dict[str, str | None]:
    """The tree of a user's runs: below which agent each was run."""
    opened = ledger.select("child_opened", user=user_id)
    names = {one.request_id: str(dict(one.data)["operation"]) for one in opened}
    return {names[one.request_id]: names.get(str(dict(one.data)["parent_request_id"])) for one in opened}


researcher = Agent(TestModel(), name="researcher", tools=[where], capabilities=[UserRuns()])


async def research(ctx: RunContext[UserExecutionContext]) -> str:
    return (await researcher.run("look", deps=ctx.deps, usage=ctx.usage)).output


async def test_a_sub_agent_is_a_run_of_the_same_user_below_the_other(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    writer = Agent(TestModel(), deps_type=UserExecutionContext, tools=[research, where])
    manager.register_agent("writer", lambda context: writer, stateless=True)
    result = await manager.execute_with_agent("alice", "writer", {"prompt": "write"})
    assert "researcher at 2 for alice" in result.output
    assert "writer at 1 for alice" in result.output
    names = [told for told in phases(ledger) if told[0] in ("agent_started", "agent_completed")]
    assert names == [
        ("agent_started", "writer"),
        ("agent_started", "researcher"),
        ("agent_completed", "researcher"),
        ("agent_completed", "writer"),
    ]
    assert parents(ledger, "alice") == {"writer": None, "researcher": "writer"}


async def test_one_registered_by_name_is_a_sub_run_too(manager: UserContextManager, ledger: RecordingLedger) -> None:
    async def ask(ctx: RunContext[UserExecutionContext]) -> str:
        return str((await manager.execute_with_agent(ctx.deps.user_id, "inner", {"prompt": "look"})).output)

    async def ask_for_bob() -> str:
        return str((await manager.execute_with_agent("bob", "inner", {"prompt": "look"})).output)

    manager.register_agent("inner", lambda context: Agent(TestModel(), tools=[where]))
    manager.register_agent("outer", lambda context: Agent(TestModel(), deps_type=UserExecutionContext, tools=[ask]))
    manager.register_agent("crosses", lambda context: Agent(TestModel(), tools=[ask_for_bob]))
    result = await manager.execute_with_agent("alice", "outer", {"prompt": "go"})
    assert "inner at 2 for alice" in result.output
    with pytest.raises(CrossUserAccessError):
        await manager.execute_with_agent("alice", "crosses", {"prompt": "go"})
    assert ledger.select("denied", user="alice")
    assert not ledger.select(user="bob")


async def test_sub_agents_at_once_are_each_a_run_of_their_own(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def research_twice(ctx: RunContext[UserExecutionContext]) -> str:
        return " ".join(await asyncio.gather(research(ctx), research(ctx)))

    manager.register_agent(
        "writer", lambda context: Agent(TestModel(), deps_type=UserExecutionContext, tools=[research_twice])
    )
    outputs = await asyncio.gather(
        *(manager.execute_with_agent(user_id, "writer", {"prompt": "write"}) for user_id in ("alice", "bob"))
    )
    for user_id, result in zip(("alice", "bob"), outputs, strict=True):
        assert result.output.count(f"researcher at 2 for {user_id}") == 2
    began = [
        (record.user_id, record.request_id)
        for record in ledger.select("agent_run")
        if dict(record.data)["phase"] == "agent_started" and dict(record.data)["agent"] == "researcher"
    ]
    assert len(set(began)) == 4
    assert [user_id for user_id, _ in sorted(began)] == ["alice", "alice", "bob", "bob"]


async def test_agents_that_call_each_other_for_ever_end_at_the_limit(manager: UserContextManager) -> None:
    deepest = 0

    async def again(ctx: RunContext[UserExecutionContext]) -> str:
        nonlocal deepest
        deepest = max(deepest, current_run().context.operation_depth)
        return (await endless.run("go on", deps=ctx.deps)).output

    endless = Agent(
        TestModel(), name="endless", deps_type=UserExecutionContext, tools=[again], capabilities=[UserRuns()]
    )
    manager.register_agent("endless", lambda context: endless, stateless=True)
    with pytest.raises(ContextLimitError, match="endless"):
        await manager.execute_with_agent("alice", "endless", {"prompt": "go"})
    assert deepest == 10
    assert not manager.get_active_contexts()


async def test_a_sub_agent_s_stream_is_a_sub_run(manager: UserContextManager) -> None:
    async def read(ctx: RunContext[UserExecutionContext]) -> str:
        async with researcher.run_stream("look", deps=ctx.deps) as stream:
            return str(await stream.get_output())

    manager.register_agent("reader", lambda context: Agent(TestModel(), deps_type=UserExecutionContext, tools=[read]))
    result = await manager.execute_with_agent("alice", "reader", {"prompt": "go"})
    assert "researcher at 2 for alice" in result.output


async def test_an_agent_that_brings_the_capability_is_one_run_when_run_by_name(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    manager.register_agent("by name", lambda context: researcher, stateless=True)
    result = await manager.execute_with_agent("alice", "by name", {"prompt": "look"})
    assert "by name at 1 for alice" in result.output
    assert [agent for phase, agent in phases(ledger) if phase == "agent_started"] == ["by name"]
    assert [agent for phase, agent in phases(ledger) if phase == "tool_executing"] == ["by name"]


async def test_a_sub_agent_s_thread_is_its_own(manager: UserContextManager) -> None:
    began, let_go = threading.Event(), threading.Event()

    def wait() -> str:
        began.set()
        let_go.wait(30)
        return "done"

    slow = Agent(TestModel(), name="slow", tools=[wait], capabilities=[UserRuns()])

    async def ask() -> str:
        return (await slow.run("wait")).output

    manager.register_agent("outer", lambda context: Agent(TestModel(), tools=[ask]))
    run = asyncio.create_task(manager.execute_with_agent("alice", "outer", {"prompt": "go"}))
    await asyncio.to_thread(began.wait, 30)
    run.cancel()
    await asyncio.wait([run])
    assert [(one.agent, one.tool) for one in manager.get_stragglers()] == [("slow", "wait")]
    let_go.set()


@pytest.mark.parametrize("way", ["by name", "with the capability"])
async def test_an_agent_that_runs_itself_is_told_once(
    manager: UserContextManager, ledger: RecordingLedger, way: str
) -> None:
    async def again(ctx: RunContext[UserExecutionContext]) -> str:
        if current_run().context.operation_depth > 1:
            return where()
        if way == "by name":
            return str((await manager.execute_with_agent("alice", "itself", {"prompt": "on"})).output)
        return (await itself.run("on", deps=ctx.deps, capabilities=[UserRuns()])).output

    itself = Agent(TestModel(), name="itself", deps_type=UserExecutionContext, tools=[again])
    manager.register_agent("itself", lambda context: itself, stateless=True)
    result = await manager.execute_with_agent("alice", "itself", {"prompt": "go"})
    assert "itself at 2 for alice" in result.output
    told = [phase for phase, _ in phases(ledger)]
    assert [told.count(phase) for phase in ("agent_started", "agent_thinking", "tool_executing")] == [2, 4, 2]
    called = [one.request_id for one in ledger.select("agent_run") if dict(one.data)["phase"] == "tool_executing"]
    assert len(set(called)) == 2


async def test_deps_of_another_user_are_refused_before_anything_is_asked(manager: UserContextManager) -> None:
    model = TestModel()
    agent = Agent(model, deps_type=UserExecutionContext, capabilities=[UserRuns()])
    bob = manager.create_isolated_context("bob")
    async with managed_user_context(manager.create_isolated_context("alice")):
        with pytest.raises(CrossUserAccessError):
            await agent.run("hello", deps=bob)
    assert model.last_model_request_parameters is None


async def test_an_agent_without_the_capability_runs_as_the_user_and_tells_nothing(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    plain = Agent(TestModel(), name="plain", tools=[where])

    async def ask() -> str:
        return (await plain.run("look")).output

    manager.register_agent("outer", lambda context: Agent(TestModel(), tools=[ask]))
    result = await manager.execute_with_agent("alice", "outer", {"prompt": "go"})
    assert "outer at 1 for alice" in result.output
    assert {agent for _, agent in phases(ledger)} == {"outer"}


async def test_what_is_settled_for_a_run_is_settled(manager: UserContextManager) -> None:
    class Deps:
        def __init__(self, context: UserExecutionContext) -> None:
            self.user_id = context.user_id

    def name(ctx: RunContext[Deps]) -> str:
        return ctx.deps.user_id

    agent = Agent(TestModel(), deps_type=Deps, tools=[name])

    def factory(context: UserExecutionContext) -> Prepared:
        return Prepared(agent, deps=Deps(context), model=TestModel(custom_output_text=f"hello {context.user_id}"))

    manager.register_agent("named", factory, stateless=True)
    outputs: list[Any] = await asyncio.gather(
        *(manager.execute_with_agent(user_id, "named", {"prompt": "hi"}) for user_id in ("alice", "bob"))
    )
    assert [result.output for result in outputs] == ["hello alice", "hello bob"]
