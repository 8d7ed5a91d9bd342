"""Threads on every saver: whoever names an id gets a thread of their own, and without the adapter the other's."""

import asyncio
import operator
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START
from langgraph.types import Command, interrupt

from langgraph_actors import Actor
from langgraph_stores import AnySaver, new_graph, run_graph
from ucm_langgraph import OwnedCheckpointer
from ucm_middleware import (
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
    current_context,
    managed_user_context,
)
from ucm_middleware.testing import Users

THREAD = {"configurable": {"thread_id": "trip-1"}}


class Talk(TypedDict):
    said: Annotated[list[str], operator.add]


def talk(saver: BaseCheckpointSaver[Any]) -> Any:
    """A conversation, with one within it, that asks before it ends."""

    def inner(_: Talk) -> Any:
        return {"said": ["inner"]}

    def ask(state: Talk) -> Any:
        return {"said": [f"{interrupt(state['said'][0])}!"]}

    small = new_graph(Talk).add_node("inner", inner).add_edge(START, "inner").compile()
    graph = new_graph(Talk).add_node("small", small).add_node("ask", ask)
    return graph.add_edge(START, "small").add_edge("small", "ask").add_edge("ask", END).compile(checkpointer=saver)


@pytest.fixture
def users() -> Users:
    return Users(UserContextManager(max_contexts_per_user=1000))


def managed(secret: str, *previous: str) -> Users:
    return Users(UserContextManager(secret=secret, previous_secrets=previous))


async def test_without_the_adapter_a_thread_is_whose_names_it(saver: AnySaver, users: Users) -> None:
    graph = talk(saver.bare)
    with users.running("alice"):
        await run_graph(saver, graph, {"said": ["alice's secret"]}, THREAD)
    with users.running("bob"):
        done = await run_graph(saver, graph, Command(resume="bob read it"), THREAD)
    assert "alice's secret" in done["said"]


async def test_a_thread_is_the_users_own(saver: AnySaver, users: Users) -> None:
    graph = talk(OwnedCheckpointer(saver.bare))
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            paused = await run_graph(saver, graph, {"said": [f"{user_id}'s secret"]}, THREAD)
            assert paused["__interrupt__"][0].value == f"{user_id}'s secret"
    for user_id in ("bob", "alice"):
        with users.running(user_id):
            done = await run_graph(saver, graph, Command(resume=user_id), THREAD)
            assert set(done["said"]) == {f"{user_id}'s secret", "inner", f"{user_id}!"}


async def drain(stream: Any) -> list[Any]:
    return [each async for each in stream]


async def state_of(saver: AnySaver, graph: Any, config: Any, **options: Any) -> Any:
    return graph.get_state(config, **options) if saver.blocks else await graph.aget_state(config, **options)


async def listed(saver: AnySaver, owned: OwnedCheckpointer, config: Any, **options: Any) -> list[Any]:
    if saver.blocks:
        return list(owned.list(config, **options))
    return [each async for each in owned.alist(config, **options)]


async def test_the_clients_id_comes_back_everywhere(saver: AnySaver, users: Users) -> None:
    graph = talk(OwnedCheckpointer(saver.bare))
    with users.running("alice") as context:
        derived = context.derive_key("langgraph_thread", "trip-1")
        seen = [await run_graph(saver, graph, {"said": ["one"]}, THREAD)]
        state = await state_of(saver, graph, THREAD, subgraphs=True)
        assert state.config["configurable"]["thread_id"] == "trip-1"
        assert state.parent_config["configurable"]["thread_id"] == "trip-1"
        history = (
            list(graph.get_state_history(THREAD))
            if saver.blocks
            else [each async for each in graph.aget_state_history(THREAD)]
        )
        assert {each.config["configurable"]["thread_id"] for each in history} == {"trip-1"}
        seen += [state, history]
        first = history[-1].config["configurable"]["checkpoint_id"]
        again = {"configurable": {**THREAD["configurable"], "checkpoint_id": first}}
        seen.append(await state_of(saver, graph, again))
        assert seen[-1].metadata["source"] == "input"
        modes = ["values", "updates", "debug", "checkpoints", "tasks"]
        if saver.blocks:
            seen += list(graph.stream({"said": ["two"]}, THREAD, stream_mode=modes, subgraphs=True))
        else:
            stream = graph.astream({"said": ["two"]}, THREAD, stream_mode=modes, subgraphs=True)
            seen += [each async for each in stream]
        assert "trip-1" in str(seen)
        for hidden in (derived, "ucm_"):
            assert hidden not in str(seen)


async def test_nothing_stands_under_the_clients_id(saver: AnySaver, users: Users) -> None:
    graph = talk(OwnedCheckpointer(saver.bare))
    with users.running("alice"):
        await run_graph(saver, graph, {"said": ["one"]}, THREAD)
    bare = saver.bare.get_tuple(THREAD) if saver.blocks else await saver.bare.aget_tuple(THREAD)  # type: ignore[arg-type]
    assert bare is None


async def test_a_checkpoint_of_another_users_is_not_there(saver: AnySaver, users: Users) -> None:
    graph = talk(OwnedCheckpointer(saver.bare))
    with users.running("alice"):
        await run_graph(saver, graph, {"said": ["alice's secret"]}, THREAD)
        alices = (await state_of(saver, graph, THREAD)).config
        derived = current_context().derive_key("langgraph_thread", "trip-1")
    with users.running("bob"):
        assert (await state_of(saver, graph, alices)).values == {}
        named = {"configurable": {**alices["configurable"], "thread_id": derived}}
        assert (await state_of(saver, graph, named)).values == {}
        done = await run_graph(saver, graph, {"said": ["bob's"]}, alices)
        assert "alice" not in str(done)


async def test_a_listing_shows_the_users_own(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    for user_id in ("alice", "bob"):
        for thread in ("trip-1", "trip-2"):
            with users.running(user_id):
                config = {"configurable": {"thread_id": thread}}
                await run_graph(saver, graph, {"said": [f"{user_id} {thread}"]}, config)
    with users.running("alice"):
        everything = await listed(saver, owned, None)
        assert {each.config["configurable"]["thread_id"] for each in everything} == {"trip-1", "trip-2"}
        assert "alice trip-2" in str(everything)
        assert "bob" not in str(everything)
        assert len(await listed(saver, owned, None, limit=3)) == 3
        assert {each.metadata["source"] for each in await listed(saver, owned, None, filter={"source": "input"})} == {
            "input"
        }
        stolen = await listed(saver, owned, None, filter={"ucm_owner": "whatever", "source": "input"})
        assert len(stolen) == 4  # as if it had not been named: two threads, and the one in each
        one = await listed(saver, owned, THREAD)
        assert 0 < len(one) < len(everything)
        before = await listed(saver, owned, THREAD, before=one[0].config)
        assert one[0].config not in [each.config for each in before]


async def test_a_listing_read_by_another_user_is_refused(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
        await alice.do(run_graph(saver, graph, {"said": ["alice's secret"]}, THREAD))
        for config in (THREAD, None):
            listing: Any = alice.call(owned.list if saver.blocks else owned.alist, config)

            async def read(listing: Any = listing) -> Any:
                return next(listing) if saver.blocks else await anext(listing)

            with pytest.raises(CrossUserAccessError):
                await bob.do(read())


async def test_deleting_is_owned(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await run_graph(saver, graph, {"said": [user_id]}, THREAD)
    with users.running("bob"):
        if saver.blocks:
            owned.delete_thread("trip-1")
        else:
            await owned.adelete_thread("trip-1")
        assert await listed(saver, owned, None) == []
    with users.running("alice"):
        assert (await state_of(saver, graph, THREAD)).values["said"] == ["alice", "alice", "inner"]


async def test_a_thread_is_copied_within_the_users_own(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    with users.running("alice"):
        await run_graph(saver, graph, {"said": ["secret"]}, THREAD)
    for user_id, expected in (("bob", {}), ("alice", {"said": ["secret", "secret", "inner"]})):
        with users.running(user_id):
            if saver.blocks:
                owned.copy_thread("trip-1", "trip-9")
            else:
                await owned.acopy_thread("trip-1", "trip-9")
            copied = {"configurable": {"thread_id": "trip-9"}}
            assert (await state_of(saver, graph, copied)).values == expected
    with users.running("alice"):
        done = await run_graph(saver, graph, Command(resume="go"), copied)
        assert done["said"][-1] == "go!"
        assert (await state_of(saver, graph, THREAD)).next == ("ask",)


async def test_pruning_is_owned(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await run_graph(saver, graph, {"said": [user_id]}, THREAD)
    with users.running("bob"):
        try:
            if saver.blocks:
                owned.prune(["trip-1"], strategy="delete")
            else:
                await owned.aprune(["trip-1"], strategy="delete")
        except NotImplementedError:
            assert "postgres" not in saver.kind  # the others have no such thing
        else:
            assert (await state_of(saver, graph, THREAD)).values == {}
    with users.running("alice"):
        assert (await state_of(saver, graph, THREAD)).values["said"][0] == "alice"
        with pytest.raises(NotImplementedError, match="delete_thread"):
            if saver.blocks:
                owned.delete_for_runs(["any"])
            else:
                await owned.adelete_for_runs(["any"])


@pytest.mark.parametrize("first", ["a state", "a listing", "all threads"])
async def test_a_rotated_secret_keeps_the_threads(saver: AnySaver, first: str) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    old, new = "the first secret of this test: 0123456789", "the second secret of this test: 0123456789"
    with managed(old).running("alice") as context:
        await run_graph(saver, graph, {"said": ["secret"]}, THREAD)
        former = context.derive_key("langgraph_thread", "trip-1")
        count = len(await listed(saver, owned, THREAD))
    rotated = managed(new, old)
    with rotated.running("bob"):
        assert await listed(saver, owned, None) == []
        assert (await state_of(saver, graph, THREAD)).values == {}
    with rotated.running("alice"):
        if first == "a listing":
            assert len(await listed(saver, owned, THREAD)) == count
        elif first == "all threads":
            assert len(await listed(saver, owned, None)) == count
        done = await run_graph(saver, graph, Command(resume="go"), THREAD)
        assert done["said"] == ["secret", "secret", "inner", "go!"]
    gone = {"configurable": {"thread_id": former}}
    left = list(saver.bare.list(gone)) if saver.blocks else [each async for each in saver.bare.alist(gone)]  # type: ignore[arg-type]
    assert left == []
    with managed(new).running("alice"):  # the previous secret is needed no more
        assert (await state_of(saver, graph, THREAD)).values["said"] == done["said"]
        assert len(await listed(saver, owned, None)) > count


async def test_channels_of_differences_are_the_users_own(saver: AnySaver) -> None:
    """What LangGraph puts together from a thread's writes, by another method of the saver's."""

    def joined(state: list[str], writes: Sequence[list[str]]) -> list[str]:
        return [*state, *(each for write in writes for each in write)]

    class Differences(TypedDict):
        said: Annotated[list[str], DeltaChannel(joined, list)]

    def say(state: Differences) -> Any:
        return {"said": [f"{len(state['said'])} of {current_context().user_id}"]}

    graph = new_graph(Differences)
    for name in ("say", "also"):
        graph = graph.add_node(name, say).add_edge(START, name)
    graph = graph.compile(checkpointer=OwnedCheckpointer(saver.bare))
    old, new = "the first secret of this test: 0123456789", "the second secret of this test: 0123456789"
    kept: dict[str, Any] = {}
    for user_id in ("alice", "bob"):
        with managed(old).running(user_id):
            turns = [await run_graph(saver, graph, {"said": [f"{n} {user_id}"]}, THREAD) for n in range(3)]
            kept[user_id] = turns[-1]
            assert len(turns[-1]["said"]) == 9
            assert all(user_id in each for each in turns[-1]["said"])
    for user_id in ("bob", "alice"):
        with managed(new, old).running(user_id):
            assert (await state_of(saver, graph, THREAD)).values == kept[user_id]


async def test_deleting_during_a_rotation_leaves_nothing(saver: AnySaver) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    old, new = "the first secret of this test: 0123456789", "the second secret of this test: 0123456789"
    with managed(old).running("alice"):
        await run_graph(saver, graph, {"said": ["secret"]}, THREAD)
    with managed(new, old).running("alice"):
        if saver.blocks:
            owned.delete_thread("trip-1")
        else:
            await owned.adelete_thread("trip-1")
        assert await listed(saver, owned, None) == []
    with managed(old).running("alice"):
        assert await listed(saver, owned, None) == []


async def test_outside_of_a_context_nothing_is_given(saver: AnySaver, users: Users) -> None:
    owned = OwnedCheckpointer(saver.bare)
    graph = talk(owned)
    with users.running("alice"):
        await run_graph(saver, graph, {"said": ["secret"]}, THREAD)
    for attempt in (
        lambda: run_graph(saver, graph, {"said": ["x"]}, THREAD),
        lambda: state_of(saver, graph, THREAD),
        lambda: listed(saver, owned, None),
        lambda: listed(saver, owned, THREAD),
    ):
        with pytest.raises(ContextNotFoundError):
            await attempt()


class TestOnMemory:
    """What does not depend on the saver."""

    @pytest.fixture
    def owned(self) -> OwnedCheckpointer:
        return OwnedCheckpointer(InMemorySaver())

    async def test_a_stream_that_another_user_goes_on_with_is_refused(
        self, owned: OwnedCheckpointer, users: Users
    ) -> None:
        graph = talk(owned)
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = graph.astream({"said": ["alice's secret"]}, THREAD, stream_mode="updates")
            assert "small" in await alice.do(anext(stream))
            with pytest.raises(CrossUserAccessError):
                await bob.do(drain(stream))
            assert (await bob.do(graph.aget_state(THREAD))).values == {}

    async def test_without_the_adapter_such_a_stream_goes_on(self, users: Users) -> None:
        graph = talk(InMemorySaver())
        with Actor(users, "alice") as alice, Actor(users, "bob") as bob:
            stream = graph.astream({"said": ["alice's secret"]}, THREAD, stream_mode="updates")
            await alice.do(anext(stream))
            assert "alice's secret" in str(await bob.do(drain(stream)))

    async def test_what_threads_store_that_have_lost_the_context_is_the_runs(self, owned: OwnedCheckpointer) -> None:
        """Under a middleware code in no context may do nothing; LangGraph stores from callbacks of its threads."""
        manager = UserContextManager()
        context = manager.create_isolated_context("alice")
        graph = new_graph(Talk)
        for name in ("one", "two", "three"):
            graph = graph.add_node(name, lambda _: {"said": [current_context().user_id]}).add_edge(START, name)
        graph = graph.compile(checkpointer=owned)
        with managed_user_context(context):
            manager.serve()
            items = await asyncio.to_thread(lambda: list(graph.stream({"said": []}, THREAD, stream_mode="updates")))
            assert len(items) == 3
            [before] = [each for each in graph.get_state_history(THREAD) if len(each.next) == 3]
            assert [task.result for task in before.tasks] == [{"said": ["alice"]}] * 3
        with pytest.raises(ContextNotFoundError):
            graph.get_state(THREAD)

    async def test_what_an_application_gave_is_not_marked(self, owned: OwnedCheckpointer, users: Users) -> None:
        """A configuration may be shared by all requests."""
        graph = talk(owned)
        shared = {"configurable": {"thread_id": "trip-1", "flavour": "sweet"}}
        for user_id in ("alice", "bob", "alice"):
            with users.running(user_id):
                await graph.ainvoke({"said": [user_id]}, shared)
                await graph.aget_state(shared)
        assert shared == {"configurable": {"thread_id": "trip-1", "flavour": "sweet"}}

    async def test_after_the_context_nothing_is_given(self, owned: OwnedCheckpointer, users: Users) -> None:
        graph = talk(owned)
        with users.running("alice") as context:
            await graph.ainvoke({"said": ["secret"]}, THREAD)
            context.close()
            with pytest.raises(ContextClosedError):
                await graph.aget_state(THREAD)

    @pytest.mark.parametrize(("thread_id", "rule"), [(None, "is missing"), ("", "empty"), ("a\0b", "thread")])
    async def test_a_bad_thread_id_is_named(
        self, owned: OwnedCheckpointer, users: Users, thread_id: object, rule: str
    ) -> None:
        with users.running("alice"), pytest.raises(InvalidContextError):
            await owned.aget_tuple({"configurable": {"thread_id": thread_id}})

    async def test_a_thread_id_may_be_what_becomes_text(self, owned: OwnedCheckpointer, users: Users) -> None:
        graph = talk(owned)
        with users.running("alice"):
            await graph.ainvoke({"said": ["one"]}, {"configurable": {"thread_id": 17}})
            assert (await graph.aget_state({"configurable": {"thread_id": "17"}})).values["said"][0] == "one"

    def test_only_a_saver_is_wrapped_and_once(self, owned: OwnedCheckpointer) -> None:
        for wrong in (owned, object(), None):
            with pytest.raises(TypeError, match="a LangGraph checkpoint saver is needed"):
                OwnedCheckpointer(wrong)  # type: ignore[arg-type]

    async def test_updating_a_state_is_owned(self, owned: OwnedCheckpointer, users: Users) -> None:
        graph = talk(owned)
        with users.running("alice"):
            await graph.ainvoke({"said": ["alice's"]}, THREAD)
        with users.running("bob"):
            await graph.aupdate_state(THREAD, {"said": ["bob was here"]}, as_node="small")
            assert (await graph.aget_state(THREAD)).values == {"said": ["bob was here"]}
        with users.running("alice"):
            await graph.aupdate_state(THREAD, {"said": ["more"]}, as_node="small")
            assert (await graph.aget_state(THREAD)).values["said"] == ["alice's", "alice's", "inner", "more"]

    async def test_a_saver_that_gives_anothers_record_is_not_believed(self, users: Users) -> None:
        class Mistaken(InMemorySaver):
            async def aget_tuple(self, config: Any) -> Any:
                return await super().aget_tuple(alices)

        saver = Mistaken()
        with users.running("alice") as context:
            alices: Any = {"configurable": {"thread_id": context.derive_key("langgraph_thread", "trip-1")}}
            graph = talk(OwnedCheckpointer(saver))
            await graph.ainvoke({"said": ["alice's secret"]}, THREAD)
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await graph.aget_state(THREAD)
