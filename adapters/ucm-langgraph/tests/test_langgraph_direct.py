"""Graphs and agents that an application calls itself: what holds them to their user."""

import asyncio
from typing import Any

import pytest
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware, SummarizationMiddleware
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ensure_config
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState
from langgraph.types import Command

from langgraph_actors import Actor
from langgraph_agents import USERS, ToolModel, agent, ask, look, others_in, said, secret_of
from langgraph_stores import AnySaver, new_graph, run_graph
from ucm_langgraph import OwnedCheckpointer, OwnerGuard
from ucm_langgraph.middleware import OwnerMiddleware
from ucm_middleware import ContextNotFoundError, CrossUserAccessError, UserContextManager, current_context
from ucm_middleware.testing import RecordingLedger, Users

CONFIG: Any = {"configurable": {"thread_id": "trip-1"}}


@pytest.fixture
def users(ledger: RecordingLedger) -> Users:
    return Users(UserContextManager(ledger=ledger))


async def drain(stream: Any) -> list[Any]:
    return [each async for each in stream]


async def test_agents_in_requests_on_every_saver(saver: AnySaver, users: Users) -> None:
    made = agent(ToolModel(), checkpointer=OwnedCheckpointer(saver.bare))

    async def talk(user_id: str) -> None:
        with users.running(user_id):
            for turn in range(2):
                result = await run_graph(saver, made, ask(f"use look: {secret_of(user_id)}"), CONFIG)
                assert len(result["messages"]) == 4 * (turn + 1)
                assert not others_in(said(result), user_id)

    await asyncio.gather(*map(talk, USERS[:10]))


class TestGuard:
    """A handler, for every kind of graph."""

    async def test_each_run_is_its_users(self, users: Users) -> None:
        made = agent(ToolModel(), checkpointer=OwnedCheckpointer(InMemorySaver()))
        guarded = made.with_config(callbacks=[OwnerGuard()])

        async def talk(user_id: str) -> None:
            with users.running(user_id):
                assert secret_of(user_id) in said(await guarded.ainvoke(ask("use look: x"), CONFIG))

        await asyncio.gather(*map(talk, USERS[:10]))
        with users.running("alice"):
            assert await asyncio.to_thread(guarded.invoke, ask("use look: x"), CONFIG)

    @pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "bare"])
    async def test_a_stream_that_is_passed_on(self, users: Users, ledger: RecordingLedger, guarded: bool) -> None:
        model = ToolModel()
        made = agent(model)
        if guarded:
            made = made.with_config(callbacks=[OwnerGuard()])
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = made.astream(ask("use alook: alice's secret"), stream_mode="updates")
            await alice.do(anext(stream))
            assert list(model.asked) == ["alice"]
            if not guarded:  # the leak: the tool and the model work as bob with what was alice's
                assert secret_of("bob") in str(await bob.do(drain(stream)))
                assert "alice's secret" in str(model.asked["bob"])
                return
            with pytest.raises(CrossUserAccessError):
                await bob.do(drain(stream))
        assert list(model.asked) == ["alice"]
        assert ledger.select("denied", user="bob")

    async def test_a_stream_is_held_to_a_user_before_it_begins(self, users: Users) -> None:
        model = ToolModel()
        made = agent(model)
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            for reader in (bob, alice):
                config: Any = {"callbacks": [OwnerGuard(alice.context)]}
                stream = made.astream(ask("alice's secret"), config)
                if reader is alice:
                    assert await alice.do(drain(stream))
                else:
                    with pytest.raises(CrossUserAccessError):
                        await bob.do(drain(stream))
        assert list(model.asked) == ["alice"]

    async def test_outside_of_a_context_nothing_begins(self) -> None:
        model = ToolModel()
        guarded = agent(model).with_config(callbacks=[OwnerGuard()])
        with pytest.raises(ContextNotFoundError):
            await guarded.ainvoke(ask("hello"))
        assert not model.asked

    @pytest.mark.parametrize("kind", ["model", "tool", "retriever"])
    async def test_what_a_step_does_as_another_user_is_refused(self, users: Users, kind: str) -> None:
        model = ToolModel()
        asked: list[str] = []

        class Library(BaseRetriever):
            def _get_relevant_documents(self, query: str, *, run_manager: Any) -> Any:
                asked.append(query)
                return []

        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:

            async def step(state: MessagesState) -> Any:
                config = ensure_config()
                match kind:
                    case "model":
                        await bob.do(model.ainvoke("alice's secret", config))
                    case "tool":
                        asked.append(await bob.do(look.ainvoke({"text": "alice's secret"}, config)))
                    case _:
                        await bob.do(Library().ainvoke("alice's secret", config))
                return {"messages": [AIMessage("done")]}

            made = new_graph(MessagesState).add_node("step", step).add_edge(START, "step").compile()
            await alice.do(made.ainvoke(ask("x")))
            assert asked or model.asked
            asked.clear()
            model.asked.clear()
            with pytest.raises(CrossUserAccessError):
                await alice.do(made.with_config(callbacks=[OwnerGuard()]).ainvoke(ask("x")))
            assert not asked
            assert not model.asked

    async def test_what_a_tool_asks_as_another_user_is_refused(self, users: Users) -> None:
        model = ToolModel()
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:

            @tool
            async def consult(text: str) -> str:
                """Asks a model."""
                return str((await bob.do(model.ainvoke(text, ensure_config()))).content)

            made = agent(ToolModel(), consult)
            assert "alice's secret" in said(await alice.do(made.ainvoke(ask("use consult: alice's secret"))))
            assert model.asked.pop("bob")
            guard = OwnerGuard()
            with pytest.raises(CrossUserAccessError):
                await alice.do(made.ainvoke(ask("use consult: alice's secret"), {"callbacks": [guard]}))
        assert not model.asked
        assert not guard._owners

    async def test_it_keeps_nothing_of_runs_that_have_ended(self, users: Users) -> None:
        guard = OwnerGuard()

        async def broken(state: MessagesState) -> Any:
            raise LookupError("broken")

        graph = new_graph(MessagesState).add_node("broken", broken).add_edge(START, "broken").compile()
        with users.running("alice"):
            with pytest.raises(LookupError, match="broken"):
                await graph.with_config(callbacks=[guard]).ainvoke(ask("x"))
            stream = agent(ToolModel()).with_config(callbacks=[guard]).astream(ask("use look: x"))
            await anext(stream)
            await stream.aclose()
            await agent(ToolModel()).with_config(callbacks=[guard]).ainvoke(ask("use look: x"))
        assert not guard._owners


def summarizing(model: ToolModel) -> Any:
    """Middleware that asks ``model`` before the agent's own, from the third message on."""
    return SummarizationMiddleware(model=model, trigger=("messages", 3), keep=("messages", 1))


class Noting(AgentMiddleware[Any, Any, Any]):
    """Middleware that has a step of its own before the model's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.ran_as: list[str] = []

    @property
    def name(self) -> str:
        return self._name

    async def abefore_model(self, state: Any, runtime: Any) -> None:
        self.ran_as.append(current_context().user_id)


class TestMiddleware:
    """For agents of LangChain's, on whatever saver."""

    def agent(self, model: ToolModel, **options: Any) -> Any:
        return agent(model, middleware=[OwnerMiddleware()], **options)

    @pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "async"])
    async def test_a_conversation_is_who_began_its(self, users: Users, blocks: bool) -> None:
        model = ToolModel()
        made = self.agent(model, checkpointer=InMemorySaver())

        async def talk(text: str) -> Any:
            return made.invoke(ask(text), CONFIG) if blocks else await made.ainvoke(ask(text), CONFIG)

        with users.running("alice"):
            for _ in range(2):
                result = await talk("use look: alice's secret")
                assert "ucm_owner" not in result
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await talk("what did I say?")
        assert list(model.asked) == ["alice"]

    @pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "async"])
    async def test_what_another_says_is_not_kept(self, users: Users, blocks: bool) -> None:
        model = ToolModel()
        made = self.agent(model, checkpointer=InMemorySaver())

        async def call(method: str, *given: Any) -> Any:
            return getattr(made, method)(*given) if blocks else await getattr(made, f"a{method}")(*given)

        with users.running("alice"):
            await call("invoke", ask("hello"), CONFIG)
        with users.running("bob"):
            for method, given in (
                ("invoke", (ask("from bob"), CONFIG)),
                ("update_state", (CONFIG, ask("from bob"))),
                ("get_state", (CONFIG,)),
            ):
                with pytest.raises(CrossUserAccessError):
                    await call(method, *given)
        with pytest.raises(ContextNotFoundError):
            await call("get_state", CONFIG)
        with users.running("alice"):
            assert "from bob" not in said(await call("invoke", ask("again"), CONFIG))
            assert "hello" in said((await call("get_state", CONFIG)).values)
        assert list(model.asked) == ["alice"]

    async def test_under_an_owned_saver_the_same_name_is_another_conversation(self, users: Users) -> None:
        model = ToolModel()
        made = self.agent(model, checkpointer=OwnedCheckpointer(InMemorySaver()))
        for user_id in ("alice", "bob"):
            with users.running(user_id):
                result = await made.ainvoke(ask(f"from {user_id}"), CONFIG)
                assert said(result) == f"from {user_id} | you said: from {user_id}"

    async def test_nobody_else_says_yes_to_what_waits_for_a_person(self, saver: AnySaver, users: Users) -> None:
        waits: Any = HumanInTheLoopMiddleware(interrupt_on={"look": True})
        made = agent(ToolModel(), middleware=[OwnerMiddleware(), waits], checkpointer=saver.bare)
        yes: Command[Any] = Command(resume={"decisions": [{"type": "approve"}]})

        with users.running("alice"):
            assert "__interrupt__" in await run_graph(saver, made, ask("use look: alice's secret"), CONFIG)
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await run_graph(saver, made, yes, CONFIG)
        with users.running("alice"):
            assert "__interrupt__" in await run_graph(saver, made, None, CONFIG)  # bob's yes was not kept
            assert secret_of("alice") in said(await run_graph(saver, made, yes, CONFIG))

    async def test_a_tool_that_waits_for_a_person_is_not_called_by_another(self, users: Users) -> None:
        model = ToolModel()
        made = self.agent(model, checkpointer=InMemorySaver(), interrupt_before=["tools"])
        with users.running("alice"):
            await made.ainvoke(ask("use look: alice's secret"), CONFIG)
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await made.ainvoke(None, CONFIG)
        with users.running("alice"):
            assert secret_of("alice") in said(await made.ainvoke(None, CONFIG))

    @pytest.mark.parametrize("step", ["OwnerMiddleware.before_model", "model", "tools"])
    async def test_a_stream_that_is_passed_on(self, users: Users, step: str) -> None:
        """Before the model, after it, where a tool is to be called, and after that, where the model is again."""
        model, called_by = ToolModel(), list[str]()

        @tool
        async def note(text: str) -> str:
            """Notes something."""
            called_by.append(current_context().user_id)
            return text

        made = agent(model, note, middleware=[OwnerMiddleware()])
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = made.astream(ask("use note: alice's secret"), stream_mode="updates")
            while step not in await alice.do(anext(stream)):
                continue
            with pytest.raises(CrossUserAccessError):
                await bob.do(drain(stream))
        assert "bob" not in [*model.asked, *called_by]

    @pytest.mark.parametrize("step", ["model", "tools"])
    async def test_other_middleware_begins_no_turn_for_another(self, users: Users, step: str) -> None:
        """Such as one that shows a model of its own what was said."""
        summarizer = ToolModel()
        made = agent(ToolModel(), middleware=[OwnerMiddleware(), summarizing(summarizer)])
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = made.astream(ask("use alook: alice's secret"), stream_mode="updates")
            while step not in await alice.do(anext(stream)):
                continue
            with pytest.raises(CrossUserAccessError):
                await bob.do(drain(stream))
        assert not summarizer.asked

    @pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "bare"])
    async def test_in_the_middle_of_a_turn_the_guard_holds_other_middleware(self, users: Users, guarded: bool) -> None:
        first, second = Noting("first"), Noting("second")
        made = agent(ToolModel(), middleware=[OwnerMiddleware(), first, second])
        if guarded:
            made = made.with_config(callbacks=[OwnerGuard()])
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = made.astream(ask("hello"), stream_mode="updates")
            while "OwnerMiddleware.before_model" not in await alice.do(anext(stream)):
                continue
            with pytest.raises(CrossUserAccessError):
                await bob.do(drain(stream))
        assert first.ran_as == ([] if guarded else ["bob"])
        assert not second.ran_as

    async def test_nobody_gives_an_owner(self, users: Users) -> None:
        made = self.agent(ToolModel(), checkpointer=InMemorySaver())
        with users.running("alice"):
            await made.ainvoke({**ask("hello"), "ucm_owner": "somebody"}, CONFIG)
            assert "hello" in said(await made.ainvoke({**ask("more"), "ucm_owner": "somebody"}, CONFIG))

    async def test_a_rotated_secret_keeps_the_conversation(self) -> None:
        old, new = "the first secret of this test: 0123456789", "the second secret of this test: 0123456789"
        made = self.agent(ToolModel(), checkpointer=InMemorySaver())
        for secrets in ((old,), (new, old), (new,)):
            users = Users(UserContextManager(secret=secrets[0], previous_secrets=secrets[1:]))
            with users.running("alice"):
                result = await made.ainvoke(ask("use look: x"), CONFIG)
        assert len(result["messages"]) == 12

    async def test_outside_of_a_context_nothing_begins(self) -> None:
        model = ToolModel()
        with pytest.raises(ContextNotFoundError):
            await self.agent(model).ainvoke(ask("hello"))
        assert not model.asked

    async def test_within_a_run(self) -> None:
        from ucm_langgraph import LangGraph

        manager = UserContextManager(plugins=[LangGraph()])
        made = self.agent(ToolModel(), checkpointer=OwnedCheckpointer(InMemorySaver()))
        manager.register_agent("talk", lambda _: made, stateless=True)
        for user_id in ("alice", "bob", "alice"):
            given = {"input": ask("use look: x"), "thread_id": "t-1"}
            assert secret_of(user_id) in said(await manager.execute_with_agent(user_id, "talk", given))
