"""Crews of CrewAI, run by the port as plain async functions.

pytest leaves this folder out unless it is asked for by its path, as tox's environment `crewai` does, which has CrewAI
installed: the three frameworks of this folder exclude each other.
"""

import asyncio
import json
import os
import threading
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from support import frameworks
from support.contexts import MakeManager
from support.framework_cases import AsOneUser
from support.frameworks import WAIT, Function, Witness, desk, owners, secret_of, tools_of
from support.waiting import PATIENCE, wait_until
from ucm_middleware import AgentError, current_run, managed_user_context

# Before the import: nothing goes to its makers, and nothing asks for a newer version.
os.environ |= {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_TESTING": "true",
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own modules
    from crewai import Agent, BaseLLM, Crew, Memory, Task
    from crewai.llms.base_llm import llm_call_context
    from crewai.tools import tool
    from crewai.types.streaming import CrewStreamingOutput

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it uses what it has deprecated


class OfflineModel(BaseLLM):
    """Calls every tool with the text of the prompt, and then answers with all that it was given."""

    witness: Any
    goes_on: Any = None

    def supports_function_calling(self) -> bool:
        return True

    def get_input_tokens_count(self, *args: Any, **kwargs: Any) -> int:
        return 1

    def call(
        self,
        messages: Any,
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Any = None,
        from_agent: Any = None,
        response_model: type[BaseModel] | None = None,
    ) -> str | list[dict[str, Any]]:
        said = [message["content"] or "" for message in messages]
        self.witness.saw("model", said)
        asked_to_wait = any(WAIT in text.split() for text in said)
        if tools and messages[-1]["role"] == "user" and not asked_to_wait:
            self.witness.meet()
            arguments = json.dumps({"text": said[-1]})
            return [
                {"id": f"call-{number}", "function": {"name": one["function"]["name"], "arguments": arguments}}
                for number, one in enumerate(tools)
            ]
        if self._effective_stream():
            with llm_call_context():
                for text in said:
                    self._emit_stream_chunk_event(text, from_task=from_task, from_agent=from_agent)
        if asked_to_wait:
            assert self.goes_on.wait(PATIENCE)
            self.witness.saw("model left", "")
        return "; ".join(said)


class OneAfterTheOther(OfflineModel):
    """Calls one tool in each turn."""

    def call(self, messages: Any, tools: list[dict[str, Any]] | None = None, *args: Any, **kwargs: Any) -> Any:
        self.witness.saw("model", [message["content"] or "" for message in messages])
        number = sum(message["role"] == "tool" for message in messages)
        if tools is None or number == len(tools):
            return "done"
        function = {"name": tools[number]["function"]["name"], "arguments": json.dumps({"text": "it"})}
        return [{"id": f"call-{number}", "function": function}]


class CrewAI:
    """The framework."""

    def model(self, witness: Witness) -> OfflineModel:
        return OfflineModel(model="offline", witness=witness)

    def agent(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        return crew_of(model, tools).akickoff

    def team(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        crew = crew_of(model, tools)
        checker = Agent(role="checker", goal="to check", backstory="none", llm=model)
        crew.agents.append(checker)
        crew.tasks.append(Task(description="Check it.", expected_output="an answer", agent=checker))
        return crew.akickoff

    def streaming(self, model: OfflineModel, tools: Sequence[Function]) -> frameworks.Agent:
        crew = crew_of(model, tools, stream=True)

        async def stream(inputs: dict[str, Any]) -> AsyncIterator[Any]:
            chunks = await crew.akickoff(inputs)
            assert isinstance(chunks, CrewStreamingOutput)
            async with chunks:
                async for chunk in chunks:
                    yield chunk

        return stream

    async def talk(self, model: OfflineModel, folder: Path, key: str, prompt: str) -> str:
        crew = crew_of(model, memory=memory_in(model, folder / key))
        return str(await crew.akickoff(inputs={"prompt": prompt}))

    def parameters(self, prompt: str) -> dict[str, Any]:
        return {"inputs": {"prompt": prompt}}


def crew_of(model: OfflineModel, tools: Sequence[Function] = (), **settings: Any) -> Crew:
    agent = Agent(role="clerk", goal="to help", backstory="none", llm=model, tools=[tool(one) for one in tools])
    task = Task(description="{prompt}", expected_output="an answer", agent=agent)
    return Crew(agents=[agent], tasks=[task], **settings)


def memory_in(model: OfflineModel, folder: Path) -> Memory:
    """Everything resembles everything, so that all is remembered."""
    return Memory(llm=model, storage=str(folder), embedder=lambda texts: [[1.0, 0.0] for _ in texts])


class TestCrewAI(AsOneUser):
    framework = CrewAI()
    spans_tell = False

    async def test_a_stream_that_is_broken_off_ends_at_once(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        model = OfflineModel(model="offline", witness=witness, goes_on=threading.Event())
        manager.register_agent("desk", desk(self.framework, model, witness, streaming=True))
        async with manager.stream_with_agent("alice", "desk", self.framework.parameters(WAIT)) as stream:
            async for _ in stream:
                break
        assert manager.get_active_contexts() == {}
        # The model's call is in a thread of CrewAI's, which nothing can stop and the port knows nothing of.
        assert manager.get_stragglers() == []
        assert witness.of("model left") == []
        model.goes_on.set()
        await asyncio.to_thread(wait_until, lambda: witness.of("model left") != [], "the call has ended")
        await asyncio.get_running_loop().shutdown_default_executor()  # its threads have ended then
        assert [where for where, _, _ in witness.sightings] == ["model", "model left"]

    async def test_without_the_port_a_crew_gives_the_next_user_the_results_of_tools(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        crew = crew_of(OfflineModel(model="offline", witness=witness), tools_of(witness), cache=True)
        for user in ("alice", "bob"):
            async with managed_user_context(manager.create_isolated_context(user)):
                answer = await crew.akickoff(inputs={"prompt": "What is my secret?"})
        # Both ask the same, and such a crew keeps what its tools answered.
        assert owners(answer) == {"alice"}
        assert witness.of("look_up") == [("alice", set())]

    async def test_without_the_port_a_memory_is_everybodys(
        self, make_manager: MakeManager, witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))
        manager = make_manager()
        model = OfflineModel(model="offline", witness=witness)
        for user in ("alice", "bob"):
            async with managed_user_context(manager.create_isolated_context(user)):
                memory = Memory(llm=model, embedder=lambda texts: [[1.0, 0.0] for _ in texts])
                answer = await crew_of(model, memory=memory).akickoff(
                    inputs={"prompt": f"I am {user}: {secret_of(user)}"}
                )
        # A new one each time: what they say goes into one folder.
        assert owners(answer) == {"alice", "bob"}

    async def test_a_crew_in_a_thread_goes_on_after_its_run_without_its_tools(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        began = threading.Event()

        def look_up(text: str) -> str:
            """Look something up."""
            witness.saw("look_up", text)
            return "found"

        def begin(text: str) -> str:
            """Take long."""
            began.set()
            assert model.goes_on.wait(PATIENCE)
            return "late"

        model = OneAfterTheOther(model="offline", witness=witness, goes_on=threading.Event())
        manager.register_agent(
            "desk",
            lambda context: crew_of(model, [current_run().wrap_tool(one) for one in (begin, look_up)]).kickoff_async,
        )
        task = asyncio.create_task(manager.execute_with_agent("alice", "desk", self.framework.parameters("hello")))
        await asyncio.to_thread(wait_until, began.is_set, "the first tool has begun")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [straggler.tool for straggler in manager.get_stragglers()] == ["begin"]
        model.goes_on.set()
        await asyncio.to_thread(wait_until, lambda: len(witness.of("model")) == 3, "the crew has gone on to its end")
        assert witness.of("look_up") == []
        assert "ContextClosedError" in witness.sightings[-1][2] or "is closed" in witness.sightings[-1][2]

    async def test_an_async_tool_that_outlives_its_run_is_listed(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        began, goes_on = threading.Event(), threading.Event()

        async def wait(text: str) -> str:
            """Wait for long: on a loop of its own, in a thread."""
            began.set()
            await asyncio.to_thread(goes_on.wait, PATIENCE)
            return "late"

        self._register(manager, "desk", wait, witness)
        task = asyncio.create_task(manager.execute_with_agent("alice", "desk", self.framework.parameters("hello")))
        await asyncio.to_thread(wait_until, began.is_set, "the tool has begun")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(straggler.user_id, straggler.tool) for straggler in manager.get_stragglers()] == [("alice", "wait")]
        goes_on.set()
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler has ended")

    async def test_a_stream_is_no_result(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        model = OfflineModel(model="offline", witness=witness)
        manager.register_agent("desk", lambda context: crew_of(model, stream=True).akickoff)
        with pytest.raises(AgentError, match="came to a CrewStreamingOutput, which would run where it is read"):
            await manager.execute_with_agent("alice", "desk", self.framework.parameters("hello"))
        assert witness.sightings == []
