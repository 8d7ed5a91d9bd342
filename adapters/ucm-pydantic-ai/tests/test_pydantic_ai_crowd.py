"""Fifty users at once, each with a secret, who share agents, a store of conversations and the names of them."""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from pydantic_ai import Agent, RunContext
from pydantic_ai.conversation import Conversation, ConversationTypeAdapter
from pydantic_ai.conversation_store import ConversationStore
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    TextPart,
    ThinkingPart,
    ToolCallPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

from support.events import connect, settled
from support.tracing import Sdk, installed
from ucm_middleware import (
    AgentPolicy,
    AgentTimeoutError,
    EventPolicy,
    UserContextManager,
    UserExecutionContext,
    current_context,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import PydanticAI, SQLiteConversationStore, UserConversations, UserRuns

USERS = [f"user-{number:02}" for number in range(50)]

_SECRET = re.compile(r"secret-of-(user-\d\d)")


def secret_of(user_id: str) -> str:
    return f"secret-of-{user_id}"


def owners(text: object) -> set[str]:
    """Whose secrets are in what is written there."""
    return set(_SECRET.findall(str(text)))


class Seen:
    """What models were asked, by the user that the code ran for."""

    def __init__(self) -> None:
        self.inputs: dict[str, set[str]] = {}
        self.calls: dict[str, set[str]] = {}

    def asked(self, messages: Sequence[ModelMessage]) -> None:
        text = ModelMessagesTypeAdapter.dump_json(list(messages)).decode()
        self.inputs.setdefault(current_context().user_id, set()).update(owners(text))

    def called(self, argument: str) -> None:
        self.calls.setdefault(current_context().user_id, set()).update(owners(argument))


def agents_of(seen: Seen) -> Agent[UserExecutionContext, str]:
    """An agent with a sub-agent, and with tools on the loop and in threads. It calls each with what it was told."""

    async def note(ctx: RunContext[UserExecutionContext], what: str) -> str:
        seen.called(what)
        await asyncio.sleep(0)
        assert ctx.deps.user_id == current_context().user_id
        return f"{ctx.deps.user_id} noted {what}"

    def look_up(ctx: RunContext[UserExecutionContext], what: str) -> str:
        seen.called(what)
        assert ctx.deps.user_id == current_context().user_id
        return f"{ctx.deps.user_id} looked up {what}"

    helper = Agent(
        FunctionModel(answering(seen, ["note"]), stream_function=streaming(seen, ["note"])),
        name="helper",
        deps_type=UserExecutionContext,
        tools=[note],
        capabilities=[UserRuns()],
    )

    async def ask_helper(ctx: RunContext[UserExecutionContext], what: str) -> str:
        seen.called(what)
        return (await helper.run(what, deps=ctx.deps, usage=ctx.usage)).output

    tools = ["note", "look_up", "ask_helper"]
    return Agent(
        FunctionModel(answering(seen, tools), stream_function=streaming(seen, tools)),
        deps_type=UserExecutionContext,
        tools=[note, look_up, ask_helper],
    )


def told(messages: Sequence[ModelMessage]) -> str:
    """The last thing that the user said."""
    said = [part.content for message in messages for part in message.parts if part.part_kind == "user-prompt"]
    return str(said[-1])


def answering(seen: Seen, tools: Sequence[str]) -> Any:
    async def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.asked(messages)
        await asyncio.sleep(0)
        if messages[-1].parts[0].part_kind == "user-prompt":
            calls = [ToolCallPart(tool, {"what": told(messages)}) for tool in tools]
            return ModelResponse(parts=[ThinkingPart(f"about {told(messages)}"), *calls])
        return ModelResponse(parts=[TextPart(f"answer to {told(messages)}")])

    return answer


def streaming(seen: Seen, tools: Sequence[str]) -> Any:
    async def answer(messages: list[ModelMessage], info: AgentInfo) -> Any:
        seen.asked(messages)
        await asyncio.sleep(0)
        if messages[-1].parts[0].part_kind == "user-prompt":
            yield {0: DeltaThinkingPart(content=f"about {told(messages)}")}
            for index, tool in enumerate(tools, 1):
                yield {index: DeltaToolCall(tool, json.dumps({"what": told(messages)}))}
        else:
            yield "answer to "
            yield told(messages)

    return answer


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    with installed(Sdk()) as made:
        yield made


@pytest.fixture
def seen() -> Seen:
    return Seen()


async def turn(manager: UserContextManager, user_id: str, number: int) -> str:
    """One turn of a user's, in the conversation that everybody calls the same; every third one is read as a stream."""
    asked = {"prompt": f"turn {number}: {secret_of(user_id)}", "conversation_id": "main"}
    async with managed_user_context(manager.create_isolated_context(user_id)):
        if number % 3 != 2:
            result = await manager.execute_with_agent(user_id, "agent", asked)
        else:
            async with manager.stream_with_agent(user_id, "agent", asked) as stream:
                async for item in stream:
                    assert owners(item) <= {user_id}
            result = stream.result
        return str(result.output)


async def give_up(manager: UserContextManager, user_id: str, how: int) -> None:
    """A turn that does not end: cancelled, broken off or out of time."""
    asked = {"prompt": f"given up: {secret_of(user_id)}", "conversation_id": "main"}
    async with managed_user_context(manager.create_isolated_context(user_id)):
        if how == 0:
            run = asyncio.create_task(manager.execute_with_agent(user_id, "agent", asked))
            for _ in range(int(user_id[-2:])):
                await asyncio.sleep(0)
            run.cancel()
            await asyncio.wait([run])
        elif how == 1:
            async with manager.stream_with_agent(user_id, "agent", asked) as stream:
                async for item in stream:
                    assert owners(item) <= {user_id}
                    break
        else:
            with pytest.raises(AgentTimeoutError):
                await manager.execute_with_agent(user_id, "agent", asked, timeout=0.000001)


async def test_nobody_sees_another_s_secret(
    sqlite_store: SQLiteConversationStore, seen: Seen, sdk: Sdk, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = RecordingLedger()
    manager = UserContextManager(
        plugins=[PydanticAI(conversations=sqlite_store)],
        secret="a-secret-of-the-test-0123456789-abcdef",
        ledger=ledger,
        agents=AgentPolicy(max_runs_per_user=2),
        events=EventPolicy(),
    )
    agent = agents_of(seen)
    manager.register_agent("agent", lambda context: agent, stateless=True)
    clients = {user_id: connect(manager, user_id) for user_id in USERS}

    async def user(user_id: str) -> None:
        number = int(user_id[-2:])
        assert owners(await turn(manager, user_id, number)) == {user_id}
        await give_up(manager, user_id, number % 3)
        assert owners(await turn(manager, user_id, number + 1)) == {user_id}

    await asyncio.gather(*map(user, USERS))
    await settled()

    assert seen.inputs == {user_id: {user_id} for user_id in USERS}
    assert seen.calls == {user_id: {user_id} for user_id in USERS}
    for user_id, (context, client, _) in clients.items():
        thoughts = [envelope for envelope in client.envelopes if envelope["type"] == "agent_thinking"]
        assert owners(thoughts) == {user_id}
        assert owners(client.envelopes) == {user_id}
        assert {envelope["data"]["agent"] for envelope in client.envelopes} == {"agent", "helper"}
        context.close()
    assert not [record for record in ledger.records if owners(record)]
    assert not [span for span in sdk.spans if owners(written(span))]
    await in_the_store(sqlite_store, manager)
    assert not [record.message for record in caplog.records if record.name == "asyncio"]  # such as tasks left alone


def written(span: ReadableSpan) -> str:
    return str(span.to_json())


async def in_the_store(store: ConversationStore, manager: UserContextManager) -> None:
    conversations = UserConversations(store)
    assert len(await store.list_conversations()) == len(USERS)
    for user_id in USERS:
        async with managed_user_context(manager.create_isolated_context(user_id)):
            (record,) = await conversations.list_conversations()
            assert record.conversation_id == "main"
            conversation = await conversations.load("main")
            assert conversation is not None
            text = ConversationTypeAdapter.dump_json(conversation).decode()
            assert owners(text) == {user_id}
            assert "given up" not in text
            prompts = [told([message]) for message in conversation.messages if asks(message)]
            assert [prompt.partition(":")[0] for prompt in prompts] == [
                f"turn {int(user_id[-2:]) + number}" for number in range(2)
            ]


def asks(message: ModelMessage) -> bool:
    return any(part.part_kind == "user-prompt" for part in message.parts)


async def test_bare_the_conversation_of_all_is_one(sqlite_store: SQLiteConversationStore, seen: Seen) -> None:
    """The same turns without the adapter: who names the conversation is asked no more."""
    agent = agents_of(seen)
    manager = UserContextManager()
    for user_id in USERS[:3]:
        async with managed_user_context(manager.create_isolated_context(user_id)) as context:
            conversation = await sqlite_store.load("main") or Conversation(conversation_id="main")
            result = await agent.run(secret_of(user_id), deps=context, conversation=conversation)
            await sqlite_store.save(result)
    assert seen.inputs[USERS[2]] == set(USERS[:3])
