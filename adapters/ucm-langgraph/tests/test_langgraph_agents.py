"""Agents run by their names, for fifty users at once: nothing of one is another's."""

import asyncio
import gc
import operator
import weakref
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState
from langgraph.prebuilt import ToolRuntime
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy, Command, interrupt

from langgraph_actors import Actor
from langgraph_agents import USERS, Gate, ToolModel, agent, alook, ask, look, others_in, said, secret_of
from langgraph_stores import AnySaver, new_graph
from support.events import connect, settled
from support.tracing import Sdk, about, installed
from support.waiting import wait_until
from ucm_langgraph import LangGraph, OwnedCache, OwnedCheckpointer, OwnedStore
from ucm_middleware import (
    AgentError,
    AgentParametersError,
    AgentPolicy,
    AgentTimeoutError,
    ContextClosedError,
    ContextLimitError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    current_run,
)
from ucm_middleware.testing import RecordingLedger, Users

SOME = USERS[:12]


def managed(**options: Any) -> UserContextManager:
    return UserContextManager(plugins=[LangGraph()], agents=AgentPolicy(max_runs_per_user=100), **options)


def given(text: str, thread_id: str = "trip-1") -> dict[str, Any]:
    return {"input": ask(text), "thread_id": thread_id}


@pytest.mark.parametrize(("name", "turns"), [("alook", 2), ("look", 1), ("class_look", 1)])
async def test_fifty_users_at_once(name: str, turns: int, ledger: RecordingLedger) -> None:
    model = ToolModel()
    saver, store = InMemorySaver(), InMemoryStore()
    owned = {"checkpointer": OwnedCheckpointer(saver), "store": OwnedStore(store)}
    made = agent(model, context_schema=UserExecutionContext, **owned)
    manager = managed(ledger=ledger)
    manager.register_agent("talk", lambda _: made, stateless=True)
    clients = {user_id: connect(manager, user_id)[1] for user_id in USERS}
    with installed(Sdk()) as sdk:

        async def talk(user_id: str) -> None:
            for turn in range(turns):  # in threads that all call the same
                result = await manager.execute_with_agent(
                    user_id, "talk", given(f"use {name}: turn {turn} {secret_of(user_id)}")
                )
                assert len(result["messages"]) == 4 * (turn + 1)
                assert secret_of(user_id) in said(result)
                assert not others_in(said(result), user_id)

        await asyncio.gather(*map(talk, USERS))
        await settled()
        assert not [span for span in sdk.spans if "secret of" in str(about(span))]
    for user_id in USERS:
        assert len(model.asked[user_id]) == 2 * turns
        assert not others_in(model.asked[user_id], user_id)
        told = [envelope["type"] for envelope in clients[user_id].envelopes]
        once = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_thinking"]
        assert told == [*once, "agent_completed"] * turns
        assert {envelope["user_id"] for envelope in clients[user_id].envelopes} == {user_id}
        assert {record.user_id for record in ledger.select("agent_run", user=user_id)} == {user_id}
        assert len(ledger.select("agent_run", user=user_id)) == 6 * turns
    assert set(model.asked) == set(USERS)
    assert "secret of" not in str(ledger.records)
    for user_id in USERS:
        with Users(manager).running(user_id):
            kept = list(OwnedCheckpointer(saver).list(None))
            assert secret_of(user_id) in str(kept)
            assert not others_in(str(kept), user_id)


async def test_without_the_adapter_they_get_each_others(saver: AnySaver) -> None:
    """The same crowd, on a graph that is run as LangGraph has it."""
    if saver.blocks and saver.kind != "memory":
        return  # see test_langgraph_direct
    made = agent(ToolModel(), checkpointer=saver.bare)
    config: Any = {"configurable": {"thread_id": "trip-1"}}
    results = [await made.ainvoke(ask(secret_of(user_id)), config) for user_id in USERS[:5]]
    assert others_in(said(results[-1]), USERS[4]) == USERS[:4]


async def test_conversations_on_every_saver(saver: AnySaver) -> None:
    if saver.blocks and saver.kind != "memory":
        return  # a run does not block: these savers are for graphs that do, see test_langgraph_direct
    made = agent(ToolModel(), checkpointer=OwnedCheckpointer(saver.bare))
    manager = managed()
    manager.register_agent("talk", lambda _: made, stateless=True)

    async def talk(user_id: str) -> None:
        for turn in range(2):
            result = await manager.execute_with_agent(user_id, "talk", given(f"use look: {secret_of(user_id)}"))
            assert len(result["messages"]) == 4 * (turn + 1)
            assert not others_in(said(result), user_id)

    await asyncio.gather(*map(talk, SOME))


class TestEvents:
    """What the user's connections are told."""

    async def test_of_tools_and_models(self) -> None:
        made = agent(ToolModel())
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        _, client, _ = connect(manager, "alice")
        await manager.execute_with_agent("alice", "talk", {"input": ask("use look: x")})
        await settled()
        told = client.envelopes
        [executing, completed] = [each["data"] for each in told if each["type"].startswith("tool_")]
        assert (executing["tool"], executing["call_id"], executing["agent"]) == ("look", "call-1", "talk")
        assert (completed["tool"], completed["call_id"]) == ("look", "call-1")
        assert "error" not in completed

    async def test_of_a_tool_that_fails(self) -> None:
        async def broken(text: str) -> str:
            """Fails."""
            raise OSError(text)

        manager = managed()
        manager.register_agent("talk", lambda _: agent(ToolModel(), broken), stateless=True)
        _, client, _ = connect(manager, "alice")
        with pytest.raises(OSError, match="x"):
            await manager.execute_with_agent("alice", "talk", {"input": ask("use broken: x")})
        await settled()
        told = {each["type"]: each["data"] for each in client.envelopes}
        assert told["tool_completed"]["error"] == "OSError"
        assert told["agent_failed"]["error"] == "OSError"

    async def test_of_a_tool_that_asks_a_person(self) -> None:
        async def book(text: str) -> str:
            """Asks first."""
            return f"{text}: {interrupt('sure?')}"

        made = agent(ToolModel(), book, checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        _, client, _ = connect(manager, "alice")
        paused = await manager.execute_with_agent("alice", "talk", given("use book: rome"))
        assert paused["__interrupt__"][0].value == "sure?"
        done = await manager.execute_with_agent("alice", "talk", {"resume": "yes", "thread_id": "trip-1"})
        assert "it said: rome: yes" in said(done)
        await settled()
        told = [(each["type"], each["data"].get("error")) for each in client.envelopes]
        assert told.count(("tool_completed", None)) == 2
        assert told.count(("agent_completed", None)) == 2

    async def test_of_what_a_model_thinks(self, ledger: RecordingLedger) -> None:
        class Thinker(ToolModel):
            def answer(self, messages: Any) -> AIMessage:
                return AIMessage(
                    [{"type": "thinking", "thinking": "hm, "}, {"type": "reasoning", "reasoning": "so"}, "there"],
                    additional_kwargs={"reasoning_content": "well"},
                )

        manager = managed(ledger=ledger)
        manager.register_agent("talk", lambda _: agent(Thinker()), stateless=True)
        _, client, _ = connect(manager, "alice")
        await manager.execute_with_agent("alice", "talk", {"input": ask("x")})
        await settled()
        thoughts = [each["data"].get("text") for each in client.envelopes if each["type"] == "agent_thinking"]
        assert thoughts == [None, "hm, ", "so", "well"]
        assert "hm, " not in str(ledger.records)

    async def test_the_tools_span_is_the_current_one_in_it(self) -> None:
        inside: list[str] = []

        def count(text: str) -> str:
            """Counts in a thread."""
            with sdk.tracer.start_as_current_span("inside"):
                inside.append(text)
            return text

        async def acount(text: str) -> str:
            """Counts."""
            return count(text)

        manager = managed()
        manager.register_agent("talk", lambda _: agent(ToolModel(), count, acount))
        with installed(Sdk()) as sdk:
            for name in ("count", "acount"):
                await manager.execute_with_agent("alice", "talk", {"input": ask(f"use {name}: x")})
            spans = {span.context.span_id: span for span in sdk.spans if span.context is not None}
            inner = sdk.named("inside")
            assert len(inner) == 2
            for span, name in zip(inner, ("count", "acount"), strict=True):
                assert span.parent is not None
                assert about(spans[span.parent.span_id])["gen_ai.tool.name"] == name


class TestTrees:
    """Graphs within graphs, and agents within agents."""

    def graph(self, model: ToolModel, runs: list[Any]) -> Any:
        def note(_: MessagesState) -> Any:
            run = current_run()
            runs.append((run.agent_name, run.context.operation_depth, run.context.parent_request_id))
            return {}

        inner = agent(model, look, alook, name="inner")
        outer = new_graph(MessagesState).add_node("note", note).add_node("specialist", inner)
        outer.add_edge(START, "note").add_edge("note", "specialist").add_edge("specialist", END)
        return outer.compile()

    async def test_a_subgraph_is_a_run_inside(self, ledger: RecordingLedger) -> None:
        model, runs = ToolModel(), list[Any]()
        manager = managed(ledger=ledger)
        manager.register_agent("desk", lambda _: self.graph(model, runs), stateless=True)

        async def talk(user_id: str) -> None:
            result = await manager.execute_with_agent(
                user_id, "desk", {"input": ask(f"use look: {secret_of(user_id)}")}
            )
            assert secret_of(user_id) in said(result)
            assert not others_in(said(result), user_id)

        await asyncio.gather(*map(talk, SOME))
        assert [name for name, _, _ in runs] == ["desk"] * len(SOME)
        for user_id in SOME:
            started = [
                dict(record.data)
                for record in ledger.select("agent_run", user=user_id)
                if dict(record.data)["phase"] in ("agent_started", "tool_executing")
            ]
            assert [each["agent"] for each in started] == ["desk", "specialist", "specialist"]

    async def test_an_agent_may_be_a_tool_of_another(self) -> None:
        model = ToolModel()
        seen: list[str] = []

        async def consult(text: str) -> str:
            """Asks the other agent."""
            seen.append(current_run().agent_name)
            result = await manager.execute_with_agent(current_context().user_id, "inner", {"input": ask(text)})
            return said(result)

        manager = managed()
        manager.register_agent("inner", lambda _: agent(model), stateless=True)
        manager.register_agent("outer", lambda _: agent(model, consult), stateless=True)

        async def talk(user_id: str) -> None:
            text = f"use consult: use look: {secret_of(user_id)}"
            result = await manager.execute_with_agent(user_id, "outer", {"input": ask(text)})
            assert f"{secret_of(user_id)} in a thread" in said(result)
            assert not others_in(said(result), user_id)

        await asyncio.gather(*map(talk, SOME))
        assert set(seen) == {"outer"}

    async def test_it_takes_nothing_of_the_others_configuration(self) -> None:
        class Seen(TypedDict):
            seen: Any

        async def outer(_: Seen, config: RunnableConfig) -> Any:
            assert config.get("configurable", {})["flavour"] == "sweet"
            result = await manager.execute_with_agent(current_context().user_id, "inner", {"input": {"seen": 0}})
            return {"seen": result["seen"]}

        async def inner(_: Seen, config: RunnableConfig) -> Any:
            return {"seen": config.get("configurable", {}).get("flavour", "nothing")}

        manager = managed()
        for name, step in (("outer", outer), ("inner", inner)):
            made = new_graph(Seen).add_node("step", step).add_edge(START, "step").compile()
            manager.register_agent(name, lambda _, made=made: made, stateless=True)  # type: ignore[misc]
        given = {"input": {"seen": 0}, "configurable": {"flavour": "sweet"}}
        assert await manager.execute_with_agent("alice", "outer", given) == {"seen": "nothing"}

    async def test_a_hand_off_is_no_failure(self, ledger: RecordingLedger) -> None:
        def leave(_: MessagesState) -> Any:
            return Command(goto="second", graph=Command.PARENT, update={"messages": [AIMessage("handed over")]})

        first = new_graph(MessagesState).add_node("leave", leave).add_edge(START, "leave").compile()
        graph = new_graph(MessagesState).add_node("first", first).add_node("second", agent(ToolModel(), look))
        made = graph.add_edge(START, "first").compile()
        manager = managed(ledger=ledger)
        manager.register_agent("desk", lambda _: made, stateless=True)
        result = await manager.execute_with_agent("alice", "desk", {"input": ask("hello")})
        assert "you said: handed over" in said(result)
        phases = [(dict(each.data)["agent"], dict(each.data)["phase"]) for each in ledger.select("agent_run")]
        assert ("first", "agent_completed") in phases
        assert ("second", "agent_completed") in phases
        assert "agent_failed" not in [phase for _, phase in phases]

    async def test_graphs_without_end_are_stopped(self) -> None:
        class Deep(TypedDict):
            depth: int

        def build(levels: int) -> Any:
            graph = new_graph(Deep)
            if levels:
                graph.add_node("inner", build(levels - 1))
            else:
                graph.add_node("inner", lambda _: {"depth": 1})
            return graph.add_edge(START, "inner").add_edge("inner", END).compile()

        manager = managed()
        manager.register_agent("deep", lambda _: build(12))
        with pytest.raises(ContextLimitError):
            await manager.execute_with_agent("alice", "deep", {"input": {"depth": 0}})

    async def test_what_a_subgraph_asks_a_person_is_answered(self) -> None:
        class Asked(TypedDict):
            said: Annotated[list[str], operator.add]

        def question(_: Asked) -> Any:
            return {"said": [interrupt(f"sure, {current_context().user_id}?")]}

        inner = new_graph(Asked).add_node("question", question).add_edge(START, "question").compile()
        graph = new_graph(Asked).add_node("inner", inner).add_edge(START, "inner")
        made = graph.compile(checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("ask", lambda _: made, stateless=True)

        async def talk(user_id: str) -> None:
            paused = await manager.execute_with_agent(user_id, "ask", {"input": {"said": []}, "thread_id": "t-1"})
            assert paused["__interrupt__"][0].value == f"sure, {user_id}?"
            done = await manager.execute_with_agent(user_id, "ask", {"resume": secret_of(user_id), "thread_id": "t-1"})
            assert done == {"said": [secret_of(user_id)]}

        await asyncio.gather(*map(talk, SOME))


class TestStreams:
    """Items come in order, to whoever may have them, and the run is the same user's whoever reads."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stream_mode": "updates"},
            {"stream_mode": ["values", "messages", "debug"], "subgraphs": True},
            {"events": True},
        ],
        ids=str,
    )
    async def test_many_at_once(self, options: dict[str, Any]) -> None:
        made = agent(ToolModel(), checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)

        async def talk(user_id: str) -> None:
            parameters = {**given(f"use alook: {secret_of(user_id)}"), **options}
            async with manager.stream_with_agent(user_id, "talk", parameters) as stream:
                items = [item async for item in stream]
            assert secret_of(user_id) in str(items)
            assert not others_in(str(items), user_id)
            assert "ucm1_" not in str(items)
            assert secret_of(user_id) in said(stream.result)

        await asyncio.gather(*map(talk, SOME))

    @pytest.mark.parametrize("options", [{"stream_mode": "updates", "subgraphs": True}, {"events": True}], ids=str)
    async def test_what_happens_in_a_subgraph_is_streamed(self, options: dict[str, Any]) -> None:
        inner = agent(ToolModel(), look, alook, name="inner")
        made = new_graph(MessagesState).add_node("specialist", inner).add_edge(START, "specialist").compile()
        manager = managed()
        manager.register_agent("desk", lambda _: made, stateless=True)
        parameters = {"input": ask(f"use look: {secret_of('alice')}"), **options}
        async with manager.stream_with_agent("alice", "desk", parameters) as stream:
            items: list[Any] = [item async for item in stream]
        if "events" in options:
            assert "on_tool_end" in {item["event"] for item in items}
        else:
            inside = [item for namespace, item in items if namespace and namespace[0].startswith("specialist:")]
            assert [next(iter(item)) for item in inside] == ["model", "tools", "model"]
        assert f"{secret_of('alice')} in a thread" in said(stream.result)

    async def test_another_user_gets_nothing_of_it_and_does_not_run_it(self) -> None:
        model = ToolModel()
        made = agent(model)
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        users = Users(manager)
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            parameters = {"input": ask(f"use alook: {secret_of('alice')}")}
            stream = alice.call(lambda: manager.stream_with_agent("alice", "talk", parameters))
            await alice.do(stream.__aenter__())
            with pytest.raises(CrossUserAccessError):
                await bob.do(stream.__anext__())
            items = [item async for item in stream]  # by code of nobody's, to which it was given
            assert secret_of("alice") in str(items[-1])
            await bob.do(stream.__aexit__(None, None, None))
        assert set(model.asked) == {"alice"}

    async def test_without_the_adapter_the_reader_runs_it(self) -> None:
        model = ToolModel()
        made = agent(model)
        users = Users(managed())
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = alice.call(made.astream, ask("use alook: alice's"))

            async def read() -> Any:
                return [item async for item in stream]

            assert secret_of("bob") in str(await bob.do(read()))
        assert set(model.asked) == {"bob"}

    async def test_one_that_is_broken_off_ends(self) -> None:
        made = agent(ToolModel(), checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)

        async def talk(user_id: str) -> None:
            parameters = given(f"use alook: {secret_of(user_id)}")
            async with manager.stream_with_agent(user_id, "talk", parameters) as stream:
                assert not others_in(str(await anext(stream)), user_id)
            result = await manager.execute_with_agent(user_id, "talk", given("hello", "trip-2"))
            assert said(result) == "hello | you said: hello"

        await asyncio.gather(*map(talk, SOME))
        assert not manager.get_active_contexts()
        assert not manager.get_stragglers()


class TestThreads:
    """Steps and tools that block outlive their runs, harmless and listed."""

    def agent(self, gate: Gate, kind: str) -> Any:
        from langchain_core.runnables import RunnableLambda
        from langchain_core.tools import BaseTool, StructuredTool
        from langgraph.func import entrypoint

        class Waiting(BaseTool):
            name: str = "wait"
            description: str = "Waits."

            def _run(self, text: str) -> str:
                return gate.wait(text)

        def step(_: MessagesState) -> Any:
            gate.wait("x")
            return {}

        match kind:
            case "tool":
                return agent(ToolModel(), StructuredTool.from_function(gate.wait))
            case "class":
                return agent(ToolModel(), Waiting())
            case "entrypoint":

                @entrypoint()
                def wait(given: Any) -> Any:
                    gate.wait("x")
                    return given

                return wait
        graph = new_graph(MessagesState).add_node("wait", step if kind == "step" else RunnableLambda(step))
        compiled = graph.add_edge(START, "wait").add_edge("wait", END).compile()
        if kind != "step in a subgraph":
            return compiled
        outer = new_graph(MessagesState).add_node("inner", compiled)
        return outer.add_edge(START, "inner").add_edge("inner", END).compile()

    KINDS = ("tool", "class", "step", "lambda", "step in a subgraph", "entrypoint")

    @pytest.mark.parametrize(("kind", "how"), [*((kind, "cancelled") for kind in KINDS), ("tool", "timed out")])
    async def test_a_thread_that_outlives_its_run(self, kind: str, how: str) -> None:
        gate = Gate()
        store = OwnedStore(InMemoryStore())
        gate.then = lambda: store.put(("notes",), "late", {"text": "too late"})
        manager = managed()
        made = self.agent(gate, kind)
        manager.register_agent("wait", lambda _: made, stateless=True)
        _, client, _ = connect(manager, "alice")
        timeout = 2.0 if how == "timed out" else None
        run = asyncio.create_task(
            manager.execute_with_agent("alice", "wait", {"input": ask("use wait: x")}, timeout=timeout)
        )
        try:
            await asyncio.to_thread(gate.entered.wait, 30)
            assert not manager.get_stragglers()
            if how == "cancelled":
                run.cancel()
            with pytest.raises(AgentTimeoutError if timeout else asyncio.CancelledError):
                await run
            [straggler] = manager.get_stragglers()
            assert (straggler.user_id, straggler.tool) == ("alice", "wait")
            await settled()
            assert [each["data"]["stragglers"] for each in client.envelopes if "stragglers" in each["data"]] == [1]
        finally:
            gate.go_on.set()
            await asyncio.to_thread(gate.left.wait, 30)
        assert isinstance(gate.outcome, ContextClosedError)
        await asyncio.to_thread(wait_until, lambda: not manager.get_stragglers(), "the thread has ended")

    async def test_one_that_ends_in_time_is_none(self) -> None:
        for kind in self.KINDS:
            gate = Gate()
            gate.go_on.set()
            gate.then = lambda: current_context().user_id
            manager = managed()
            made = self.agent(gate, kind)
            manager.register_agent("wait", lambda _, made=made: made, stateless=True)  # type: ignore[misc]
            await manager.execute_with_agent("alice", "wait", {"input": ask("use wait: x")})
            assert gate.outcome == "alice"
            assert not manager.get_stragglers()


class TestParameters:
    """What does not fit is said."""

    @pytest.mark.parametrize(
        ("parameters", "problem"),
        [
            ({}, "neither"),
            ({"input": ask("x"), "resume": 1, "thread_id": "t-1"}, "both"),
            ({"prompt": "x"}, "no parameter 'prompt'"),
            ({"input": "hello", "thread_id": "t-1"}, "its input is a str"),
            ({"input": ask("x")}, "no thread_id was given"),
            ({"input": ask("x"), "thread_id": "t-1", "stream_mode": "updates"}, "no parameter 'stream_mode'"),
            ({"input": ask("x"), "configurable": {"thread_id": "t-1"}}, "which is LangGraph's"),
            ({"input": ask("x"), "configurable": {"__pregel_checkpointer": 1}, "thread_id": "t-1"}, "LangGraph's"),
            ({"input": ask("x"), "configurable": ["x"], "thread_id": "t-1"}, "no mapping"),
        ],
        ids=str,
    )
    async def test_what_does_not_fit(self, parameters: dict[str, Any], problem: str) -> None:
        made = agent(ToolModel(), checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        with pytest.raises(AgentParametersError, match=problem) as caught:
            await manager.execute_with_agent("alice", "talk", parameters)
        assert caught.value.agent == "talk"
        assert caught.value.remedy

    async def test_events_are_asked_for_with_a_bool(self) -> None:
        manager = managed()
        manager.register_agent("talk", lambda _: agent(ToolModel()), stateless=True)
        with pytest.raises(AgentParametersError, match="events"):
            async with manager.stream_with_agent("alice", "talk", {"input": ask("x"), "events": "v2"}) as stream:
                await anext(stream)

    async def test_events_have_a_version_of_their_own(self) -> None:
        manager = managed()
        manager.register_agent("talk", lambda _: agent(ToolModel()), stateless=True)
        given = {"input": ask("x"), "events": True, "version": "v2"}
        with pytest.raises(AgentParametersError, match="version is given with events"):
            async with manager.stream_with_agent("alice", "talk", given) as stream:
                await anext(stream)

    async def test_all_that_langgraph_takes_is_passed_on(self) -> None:
        class Config(TypedDict):
            got: Any

        async def show(state: Config, config: Any, runtime: Any) -> Any:
            return {"got": (config["configurable"]["flavour"], config["tags"], config["metadata"]["kind"])}

        async def pause(state: Config) -> Any:
            raise AssertionError("it stops before")

        show.__annotations__.clear()
        graph = new_graph(Config).add_node("show", show).add_node("pause", pause).add_edge(START, "show")
        made = graph.add_edge("show", "pause").compile(checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager = managed()
        manager.register_agent("show", lambda _: made, stateless=True)
        result = await manager.execute_with_agent(
            "alice",
            "show",
            {
                "input": {"got": None},
                "thread_id": "t-1",
                "configurable": {"flavour": "sweet"},
                "tags": ["tagged"],
                "metadata": {"kind": "good"},
                "interrupt_before": ["pause"],
                "durability": "sync",
                "recursion_limit": 7,
                "max_concurrency": 2,
            },
        )
        assert result["got"][0] == "sweet"
        assert "tagged" in result["got"][1]
        assert result["got"][2] == "good"
        with pytest.raises(AgentParametersError, match="neither"):
            await manager.execute_with_agent("alice", "show", {"thread_id": "t-1"})
        with pytest.raises(AssertionError, match="it stops before"):
            await manager.execute_with_agent("alice", "show", {"input": None, "thread_id": "t-1"})

    async def test_messages_and_commands_go_in_as_copies(self) -> None:
        made = agent(ToolModel())
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        mine = HumanMessage("hello")
        result = await manager.execute_with_agent("alice", "talk", {"input": {"messages": [mine]}})
        assert result["messages"][0] == HumanMessage("hello", id=result["messages"][0].id)
        assert mine.id is None
        update: Any = Command(update={"messages": [mine]})
        assert "you said: hello" in said(await manager.execute_with_agent("alice", "talk", {"input": update}))

    async def test_the_runs_context_is_the_runtimes(self) -> None:
        seen: list[Any] = []

        async def peek(text: str, runtime: ToolRuntime[Any]) -> str:
            """Looks."""
            assert current_run().context is current_context()
            seen.append(runtime.context)
            return text

        manager = managed()
        manager.register_agent("bare", lambda _: agent(ToolModel(), peek))
        manager.register_agent("typed", lambda _: agent(ToolModel(), peek, context_schema=UserExecutionContext))
        manager.register_agent("other", lambda _: agent(ToolModel(), peek, context_schema=dict))
        for name in ("bare", "typed", "other"):
            await manager.execute_with_agent("alice", name, {"input": ask("use peek: x")})
        assert [type(each) for each in seen] == [type(None), UserExecutionContext, type(None)]
        assert seen[1].parent_request_id is not None
        await manager.execute_with_agent("alice", "other", {"input": ask("use peek: x"), "context": {"a": 1}})
        assert seen[-1] == {"a": 1}

    @pytest.mark.parametrize(
        ("what", "kept", "owned"),
        [
            ("checkpointer", InMemorySaver(), OwnedCheckpointer),
            ("store", InMemoryStore(), OwnedStore),
            ("cache", InMemoryCache(), OwnedCache),
        ],
    )
    async def test_what_all_users_would_share_is_refused(self, what: str, kept: Any, owned: Any) -> None:
        parameters = given("hello")
        for plugin, keeps, fits in (
            (LangGraph(), kept, False),
            (LangGraph(), owned(kept), True),
            (LangGraph(shared=[kept]), kept, True),
        ):
            manager = UserContextManager(plugins=[plugin])
            made = agent(ToolModel(), **{what: keeps})
            manager.register_agent("talk", lambda _, made=made: made, stateless=True)  # type: ignore[misc]
            if fits:
                await manager.execute_with_agent("alice", "talk", parameters)
                continue
            with pytest.raises(AgentError, match=f"its {what} is all users' together") as caught:
                await manager.execute_with_agent("alice", "talk", parameters)
            assert owned.__name__ in caught.value.remedy

    @pytest.mark.parametrize("depth", [1, 2])
    async def test_a_cache_of_a_subgraph_is_refused_too(self, depth: int) -> None:
        """LangGraph uses it, where the graph around has none."""

        class Mine(TypedDict):
            whose: str

        async def look_up(_: Mine) -> Mine:
            return {"whose": current_context().user_id}

        def graph(cache: Any) -> Any:
            inner = new_graph(Mine).add_node("look_up", look_up, cache_policy=CachePolicy())
            made = inner.add_edge(START, "look_up").compile(cache=cache)
            for level in range(depth):
                made = new_graph(Mine).add_node(f"inner-{level}", made).add_edge(START, f"inner-{level}").compile()
            return made

        kept: InMemoryCache[Any] = InMemoryCache()
        bare, owned = graph(kept), graph(OwnedCache(InMemoryCache()))
        manager = managed()
        manager.register_agent("bare", lambda _: bare, stateless=True)
        manager.register_agent("owned", lambda _: owned, stateless=True)
        for user_id in ("alice", "bob"):
            with pytest.raises(AgentError, match=r"the cache of its subgraph 'inner-0' is all users' together"):
                await manager.execute_with_agent(user_id, "bare", {"input": {"whose": ""}})
            assert await manager.execute_with_agent(user_id, "owned", {"input": {"whose": ""}}) == {"whose": user_id}
        assert not kept._cache
        shared = UserContextManager(plugins=[LangGraph(shared=[kept])])
        shared.register_agent("bare", lambda _: bare, stateless=True)
        assert await shared.execute_with_agent("alice", "bare", {"input": {"whose": ""}}) == {"whose": "alice"}

    async def test_a_graph_goes_away_with_its_run(self) -> None:
        """Also one whose steps know it, and whose factory gave them the run's context."""
        kept: list[weakref.ref[Any]] = []

        def make(context: UserExecutionContext) -> Any:
            def step(_: MessagesState) -> Any:
                return {"messages": [AIMessage(f"{made.name} of {context.user_id}")]}

            made = new_graph(MessagesState).add_node("step", step).add_edge(START, "step").compile()
            kept.extend((weakref.ref(made), weakref.ref(context)))
            return made

        manager = managed()
        manager.register_agent("step", make)
        for _ in range(3):
            assert "of alice" in said(await manager.execute_with_agent("alice", "step", {"input": ask("x")}))

        def are_gone() -> bool:
            gc.collect()
            return all(reference() is None for reference in kept)

        wait_until(are_gone, "the graphs, of which a worker's thread may be letting go just now, to be freed")

    async def test_a_graph_that_has_run_may_be_configured_anew(self) -> None:
        made = agent(ToolModel())
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        manager.register_agent("tagged", lambda _: made.with_config(tags=["x"]))
        for name in ("talk", "tagged", "talk"):
            assert secret_of("alice") in said(
                await manager.execute_with_agent("alice", name, {"input": ask("use look: x")})
            )

    async def test_an_agent_of_another_framework_is_not_its(self) -> None:
        async def other(text: str) -> str:
            return text

        manager = managed()
        manager.register_agent("other", lambda _: other, stateless=True)
        manager.register_agent("odd", lambda _: object())
        assert await manager.execute_with_agent("alice", "other", {"text": "x"}) == "x"
        with pytest.raises(AgentError, match="nothing that any plugin of this manager runs"):
            await manager.execute_with_agent("alice", "odd", {"input": None})

    async def test_a_saver_that_is_set_later_is_used(self) -> None:
        """As an application does in its lifespan, on a graph of its module."""
        made = agent(ToolModel())
        manager = managed()
        manager.register_agent("talk", lambda _: made, stateless=True)
        await manager.execute_with_agent("alice", "talk", {"input": ask("hello")})
        made.checkpointer = OwnedCheckpointer(InMemorySaver())
        results = [await manager.execute_with_agent("alice", "talk", given("hello")) for _ in range(2)]
        assert len(results[1]["messages"]) == 4
