"""PydanticAI: agents run by name, each run as one user, told as it goes."""

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ThinkingPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.run import AgentRunResult, AgentRunResultEvent

from support.events import connect, settled
from ucm_middleware import (
    UserContextManager,
    UserExecutionContext,
    current_context,
)
from ucm_pydantic_ai import Prepared, PydanticAI, UserRuns

support = Agent(TestModel(), deps_type=UserExecutionContext, name="support")


@support.tool
async def who(ctx: RunContext[UserExecutionContext]) -> str:
    assert ctx.deps is current_context()
    return ctx.deps.user_id


@support.tool_plain
def who_in_a_thread() -> str:
    return current_context().user_id


@pytest.fixture
def manager() -> UserContextManager:
    manager = UserContextManager(plugins=[PydanticAI()])
    manager.register_agent("support", lambda context: support, stateless=True)
    return manager


async def test_a_run_gives_what_the_framework_gives(manager: UserContextManager) -> None:
    result = await manager.execute_with_agent("alice", "support", {"prompt": "hello"})
    assert isinstance(result, AgentRunResult)
    assert result.output == '{"who":"alice","who_in_a_thread":"alice"}'


async def test_a_stream_gives_the_framework_s_events_and_has_its_result(manager: UserContextManager) -> None:
    async with manager.stream_with_agent("alice", "support", {"prompt": "hello"}) as stream:
        events = [event async for event in stream]
        assert isinstance(events[-1], AgentRunResultEvent)
        assert stream.result is events[-1].result
    assert stream.result.output == '{"who":"alice","who_in_a_thread":"alice"}'


def thinking(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    if len(messages) > 1:
        return ModelResponse(parts=[TextPart("done")])
    return ModelResponse(parts=[ThinkingPart("what may it be?"), ToolCallPart("who", {}, tool_call_id="call-1")])


@pytest.mark.parametrize("way", ["fast", "public"])
async def test_the_user_is_told_of_each_step(manager: UserContextManager, way: str) -> None:
    agent = Agent(FunctionModel(thinking), deps_type=UserExecutionContext, tools=[who])
    given = Prepared(agent) if way == "fast" else Prepared(agent, capabilities=[])
    if way == "public":
        agent = Agent(FunctionModel(thinking), deps_type=UserExecutionContext, tools=[who], capabilities=[UserRuns()])
        given = Prepared(agent)
    manager.register_agent("thinker", lambda context: given, stateless=True)
    alice, heard, _ = connect(manager, "alice")
    bob, of_bob, _ = connect(manager, "bob")
    await manager.execute_with_agent("alice", "thinker", {"prompt": "hello"})
    await settled()
    told = [(envelope["type"], envelope["data"]) for envelope in heard.envelopes]
    assert [event for event, _ in told] == [
        "agent_started",
        "agent_thinking",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "agent_thinking",
        "agent_completed",
    ]
    assert told[2][1]["text"] == "what may it be?"
    assert (told[3][1]["tool"], told[3][1]["call_id"]) == ("who", "call-1")
    assert of_bob.envelopes == []
    for context in (alice, bob):
        context.close()
