"""A run of alice's that bob's code goes on with, step by step: by iter(), by run_stream(), by a node's own stream."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel, field_validator
from pydantic_ai import Agent, ModelRequestNode
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.run import AgentRun

from support.agents import phases
from ucm_middleware import (
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    current_context,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import PydanticAI, UserRuns

T = TypeVar("T")

ran_as: list[str] = []
"""Whom each piece of the application's code ran as."""


def here() -> str:
    ran_as.append(current_context().user_id)
    return ran_as[-1]


@pytest.fixture(autouse=True)
def nobody_ran_yet() -> None:
    ran_as.clear()


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(ledger: RecordingLedger) -> UserContextManager:
    return UserContextManager(plugins=[PydanticAI()], ledger=ledger)


async def as_user(manager: UserContextManager, user_id: str, work: Callable[[], Awaitable[T]]) -> T:
    """In a Context of its own, as another request's handler is."""

    async def handler() -> T:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            return await work()

    return await asyncio.Task(handler(), context=Context(), loop=asyncio.get_running_loop())


async def refused(manager: UserContextManager, work: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(CrossUserAccessError):
        await as_user(manager, "bob", work)


# The prompts of a run.


def prompted(*capabilities: UserRuns) -> tuple[Agent[None, str], list[str]]:
    """An agent with a prompt of the user's own, and what its model was told."""
    told: list[str] = []

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        told.append(f"{messages} {info.instructions}")
        yield "ok"

    def answer_at_once(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        told.append(f"{messages} {info.instructions}")
        return ModelResponse(parts=[TextPart("ok")])

    agent = Agent(FunctionModel(answer_at_once, stream_function=answer), capabilities=capabilities)

    @agent.system_prompt
    def _balance() -> str:
        return f"secret of {here()}"

    @agent.instructions
    def _manners() -> str:
        return f"be kind to {here()}"

    return agent, told


async def test_bare_alice_s_model_is_told_a_secret_of_bob_s_who_took_a_step(manager: UserContextManager) -> None:
    agent, told = prompted()

    async def alice() -> None:
        async with agent.iter("hello") as run:
            node = await as_user(manager, "bob", lambda: take_a_step(run))
            await run.next(node)

    await as_user(manager, "alice", alice)
    assert "secret of bob" in told[0]


async def take_a_step(run: AgentRun[None, str]) -> Any:
    node = run.next_node
    assert not Agent.is_end_node(node)
    return await run.next(node)


async def test_a_step_of_bob_s_is_refused_and_alice_goes_on(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    agent, told = prompted(UserRuns())

    async def alice() -> str:
        async with agent.iter("hello") as run:
            await refused(manager, lambda: take_a_step(run))
            async for _ in run:
                pass
        assert run.result is not None
        return run.result.output

    assert await as_user(manager, "alice", alice) == "ok"
    assert set(ran_as) == {"alice"}
    assert "secret of alice" in told[0]
    assert len(ledger.select("denied", user="bob")) == 1


async def test_a_request_that_bob_streams_himself_asks_for_no_instructions_of_his(manager: UserContextManager) -> None:
    agent, told = prompted(UserRuns())

    async def alice() -> None:
        async with agent.iter("hello") as run:
            node = await take_a_step(run)
            assert isinstance(node, ModelRequestNode)

            async def bob() -> None:
                async with node.stream(run.ctx):
                    pass

            await refused(manager, bob)
            assert told == []
            await run.next(node)

    await as_user(manager, "alice", alice)
    assert set(ran_as) == {"alice"}
    assert "bob" not in told[0]


# The output of a run.


class Order(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _known(cls, text: str) -> str:
        here()
        return text


def pay(amount: int) -> str:
    return f"paid {amount} by {here()}"


def by_a_function() -> Agent[None, Any]:
    return Agent(TestModel(custom_output_args={"amount": 5}), output_type=pay, capabilities=[UserRuns()])


def by_a_validator() -> Agent[None, Any]:
    agent = Agent(TestModel(), capabilities=[UserRuns()])

    @agent.output_validator
    def _checked(text: str) -> str:
        return text + here()

    return agent


def by_its_type() -> Agent[None, Any]:
    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        yield '{"text": "tea"}'

    def answer_at_once(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart('{"text": "tea"}')])

    model = FunctionModel(answer_at_once, stream_function=answer)
    return Agent(model, output_type=NativeOutput(Order), capabilities=[UserRuns()])


OUTPUTS = pytest.mark.parametrize("of", [by_a_function, by_a_validator, by_its_type], ids=lambda of: of.__name__)


@OUTPUTS
async def test_an_output_is_not_made_for_bob_who_takes_the_last_step(
    manager: UserContextManager, of: Callable[[], Agent[None, Any]]
) -> None:
    async def alice() -> None:
        async with of().iter("hello") as run:
            await take_a_step(run)
            answered = await take_a_step(run)
            assert Agent.is_call_tools_node(answered)
            ran_as.clear()
            await refused(manager, lambda: take_a_step(run))

            async def stream() -> None:
                async with answered.stream(run.ctx) as events:
                    async for _ in events:
                        pass

            await refused(manager, stream)

    await as_user(manager, "alice", alice)
    assert ran_as == []


@OUTPUTS
async def test_an_output_is_not_made_for_bob_who_reads_run_stream(
    manager: UserContextManager, of: Callable[[], Agent[None, Any]]
) -> None:
    async def alice() -> None:
        async with of().run_stream("hello") as stream:
            ran_as.clear()
            await refused(manager, stream.get_output)
            await refused(manager, lambda: stream.validate_response_output(stream.response))

    await as_user(manager, "alice", alice)
    assert ran_as == []


@OUTPUTS
async def test_alice_has_it(manager: UserContextManager, of: Callable[[], Agent[None, Any]]) -> None:
    async def alice() -> None:
        await of().run("hello")
        ran_as.append("and")
        async with of().run_stream("hello") as stream:
            await stream.get_output()

    await as_user(manager, "alice", alice)
    assert ran_as[0] == ran_as[-1] == "alice"
    assert set(ran_as) == {"alice", "and"}


# What a model streams.


async def test_a_model_that_streams_goes_on_for_alice_alone(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        for _ in range(3):
            yield here()

    agent = Agent(FunctionModel(stream_function=answer), capabilities=[UserRuns()])

    async def alice() -> None:
        async with agent.run_stream("hello") as stream:

            async def bob() -> list[str]:
                return [text async for text in stream.stream_text(debounce_by=None)]

            await refused(manager, bob)
            # What came so far is not taken for the answer, though the framework has the stream for one that is over.
            await stream.get_output()

    with pytest.raises(ContextClosedError):
        await as_user(manager, "alice", alice)
    assert set(ran_as) == {"alice"}
    assert phases(ledger)[-1] == ("agent_failed", "agent", "failed")


async def test_a_model_that_cannot_stream_is_not_asked_to(manager: UserContextManager) -> None:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart(here())])

    agent = Agent(FunctionModel(answer), capabilities=[UserRuns()])

    async def alice() -> str:
        async with agent.iter("hello") as run:
            async for _ in run:
                pass
        return (await agent.run("hello")).output

    assert await as_user(manager, "alice", alice) == "alice"


async def test_a_validator_may_start_a_run_of_its_own(manager: UserContextManager) -> None:
    """Which is in a child context, of the same user."""
    judge = Agent(TestModel(custom_output_text="fine"), capabilities=[UserRuns()])
    agent = Agent(TestModel(), capabilities=[UserRuns()])

    @agent.output_validator
    async def _judged(text: str) -> str:
        here()
        return (await judge.run(text)).output

    async def alice() -> str:
        return (await agent.run("hello")).output

    assert await as_user(manager, "alice", alice) == "fine"
    assert ran_as == ["alice"]
