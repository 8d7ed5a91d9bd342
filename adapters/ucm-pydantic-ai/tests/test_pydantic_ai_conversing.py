"""Runs that go on with a conversation: one after another, kept when they end well, and paused for an approval."""

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, DeferredToolRequests, RunContext, UsageLimits
from pydantic_ai.conversation_store import InMemoryConversationStore
from pydantic_ai.exceptions import CallDeferred, ModelRetry, UnexpectedModelBehavior, UsageLimitExceeded
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import DeferredToolResults

from ucm_middleware import (
    AgentParametersError,
    InvalidContextError,
    UserContextManager,
    UserExecutionContext,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import PydanticAI


def prompts(messages: list[ModelMessage]) -> list[object]:
    return [part.content for message in messages for part in message.parts if part.part_kind == "user-prompt"]


async def recount(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    await asyncio.sleep(0)
    return ModelResponse(parts=[TextPart(" ".join(map(str, prompts(messages))))])


class Unhurried(InMemoryConversationStore):
    """Takes as many turns of the loop to write as a disk does."""

    async def write_record(self, *given: Any, **named: Any) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        await super().write_record(*given, **named)


@pytest.fixture
def plugin() -> PydanticAI:
    return PydanticAI(conversations=Unhurried())


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(plugin: PydanticAI, ledger: RecordingLedger) -> UserContextManager:
    manager = UserContextManager(plugins=[plugin], secret="a-secret-of-the-test-0123456789-abcdef", ledger=ledger)
    manager.register_agent("recounts", lambda context: Agent(FunctionModel(recount)))
    return manager


async def say(manager: UserContextManager, user_id: str, prompt: str, **given: Any) -> Any:
    asked = {"prompt": prompt, "conversation_id": "c1", **given}
    return (await manager.execute_with_agent(user_id, "recounts", asked)).output


async def test_a_conversation_goes_on(manager: UserContextManager, plugin: PydanticAI) -> None:
    assert await say(manager, "alice", "one") == "one"
    assert await say(manager, "bob", "other") == "other"
    assert await say(manager, "alice", "two") == "one two"
    assert await say(manager, "alice", "three", conversation_id="c2") == "three"
    async with managed_user_context(manager.create_isolated_context("alice")):
        assert plugin.conversations is not None
        listed = await plugin.conversations.list_conversations()
        assert [record.conversation_id for record in listed] == ["c2", "c1"]


async def test_a_conversation_has_no_end(manager: UserContextManager) -> None:
    for turn in range(60):
        assert (await say(manager, "alice", f"{turn}")).split()[-1] == f"{turn}"


async def test_limits_that_are_given_are_for_the_whole_conversation(manager: UserContextManager) -> None:
    limits = UsageLimits(request_limit=2)
    for turn in ("one", "two"):
        await say(manager, "alice", turn, usage_limits=limits)
    with pytest.raises(UsageLimitExceeded):
        await say(manager, "alice", "three", usage_limits=limits)


async def test_one_run_may_make_as_many_requests_as_the_framework_lets_it(manager: UserContextManager) -> None:
    async def again(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[ToolCallPart("more", {})])

    async def more() -> str:
        return "there is more"

    manager.register_agent("never", lambda context: Agent(FunctionModel(again), tools=[more]))
    await say(manager, "alice", "one")
    with pytest.raises(UsageLimitExceeded, match="51"):
        await manager.execute_with_agent("alice", "never", {"prompt": "go on", "conversation_id": "c1"})


async def test_turns_at_once_go_on_one_after_another(manager: UserContextManager) -> None:
    last = await asyncio.gather(*(say(manager, "alice", word) for word in ("a", "b", "c")))
    assert sorted(map(len, last)) == [1, 3, 5]
    assert sorted((await say(manager, "alice", "d")).split()) == ["a", "b", "c", "d"]


async def test_users_at_once_wait_for_nobody_else(manager: UserContextManager) -> None:
    """Though all say the same name."""
    let_go = asyncio.Event()

    async def wait(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        await let_go.wait()
        return ModelResponse(parts=[TextPart("done")])

    manager.register_agent("waits", lambda context: Agent(FunctionModel(wait)))
    asked = {"prompt": "hello", "conversation_id": "c1"}
    waiting = asyncio.create_task(manager.execute_with_agent("alice", "waits", asked))
    await asyncio.sleep(0)
    assert await say(manager, "bob", "one") == "one"
    let_go.set()
    await waiting


async def test_a_turn_that_fails_is_not_kept(manager: UserContextManager) -> None:
    def fail(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise OSError("down")

    manager.register_agent("fails", lambda context: Agent(FunctionModel(fail)))
    await say(manager, "alice", "one")
    with pytest.raises(OSError, match="down"):
        await manager.execute_with_agent("alice", "fails", {"prompt": "two", "conversation_id": "c1"})
    assert await say(manager, "alice", "three") == "one three"


async def test_a_stream_s_turn_is_kept_before_its_end_is_read(manager: UserContextManager) -> None:
    asked = {"prompt": "one", "conversation_id": "c1"}
    manager.register_agent("streams", lambda context: Agent(TestModel(custom_output_text="hello")))
    async with manager.stream_with_agent("alice", "streams", asked) as stream:
        async for item in stream:
            if item.event_kind == "agent_run_result":
                break
    assert await say(manager, "alice", "two") == "one two"


async def test_a_sub_agent_in_the_same_conversation_is_told_so_and_waits_for_nothing(
    manager: UserContextManager,
) -> None:
    async def ask(ctx: RunContext[UserExecutionContext]) -> str:
        return str(await say(manager, ctx.deps.user_id, "inner"))

    manager.register_agent("asks", lambda context: Agent(TestModel(), deps_type=UserExecutionContext, tools=[ask]))
    with pytest.raises(AgentParametersError, match="a run around this one"):
        await manager.execute_with_agent("alice", "asks", {"prompt": "outer", "conversation_id": "c1"}, timeout=10)
    await manager.execute_with_agent("alice", "asks", {"prompt": "outer", "conversation_id": "c2"}, timeout=10)
    assert await say(manager, "alice", "more") == "inner more"


async def test_a_run_that_waits_for_an_approval_goes_on_for_its_user_alone(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    deleted = []

    def delete(ctx: RunContext[UserExecutionContext], what: str) -> str:
        deleted.append((ctx.deps.user_id, what))
        return "deleted"

    def want(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) > 1:
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[ToolCallPart("delete", {"what": "all"}, tool_call_id="call-1")])

    def new_agent(context: UserExecutionContext) -> Agent[Any, Any]:
        agent = Agent(FunctionModel(want), deps_type=UserExecutionContext, output_type=[str, DeferredToolRequests])
        agent.tool(requires_approval=True)(delete)
        return agent

    manager.register_agent("cleans", new_agent)
    result = await manager.execute_with_agent("alice", "cleans", {"prompt": "clean up", "conversation_id": "c1"})
    assert [call.tool_call_id for call in result.output.approvals] == ["call-1"]
    assert deleted == []
    yes = {"deferred_tool_results": DeferredToolResults(approvals={"call-1": True}), "conversation_id": "c1"}
    with pytest.raises(Exception, match="message history"):
        await manager.execute_with_agent("bob", "cleans", yes)  # there is nothing in bob's conversation to approve
    assert deleted == []
    result = await manager.execute_with_agent("alice", "cleans", yes)
    assert result.output == "done"
    assert deleted == [("alice", "all")]


async def test_a_tool_that_puts_its_call_off_has_not_failed(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    def later() -> str:
        raise CallDeferred

    def fails() -> str:
        raise ModelRetry("again")

    agent: Agent[Any, Any] = Agent(TestModel(), tools=[later], output_type=[str, DeferredToolRequests])
    manager.register_agent("later", lambda context: agent)
    manager.register_agent("fails", lambda context: Agent(TestModel(), tools=[fails], retries=0))
    result = await manager.execute_with_agent("alice", "later", {"prompt": "hello"})
    assert [call.tool_name for call in result.output.calls] == ["later"]
    with pytest.raises(UnexpectedModelBehavior):
        await manager.execute_with_agent("alice", "fails", {"prompt": "hello"})
    ends = [record for record in ledger.select("agent_run") if dict(record.data)["phase"] == "tool_completed"]
    assert [(dict(end.data)["tool"], end.outcome) for end in ends] == [("later", "ok"), ("fails", "failed")]


async def test_a_bad_conversation_id_is_refused(manager: UserContextManager) -> None:
    with pytest.raises(InvalidContextError, match="client_id"):
        await say(manager, "alice", "one", conversation_id="a\nb")


async def test_without_a_store_a_conversation_is_refused_and_the_remedy_named() -> None:
    manager = UserContextManager(plugins=[PydanticAI()])
    manager.register_agent("recounts", lambda context: Agent(FunctionModel(recount)))
    with pytest.raises(AgentParametersError, match="SQLiteConversationStore"):
        await say(manager, "alice", "one")
