"""Agents of ADK through the manager: what they are told and tell, sub-agents, failures, bad input."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextvars import copy_context
from typing import Any

import pytest
from google.adk.agents._streaming_mode import StreamingMode
from google.adk.agents.base_agent import BaseAgent
from google.adk.agents.callback_context import CallbackContext
from google.adk.agents.llm_agent import LlmAgent
from google.adk.agents.loop_agent import LoopAgent
from google.adk.agents.parallel_agent import ParallelAgent
from google.adk.agents.run_config import RunConfig, ToolThreadPoolConfig
from google.adk.agents.sequential_agent import SequentialAgent
from google.adk.apps.app import App
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.plugins.base_plugin import BasePlugin
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.adk.tools.agent_tool import AgentTool
from google.adk.tools.base_tool import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.adk.tools.tool_context import ToolContext
from google.genai import types

from offline import OfflineModel
from support.events import connect
from support.waiting import wait_until
from ucm_google_adk import Answer, GoogleADK, OwnedSessionService, SharedStateError, UserContextPlugin
from ucm_google_adk.toolsets import Toolsets
from ucm_middleware import (
    AgentError,
    AgentParametersError,
    AgentTimeoutError,
    ContextClosedError,
    ContextLimitError,
    UserContextManager,
    current_context,
    current_run,
)
from ucm_middleware.testing import Users

Shown = list[tuple[str, str, str]]


def look(thing: str) -> str:
    """Look something up."""
    return f"{current_context().user_id} found {thing}"


async def look_later(thing: str) -> str:
    """Look something up."""
    await asyncio.sleep(0)
    return f"{current_context().user_id} found {thing}"


def agent(*calls: tuple[str, dict[str, Any]], name: str = "helper", answer: str = "done", **given: Any) -> LlmAgent:
    return LlmAgent(name=name, description=name, model=OfflineModel(calls=calls, answer=answer), **given)


@pytest.fixture
def adk() -> GoogleADK:
    return GoogleADK("shop")


@pytest.fixture
def manager(adk: GoogleADK) -> UserContextManager:
    return UserContextManager(plugins=[adk])


def register(
    manager: UserContextManager, make: Callable[[], BaseAgent | App], name: str = "helper", **given: Any
) -> None:
    manager.register_agent(name, lambda context: make(), **given)


def story(manager: UserContextManager, user: str) -> Shown:
    """What was put on record of the runs: agent, phase and tool, indented by depth."""
    trail = manager.get_audit_trail(user)
    assert trail is not None
    return [
        (one["agent"], one["phase"].removeprefix("agent_"), one.get("tool", ""))
        for one in trail["events"]
        if one["event"] == "agent_run"
    ]


def tree(manager: UserContextManager, user: str) -> list[str]:
    """Each run, by the names of those that it is in."""
    trail = manager.get_audit_trail(user)
    assert trail is not None
    parents = {one["request_id"]: one["parent_request_id"] for one in trail["events"] if one["event"] == "child_opened"}
    names = {one["request_id"]: one["agent"] for one in trail["events"] if one["event"] == "agent_run"}

    def path(request_id: str) -> str:
        parent = parents[request_id]
        return names[request_id] if parent not in names else f"{path(parent)}/{names[request_id]}"

    return [path(one) for one in names]


class TestRuns:
    async def test_an_answer_comes_back_and_the_conversation_goes_on(self, manager: UserContextManager) -> None:
        model = OfflineModel(answer="hello alice")
        register(manager, lambda: LlmAgent(name="helper", model=model))
        first = await manager.execute_with_agent("alice", "helper", {"message": "I am alice"})
        assert isinstance(first, Answer)
        assert first.text == "hello alice"
        assert [event.author for event in first.events] == ["helper"]
        await manager.execute_with_agent("alice", "helper", {"message": "again", "session_id": first.session_id})
        assert "I am alice" in model.seen[1]
        await manager.execute_with_agent("bob", "helper", {"message": "again", "session_id": first.session_id})
        assert "I am alice" not in model.seen[2]

    async def test_events_and_records_tell_of_it(self, manager: UserContextManager) -> None:
        register(
            manager,
            lambda: agent(("look", {"thing": "shoes"}), ("look_later", {"thing": "hats"}), tools=[look, look_later]),
        )
        _, alice, _ = connect(manager, "alice")
        _, bob, _ = connect(manager, "bob")
        answer = await manager.execute_with_agent("alice", "helper", {"message": "go"})
        results = [
            part.function_response.response
            for event in answer.events
            for part in event.content.parts
            if part.function_response
        ]
        assert results == [{"result": "alice found shoes"}, {"result": "alice found hats"}]
        expected = [
            ("helper", "started", ""),
            ("helper", "thinking", ""),
            ("helper", "tool_executing", "look"),
            ("helper", "tool_completed", "look"),
            ("helper", "thinking", ""),
            ("helper", "tool_executing", "look_later"),
            ("helper", "tool_completed", "look_later"),
            ("helper", "thinking", ""),
            ("helper", "completed", ""),
        ]
        assert story(manager, "alice") == expected
        await wait_for_frames(alice, len(expected))
        assert [envelope["type"].removeprefix("agent_") for envelope in alice.envelopes] == [
            each[1] for each in expected
        ]
        assert bob.frames == []

    async def test_what_a_model_thinks_goes_to_the_user_alone(self, manager: UserContextManager) -> None:
        class Thinker(BaseLlm):
            async def generate_content_async(
                self, llm_request: LlmRequest, stream: bool = False
            ) -> AsyncGenerator[LlmResponse, None]:
                parts = [types.Part(text="she likes red", thought=True), types.Part(text="red")]
                yield LlmResponse(content=types.Content(role="model", parts=parts))

        register(manager, lambda: LlmAgent(name="helper", model=Thinker(model="offline")))
        _, alice, _ = connect(manager, "alice")
        assert (await manager.execute_with_agent("alice", "helper", {"message": "go"})).text == "red"
        await wait_for_frames(alice, 4)
        assert "she likes red" in [envelope["data"].get("text") for envelope in alice.envelopes]
        assert "she likes red" not in str(manager.get_audit_trail("alice"))

    async def test_a_stream_gives_events_and_the_answer(self, manager: UserContextManager) -> None:
        register(manager, lambda: agent(answer="one two"))
        given = {"message": "go", "run_config": RunConfig(streaming_mode=StreamingMode.SSE)}
        async with manager.stream_with_agent("alice", "helper", given) as stream:
            events = [event async for event in stream]
        assert [part.text for event in events if event.partial for part in event.content.parts] == ["one", "two"]
        assert stream.result.text == "one two"
        assert [event.partial for event in stream.result.events] == [None]

    async def test_state_can_be_given(self, manager: UserContextManager, adk: GoogleADK) -> None:
        register(manager, lambda: agent(instruction="The color is {color}, the name {user:name}."))
        given = {"message": "go", "session_id": "chat", "state_delta": {"color": "red", "user:name": "Alice"}}
        await manager.execute_with_agent("alice", "helper", given)
        with Users(manager).running("alice"):
            assert await adk.session_service.get_user_state(app_name="shop", user_id="alice") == {"name": "Alice"}
        with pytest.raises(SharedStateError):
            await manager.execute_with_agent("alice", "helper", {**given, "state_delta": {"app:color": "red"}})

    async def test_an_app_brings_its_plugins(self, manager: UserContextManager) -> None:
        class Counting(BasePlugin):
            calls = 0
            closed = False

            async def before_model_callback(self, **_: Any) -> None:
                self.calls += 1

            async def close(self) -> None:
                self.closed = True

        counting = Counting("counting")
        register(manager, lambda: App(name="other", root_agent=agent(), plugins=[counting, UserContextPlugin()]))
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert counting.calls == 1
        assert not counting.closed  # it is the application's, for all runs

    async def test_what_is_around_is_as_it_was(self, manager: UserContextManager) -> None:
        """Nothing that ADK sets stays behind in the Context of whoever runs an agent."""
        register(manager, lambda: agent(("look", {"thing": "shoes"}), tools=[look]))
        with Users(manager).running("alice"):
            before = dict(copy_context().items())
            await manager.execute_with_agent("alice", "helper", {"message": "go"})
            async with manager.stream_with_agent("alice", "helper", {"message": "go"}) as stream:
                await anext(stream)
            assert dict(copy_context().items()) == before

    async def test_toolsets_are_closed_when_nobody_uses_them(self, manager: UserContextManager) -> None:
        class Shared(BaseToolset):
            closed = 0
            entered = asyncio.Event()
            go_on = asyncio.Event()

            async def get_tools(self, readonly_context: Any = None) -> list[BaseTool]:
                return []

            async def close(self) -> None:
                self.closed += 1

        toolset = Shared()

        async def wait_here(callback_context: CallbackContext) -> None:
            if current_context().user_id == "alice":
                toolset.entered.set()
                await toolset.go_on.wait()

        register(manager, lambda: agent(tools=[toolset], before_agent_callback=wait_here))
        slow = asyncio.create_task(manager.execute_with_agent("alice", "helper", {"message": "go"}))
        await toolset.entered.wait()
        await manager.execute_with_agent("bob", "helper", {"message": "go"})
        assert toolset.closed == 0
        toolset.go_on.set()
        await slow
        assert toolset.closed == 1

    async def test_all_toolsets_are_closed_also_of_a_run_that_is_cancelled_meanwhile(self) -> None:
        closing, go_on, closed = asyncio.Event(), asyncio.Event(), asyncio.Queue[BaseToolset]()

        class Slow(BaseToolset):
            async def get_tools(self, readonly_context: Any = None) -> list[BaseTool]:
                return []

            async def close(self) -> None:
                closing.set()
                await go_on.wait()
                closed.put_nowait(self)

        both = Slow(), Slow()

        async def use() -> None:
            async with Toolsets().used(both):
                pass

        run = asyncio.create_task(use())
        await closing.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        go_on.set()
        assert {await closed.get() for _ in both} == set(both)


async def wait_for_frames(client: Any, number: int) -> None:
    await asyncio.to_thread(wait_until, lambda: len(client.frames) >= number, "the events are there")


class TestSubAgents:
    async def test_a_hand_over_is_a_run_beside(self, manager: UserContextManager) -> None:
        def make() -> LlmAgent:
            last = agent(("look", {"thing": "shoes"}), name="last", answer="from last", tools=[look])
            middle = agent(("transfer_to_agent", {"agent_name": "last"}), name="middle", sub_agents=[last])
            return agent(("transfer_to_agent", {"agent_name": "middle"}), sub_agents=[middle])

        register(manager, make)
        answer = await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert answer.text == "from last"
        assert tree(manager, "alice") == ["helper", "helper/middle", "helper/last"]
        told = story(manager, "alice")
        assert told.index(("middle", "completed", "")) < told.index(("last", "started", ""))
        assert ("last", "tool_completed", "look") in told
        # The next message goes to whoever has the conversation.
        await manager.execute_with_agent("alice", "helper", {"message": "more", "session_id": answer.session_id})
        assert tree(manager, "alice")[-1] == "helper/last"

    async def test_agents_as_tools_are_runs_within(self, manager: UserContextManager) -> None:
        def make() -> LlmAgent:
            inner = agent(("look", {"thing": "shoes"}), name="inner", answer="from inner", tools=[look])
            outer = agent(("inner", {"request": "please"}), name="outer", tools=[AgentTool(inner)])
            return agent(("outer", {"request": "please"}), tools=[AgentTool(outer)])

        register(manager, make)
        answer = await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert answer.text == "done"
        assert tree(manager, "alice") == ["helper", "helper/outer", "helper/outer/inner"]
        assert ("inner", "tool_completed", "look") in story(manager, "alice")

    async def test_a_tool_of_the_agents_own_name_is_a_run_within_too(self, manager: UserContextManager) -> None:
        register(manager, lambda: agent(("helper", {"request": "please"}), tools=[AgentTool(agent())]))
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert tree(manager, "alice") == ["helper", "helper/helper"]

    @pytest.mark.parametrize("mode", ["single_turn", "task"])
    async def test_delegation_is_a_run_within(self, manager: UserContextManager, mode: Any) -> None:
        def make() -> LlmAgent:
            calls = (("finish_task", {"result": "x"}),) if mode == "task" else ()
            inner = agent(*calls, name="inner", mode=mode)
            return agent(("inner", {"request": "please"}), sub_agents=[inner])

        register(manager, make)
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert tree(manager, "alice") == ["helper", "helper/inner"]
        assert story(manager, "alice").count(("inner", "completed", "")) == 1
        assert story(manager, "alice")[-1] == ("helper", "completed", "")

    async def test_workflows_of_agents(self, manager: UserContextManager) -> None:
        def make() -> BaseAgent:
            both = ParallelAgent(name="both", sub_agents=[agent(name="left"), agent(name="right")])
            loop = LoopAgent(name="again", sub_agents=[agent(name="looped")], max_iterations=12)
            return SequentialAgent(name="helper", sub_agents=[agent(name="first"), both, loop])

        register(manager, make)
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        runs = tree(manager, "alice")
        assert runs[:5] == ["helper", "helper/first", "helper/both", "helper/both/left", "helper/both/right"]
        assert runs[5:] == ["helper/again", *["helper/again/looped"] * 12]
        told = story(manager, "alice")
        assert sum(phase == "started" for _, phase, _ in told) == sum(phase == "completed" for _, phase, _ in told)

    async def test_one_that_a_callback_answers_for_ends_too(self, manager: UserContextManager) -> None:
        """ADK tells nobody of its end; in a loop, its runs must not stand one in another."""

        async def skip(callback_context: CallbackContext) -> types.Content:
            return types.Content(role="model", parts=[types.Part(text="skipped")])

        def make() -> BaseAgent:
            skipped = agent(name="skipped", before_agent_callback=skip)
            return LoopAgent(name="helper", sub_agents=[agent(name="before"), skipped], max_iterations=12)

        register(manager, make)
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert set(tree(manager, "alice")) == {"helper", "helper/skipped", "helper/before"}
        assert story(manager, "alice").count(("skipped", "completed", "")) == 12

    async def test_depth_is_limited(self, manager: UserContextManager) -> None:
        def make() -> LlmAgent:
            made = agent(name="a0")
            for number in range(1, 12):
                made = agent((made.name, {"request": "on"}), name=f"a{number}", tools=[AgentTool(made)])
            return made

        register(manager, make)
        with pytest.raises(ContextLimitError, match="was not run"):
            await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert story(manager, "alice")[-1] == ("helper", "failed", "")
        register(manager, lambda: agent(), "other")
        await manager.execute_with_agent("alice", "other", {"message": "go"})

    async def test_an_agent_of_the_manager_can_be_run_inside_of_one(self, manager: UserContextManager) -> None:
        async def ask(question: str) -> str:
            """Ask the other agent."""
            return (await manager.execute_with_agent("alice", "other", {"message": question})).text  # type: ignore[no-any-return]

        def inner() -> LlmAgent:
            deep = agent(name="deep")
            return agent(("transfer_to_agent", {"agent_name": "deep"}), name="other", sub_agents=[deep])

        register(manager, inner, "other")
        register(manager, lambda: agent(("ask", {"question": "why"}), tools=[ask]))
        await manager.execute_with_agent("alice", "helper", {"message": "go"})
        assert tree(manager, "alice") == ["helper", "helper/other", "helper/other/deep"]
        assert sum(phase == "completed" for _, phase, _ in story(manager, "alice")) == 3


class TestEnds:
    async def test_an_agent_that_fails(self, manager: UserContextManager) -> None:
        async def broken(thing: str) -> str:
            """Fail."""
            raise ZeroDivisionError("no such thing")

        inner = agent(("broken", {"thing": "x"}), name="inner", tools=[broken])
        register(manager, lambda: agent(("inner", {"request": "x"}), tools=[AgentTool(inner)]))
        with pytest.raises(ZeroDivisionError):
            await manager.execute_with_agent("alice", "helper", {"message": "go"})
        told = story(manager, "alice")
        assert told[-3:] == [("inner", "failed", ""), ("helper", "tool_completed", "inner"), ("helper", "failed", "")]

    @pytest.mark.parametrize("how", ["cancelled", "timed out", "broken off"])
    async def test_one_that_is_stopped(self, manager: UserContextManager, how: str) -> None:
        entered, cleaned = asyncio.Event(), asyncio.Event()
        kept: list[Any] = []

        async def hang(thing: str) -> str:
            """Never end."""
            kept.append(current_run())
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()
            return ""

        register(
            manager,
            lambda: agent(
                ("transfer_to_agent", {"agent_name": "inner"}),
                sub_agents=[agent(("hang", {"thing": "x"}), name="inner", tools=[hang])],
            ),
        )
        given = {"message": "go"}
        if how == "broken off":
            async with manager.stream_with_agent("alice", "helper", given) as stream:
                for _ in range(3):
                    await anext(stream)
                await entered.wait()
        elif how == "timed out":
            with pytest.raises(AgentTimeoutError):
                await manager.execute_with_agent("alice", "helper", given, timeout=0.5)
        else:
            task = asyncio.create_task(manager.execute_with_agent("alice", "helper", given))
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert cleaned.is_set()
        told = story(manager, "alice")
        assert ("inner", "failed", "") in told
        assert told[-1] == ("helper", "failed", "")
        with pytest.raises(ContextClosedError):
            kept[0].thinking()
        assert manager.get_stragglers() == []

    async def test_the_thread_of_a_tool_is_watched_and_can_do_nothing_late(self, manager: UserContextManager) -> None:
        entered, go_on = threading.Event(), threading.Event()
        outcome: list[BaseException | str] = []

        def slow(thing: str, tool_context: ToolContext) -> str:
            """Take long."""
            notes = current_context().own(Notes(), name="notes")
            entered.set()
            assert go_on.wait(30)
            try:
                outcome.append(notes.read())
            except ContextClosedError as error:
                outcome.append(error)
            return "late"

        register(manager, lambda: agent(("slow", {"thing": "x"}), tools=[slow]))
        given = {"message": "go", "run_config": RunConfig(tool_thread_pool_config=ToolThreadPoolConfig())}
        task = asyncio.create_task(manager.execute_with_agent("alice", "helper", given))
        await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (left,) = manager.get_stragglers()
        assert (left.user_id, left.agent, left.tool) == ("alice", "helper", "slow")
        go_on.set()
        await asyncio.to_thread(wait_until, lambda: not manager.get_stragglers(), "the thread ends")
        assert isinstance(outcome[0], ContextClosedError)


class Notes:
    def read(self) -> str:
        return "alice's secret"


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({}, "given no message"),
            ({"message": " "}, "its message is no text"),
            ({"message": 5}, "its message is a int"),
            ({"message": {"parts": 5}}, "its message is a dict"),
            ({"message": "go", "session_id": 5}, "its session_id is a int"),
            ({"message": "go", "state_delta": []}, "its state_delta is a list"),
            ({"message": "go", "run_config": {}}, "its run_config is a dict"),
            ({"message": "go", "prompt": "go"}, "no parameter 'prompt'"),
        ],
    )
    async def test_parameters_that_do_not_fit(self, manager: UserContextManager, given: Any, told: str) -> None:
        register(manager, agent)
        with pytest.raises(AgentParametersError, match=told) as refused:
            await manager.execute_with_agent("alice", "helper", given)
        assert refused.value.agent == "helper"
        with pytest.raises(AgentParametersError, match=told):
            async with manager.stream_with_agent("alice", "helper", given) as stream:
                await anext(stream)

    async def test_a_message_may_be_a_content_or_its_fields(self, manager: UserContextManager) -> None:
        model = OfflineModel()
        register(manager, lambda: LlmAgent(name="helper", model=model))
        content = types.Content(role="user", parts=[types.Part(text="as an object")])
        await manager.execute_with_agent("alice", "helper", {"message": content})
        await manager.execute_with_agent("alice", "helper", {"message": {"parts": [{"text": "as a dict"}]}})
        assert "as an object" in model.seen[0]
        assert "as a dict" in model.seen[1]

    async def test_what_is_no_agent_of_adk_is_left_to_others(self, manager: UserContextManager) -> None:
        async def plain(question: str) -> str:
            return question

        manager.register_agent("plain", lambda context: plain, stateless=True)
        assert await manager.execute_with_agent("alice", "plain", {"question": "why"}) == "why"
        manager.register_agent("odd", lambda context: object())
        with pytest.raises(AgentError, match="nothing that any plugin"):
            await manager.execute_with_agent("alice", "odd", {"message": "go"})

    async def test_services_that_are_wrapped_already_are_taken(self) -> None:
        owned = OwnedSessionService(InMemorySessionService())
        assert GoogleADK("shop", session_service=owned).session_service is owned
