"""Strands agents, run by the port as plain async functions.

pytest leaves this folder out unless it is asked for by its path, as tox's environment `strands` does, which has Strands
installed: the three frameworks of this folder exclude each other.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from strands import Agent, tool
from strands.models import Model
from strands.session import FileSessionManager
from strands.types.content import Message, Messages
from strands.types.streaming import StreamEvent
from strands.types.tools import ToolSpec

from support import frameworks
from support.contexts import MakeManager
from support.framework_cases import AsOneUser
from support.frameworks import WAIT, Function, Witness, owners, secret_of
from ucm_middleware import AgentError, current_context, current_run, managed_user_context
from ucm_middleware.testing import RecordingLedger


class OfflineModel(Model):
    """Calls every tool with the text of the prompt, and then answers with all that it was given."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def update_config(self, **model_config: Any) -> None:
        """There is none."""

    def get_config(self) -> dict[str, Any]:
        """There is none."""
        return {}

    def structured_output(self, *args: Any, **kwargs: Any) -> AsyncGenerator[dict[str, Any], None]:
        """No test asks for it."""
        raise NotImplementedError

    async def stream(
        self, messages: Messages, tool_specs: list[ToolSpec] | None = None, *args: Any, **kwargs: Any
    ) -> AsyncIterable[StreamEvent]:
        """One answer."""
        said = [text for message in messages for text in _texts(message)]
        self._witness.saw("model", said)
        yield {"messageStart": {"role": "assistant"}}
        if tool_specs and WAIT not in said and any("text" in block for block in messages[-1]["content"]):
            await asyncio.to_thread(self._witness.meet)
            for event in _calls(tool_specs, said[-1]):
                yield event
            return
        yield {"contentBlockStart": {"contentBlockIndex": 0, "start": {}}}
        yield {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"text": "; ".join(said)}}}
        if WAIT in said:
            await self._witness.wait()
        yield {"contentBlockStop": {"contentBlockIndex": 0}}
        yield {"messageStop": {"stopReason": "end_turn"}}


def _calls(tool_specs: Sequence[ToolSpec], text: str) -> list[StreamEvent]:
    events: list[StreamEvent] = []
    for number, spec in enumerate(tool_specs):
        start: Any = {"toolUse": {"toolUseId": f"call-{number}", "name": spec["name"]}}
        [parameter] = spec["inputSchema"]["json"]["properties"]
        delta: Any = {"toolUse": {"input": json.dumps({parameter: text})}}
        events.append({"contentBlockStart": {"contentBlockIndex": number, "start": start}})
        events.append({"contentBlockDelta": {"contentBlockIndex": number, "delta": delta}})
        events.append({"contentBlockStop": {"contentBlockIndex": number}})
    return [*events, {"messageStop": {"stopReason": "tool_use"}}]


def _texts(message: Message) -> list[str]:
    texts: list[str] = []
    for block in message["content"]:
        if "text" in block:
            texts.append(block["text"])
        if "toolResult" in block:
            texts += [content.get("text", "") for content in block["toolResult"]["content"]]
    return texts


class Strands:
    """The framework."""

    def model(self, witness: Witness) -> OfflineModel:
        return OfflineModel(witness)

    def agent(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        return agent_of(model, tools).invoke_async

    def team(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        helper = agent_of(model, tools).as_tool(name="helper", description="Helps.")
        return Agent(model=model, tools=[helper], callback_handler=None).invoke_async

    def streaming(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        return agent_of(model, tools).stream_async

    async def talk(self, model: OfflineModel, folder: Path, key: str, prompt: str) -> str:
        sessions = FileSessionManager(session_id=key, storage_dir=str(folder))
        agent = Agent(model=model, session_manager=sessions, callback_handler=None)
        return str(await agent.invoke_async(prompt))

    def parameters(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt}


def agent_of(model: OfflineModel, tools: Sequence[Function] = ()) -> Agent:
    """The callback handler prints what the model says, unless there is none."""
    return Agent(model=model, tools=[tool(function) for function in tools], callback_handler=None)


class TestStrands(AsOneUser):
    framework = Strands()

    async def test_without_the_port_an_agent_keeps_what_one_user_said_for_the_next(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        agent = agent_of(OfflineModel(witness))
        for user in ("alice", "bob"):
            async with managed_user_context(manager.create_isolated_context(user)):
                answer = await agent.invoke_async(f"I am {user}: {secret_of(user)}")
        assert owners(answer) == {"alice", "bob"}
        assert witness.of("model") == [("alice", {"alice"}), ("bob", {"alice", "bob"})]

    async def test_an_agent_itself_is_no_async_function(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        manager.register_agent("desk", lambda context: agent_of(OfflineModel(witness)))
        with pytest.raises(AgentError, match="gave a AgentResult, and is to be asynchronous"):
            await manager.execute_with_agent("alice", "desk", {"prompt": "hello"})

    async def test_a_tool_that_yields_is_told_of(self, make_manager: MakeManager, witness: Witness) -> None:
        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)

        async def search(text: str) -> AsyncGenerator[str]:
            """Search, and tell of it."""
            yield "looking"
            yield f"found as {current_context().user_id}"

        manager.register_agent(
            "desk", lambda context: agent_of(OfflineModel(witness), [current_run().wrap_tool(search)]).stream_async
        )
        async with manager.stream_with_agent("alice", "desk", {"prompt": "hello"}) as stream:
            events = [event async for event in stream]
        assert [event["tool_stream_event"]["data"] for event in events if "tool_stream_event" in event] == [
            "looking",
            "found as alice",
        ]
        phases = [dict(record.data)["phase"] for record in ledger.select("agent_run")]
        assert phases == ["agent_started", "tool_executing", "tool_completed", "agent_completed"]
