"""Agents of Microsoft's Agent Framework, run by the port as plain async functions.

pytest leaves this folder out unless it is asked for by its path, as tox's environment `agent-framework` does, which has
the framework installed: the three of this folder exclude each other.
"""

import asyncio
import gc
import json
from collections.abc import AsyncIterable, Awaitable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agent_framework import (
    Agent,
    BaseChatClient,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    FileSessionStore,
    FunctionInvocationLayer,
    Message,
    ResponseStream,
    tool,
)
from agent_framework.observability import enable_instrumentation

from support import frameworks
from support.contexts import MakeManager
from support.framework_cases import AsOneUser
from support.frameworks import WAIT, Function, Witness, owners, secret_of
from ucm_middleware import AgentError, managed_user_context

pytestmark = pytest.mark.filterwarnings("ignore:.* is experimental:FutureWarning")  # the store of sessions


class OfflineClient(FunctionInvocationLayer, BaseChatClient):
    """Calls every tool with the text of the prompt, and then answers with all that it was given."""

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self._witness = witness

    def _inner_get_response(
        self, *, messages: Sequence[Message], stream: bool, options: Mapping[str, Any], **kwargs: Any
    ) -> Awaitable[ChatResponse] | ResponseStream[ChatResponseUpdate, ChatResponse]:
        if stream:
            return self._build_response_stream(self._updates(messages, options))
        return self._whole(messages, options)

    async def _whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> ChatResponse:
        contents = [content async for update in self._updates(messages, options) for content in update.contents]
        return ChatResponse(messages=[Message("assistant", contents)])

    async def _updates(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> AsyncIterable[ChatResponseUpdate]:
        said = [text for message in messages for text in _texts(message)]
        self._witness.saw("model", said)
        tools = options.get("tools")
        if tools and WAIT not in said and messages[-1].role == "user":
            await asyncio.to_thread(self._witness.meet)
            for number, one in enumerate(tools):
                [parameter] = one.parameters()["properties"]
                arguments = json.dumps({parameter: said[-1]})
                call = Content.from_function_call(f"call-{number}", one.name, arguments=arguments)
                yield ChatResponseUpdate(contents=[call], role="assistant")
            return
        yield ChatResponseUpdate(contents=[Content.from_text("; ".join(said))], role="assistant")
        if WAIT in said:
            await self._witness.wait()


def _texts(message: Message) -> list[str]:
    texts: list[str] = []
    for content in message.contents:
        if content.type == "text":
            texts.append(content.text or "")
        if content.type == "function_result":
            texts.append(str(content.result))
    return texts


class AgentFramework:
    """The framework."""

    def model(self, witness: Witness) -> OfflineClient:
        return OfflineClient(witness)

    def agent(self, model: OfflineClient, tools: Sequence[Function]) -> frameworks.Agent:
        return agent_of(model, tools).run

    def team(self, model: OfflineClient, tools: Sequence[Function]) -> frameworks.Agent:
        helper = Agent(model, name="helper", tools=[tool(function) for function in tools])
        return Agent(model, tools=[helper.as_tool()]).run

    def streaming(self, model: OfflineClient, tools: Sequence[Function]) -> frameworks.Agent:
        return partial(agent_of(model, tools).run, stream=True)

    async def talk(self, model: OfflineClient, folder: Path, key: str, prompt: str) -> str:
        sessions = FileSessionStore(folder)
        agent = agent_of(model)
        session = await sessions.get(key) or agent.create_session(session_id=key)
        answer = str(await agent.run(prompt, session=session))
        await sessions.set(key, session)
        return answer

    def parameters(self, prompt: str) -> dict[str, Any]:
        return {"messages": prompt}


def agent_of(model: OfflineClient, tools: Sequence[Function] = ()) -> Agent:
    return Agent(model, tools=[tool(function) for function in tools])


@pytest.fixture(autouse=True, scope="module")
def spans_tell_what_is_said() -> None:
    enable_instrumentation(enable_sensitive_data=True)


class TestAgentFramework(AsOneUser):
    framework = AgentFramework()

    async def test_without_the_port_a_session_keeps_what_one_user_said_for_the_next(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        agent = agent_of(OfflineClient(witness))
        session = agent.create_session()
        for user in ("alice", "bob"):
            async with managed_user_context(manager.create_isolated_context(user)):
                answer = await agent.run(f"I am {user}: {secret_of(user)}", session=session)
        assert owners(answer) == {"alice", "bob"}
        assert witness.of("model") == [("alice", {"alice"}), ("bob", {"alice", "bob"})]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a stream that nobody starts
    async def test_a_stream_is_no_result(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        manager.register_agent("desk", lambda context: partial(agent_of(OfflineClient(witness)).run, stream=True))
        with pytest.raises(AgentError, match="gives a stream"):
            await manager.execute_with_agent("alice", "desk", {"messages": "hello"})
        assert witness.sightings == []
        gc.collect()
