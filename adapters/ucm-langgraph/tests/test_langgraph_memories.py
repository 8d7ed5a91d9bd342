"""Memories on every store, and cached results: each user's own, and without the adapter everybody's."""

from collections.abc import Sequence
from typing import Any, TypedDict

import pytest
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import END, START
from langgraph.runtime import Runtime
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore
from langgraph.types import CachePolicy

from langgraph_stores import AnyStore, new_graph
from ucm_langgraph import OwnedCache, OwnedStore
from ucm_middleware import (
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    current_context,
)
from ucm_middleware.testing import Users

HOME = ("notes", "home")
WORK = ("notes", "work")
OLD, NEW = "the first secret of this test: 0123456789", "the second secret of this test: 0123456789"


@pytest.fixture
def users() -> Users:
    return Users(UserContextManager(max_contexts_per_user=1000))


def managed(secret: str, *previous: str) -> Users:
    return Users(UserContextManager(secret=secret, previous_secrets=previous))


async def fill(store: AnyStore, owned: BaseStore, user_id: str) -> None:
    for namespace in (HOME, WORK, ("trips",)):
        for key in ("a", "b"):
            text = f"{user_id} {namespace[-1]} {key}"
            await store.call(owned, "put", namespace, key, {"text": text, "key": key})


async def test_without_the_adapter_a_memory_is_whose_names_it(store: AnyStore, users: Users) -> None:
    with users.running("alice"):
        await store.call(store.bare, "put", HOME, "a", {"text": "alice's secret"})
    with users.running("bob"):
        assert (await store.call(store.bare, "get", HOME, "a")).value == {"text": "alice's secret"}
        assert await store.call(store.bare, "search", ())
        assert await store.call(store.bare, "list_namespaces") == [HOME]


async def test_memories_are_the_users_own(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await fill(store, owned, user_id)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            item = await store.call(owned, "get", HOME, "a")
            assert (item.namespace, item.key, item.value["text"]) == (HOME, "a", f"{user_id} home a")
            assert await store.call(owned, "get", HOME, "missing") is None
            for prefix, count in (((), 6), (("notes",), 4), (WORK, 2), (("nothing",), 0)):
                found = await store.call(owned, "search", prefix)
                assert len(found) == count
                assert all(each.value["text"].startswith(user_id) for each in found)
                assert all(each.namespace[: len(prefix)] == prefix for each in found)
            assert len(await store.call(owned, "search", (), filter={"key": "b"})) == 3
            assert len(await store.call(owned, "search", (), limit=4)) == 4
            assert len(await store.call(owned, "search", (), limit=4, offset=4)) == 2


async def test_namespaces_are_listed_as_the_code_knows_them(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await fill(store, owned, user_id)
            await store.call(owned, "put", (f"{user_id}'s own",), "x", {"x": 1})
    with users.running("alice"):

        async def namespaces(**options: Any) -> set[tuple[str, ...]]:
            return set(await store.call(owned, "list_namespaces", **options))

        assert await namespaces() == {HOME, WORK, ("trips",), ("alice's own",)}
        assert await namespaces(prefix=("notes",)) == {HOME, WORK}
        assert await namespaces(suffix=("work",)) == {WORK}
        assert await namespaces(prefix=("*", "work")) == {WORK}
        assert await namespaces(max_depth=1) == {("notes",), ("trips",), ("alice's own",)}
        assert len(await namespaces(limit=2)) == 2
        both = [MatchCondition("prefix", ("notes",)), MatchCondition("suffix", ("home",))]
        assert await store.call(owned, "batch", [ListNamespacesOp(tuple(both))]) == [[HOME]]


async def test_deleting_is_owned(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await fill(store, owned, user_id)
    with users.running("bob"):
        await store.call(owned, "delete", HOME, "a")
        assert await store.call(owned, "get", HOME, "a") is None
    with users.running("alice"):
        assert await store.call(owned, "get", HOME, "a") is not None


async def test_anothers_key_in_a_namespace_is_only_a_name(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    with users.running("alice"):
        await fill(store, owned, "alice")
    stored: Sequence[Item] = await store.call(store.bare, "search", (), limit=1)
    label = stored[0].namespace[0]
    with users.running("bob"):
        for prefix in ((label,), (label, "notes"), ("%",), ("_" * len(label),), ("*",)):
            assert await store.call(owned, "search", prefix) == []
            assert await store.call(owned, "list_namespaces", prefix=prefix) == []
        for prefix in ((label,), ("%",), ("*",)):
            assert await store.call(owned, "get", (*prefix, "notes", "home"), "a") is None
        with pytest.raises(InvalidNamespaceError):
            await store.call(owned, "batch", [GetOp((f"..{label}", "notes", "home"), "a")])


async def test_a_batch_is_the_users_own(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    for user_id in ("alice", "bob"):
        with users.running(user_id):
            await fill(store, owned, user_id)
    with users.running("alice"):
        operations = [GetOp(HOME, "a"), SearchOp(WORK), ListNamespacesOp(), GetOp(WORK, "missing")]
        got, found, listed, missing = await store.call(owned, "batch", operations)
        assert got.value["text"] == "alice home a"
        assert {each.value["text"] for each in found} == {"alice work a", "alice work b"}
        assert set(listed) == {HOME, WORK, ("trips",)}
        assert missing is None
        assert await store.call(owned, "batch", [PutOp(HOME, "c", {"text": "c"}), PutOp(HOME, "a", None)]) == [
            None,
            None,
        ]
        assert {each.key for each in await store.call(owned, "search", HOME)} == {"b", "c"}


@pytest.mark.parametrize("first", ["get", "put", "search", "list_namespaces", "delete"])
async def test_a_rotated_secret_keeps_the_memories(store: AnyStore, first: str) -> None:
    owned = OwnedStore(store.bare)
    for user_id in ("alice", "bob"):
        with managed(OLD).running(user_id):
            await fill(store, owned, user_id)
    with managed(NEW, OLD).running("alice"):
        match first:
            case "get":
                assert (await store.call(owned, "get", HOME, "a")).value["text"] == "alice home a"
            case "put":
                await store.call(owned, "put", HOME, "a", {"text": "alice home a", "key": "a"})
            case "search":
                assert len(await store.call(owned, "search", ("notes",))) == 4
            case "delete":
                await store.call(owned, "delete", WORK, "b")
            case _:
                assert len(await store.call(owned, "list_namespaces")) == 3
        found = await store.call(owned, "search", ())
        assert len(found) == (5 if first == "delete" else 6)
        assert all(each.value["text"].startswith("alice") for each in found)
    with managed(NEW).running("alice"):  # the previous secret is needed no more
        assert len(await store.call(owned, "search", ())) == len(found)
    with managed(OLD).running("alice"):  # and nothing is left there
        assert await store.call(owned, "search", ()) == []
    with managed(OLD).running("bob"):
        assert len(await store.call(owned, "search", ())) == 6


async def test_outside_of_a_context_nothing_is_given(store: AnyStore, users: Users) -> None:
    owned = OwnedStore(store.bare)
    with users.running("alice"):
        await fill(store, owned, "alice")
    for method, args in (
        ("get", (HOME, "a")),
        ("search", ((),)),
        ("list_namespaces", ()),
        ("delete", (HOME, "a")),
        ("put", (HOME, "z", {"z": 1})),
    ):
        with pytest.raises(ContextNotFoundError):
            await store.call(owned, method, *args)
    assert len(await store.call(store.bare, "search", ())) == 6


class TestOnMemory:
    """What does not depend on the store."""

    async def test_after_the_context_nothing_is_given(self, users: Users) -> None:
        owned = OwnedStore(InMemoryStore())
        with users.running("alice") as context:
            await owned.aput(HOME, "a", {"x": 1})
            context.close()
            with pytest.raises(ContextClosedError):
                await owned.aget(HOME, "a")

    async def test_a_store_that_gives_anothers_memory_is_not_believed(self, users: Users) -> None:
        class Mistaken(InMemoryStore):
            async def abatch(self, ops: Any) -> Any:
                return [self.batch([SearchOp(())])[0] if isinstance(op, SearchOp) else None for op in ops]

        bare = Mistaken()
        owned = OwnedStore(bare)
        with users.running("alice"):
            owned.put(HOME, "a", {"text": "secret"})
            assert len(await owned.asearch(())) == 1
        with users.running("bob"), pytest.raises(CrossUserAccessError):
            await owned.asearch(())

    def test_only_a_store_is_wrapped_and_once(self) -> None:
        for wrong in (OwnedStore(InMemoryStore()), object(), None):
            with pytest.raises(TypeError, match="a LangGraph store is needed"):
                OwnedStore(wrong)  # type: ignore[arg-type]

    async def test_what_is_no_operation_is_refused(self, users: Users) -> None:
        with users.running("alice"), pytest.raises(TypeError, match="not an operation"):
            await OwnedStore(InMemoryStore()).abatch(["everything"])  # type: ignore[list-item]

    def test_it_tells_of_the_wrapped_stores_abilities(self) -> None:
        bare = InMemoryStore()
        owned = OwnedStore(bare)
        assert owned.supports_ttl is bare.supports_ttl
        assert owned.ttl_config is bare.ttl_config

    @pytest.mark.parametrize("blocks", [True, False])
    async def test_nodes_get_the_store_of_their_user(self, users: Users, blocks: bool) -> None:
        class Nothing(TypedDict):
            found: list[str]

        def remember(state: Nothing, runtime: Runtime[None]) -> Any:
            assert runtime.store is not None
            runtime.store.put(HOME, current_context().user_id, {"x": 1})
            return {"found": [each.key for each in runtime.store.search(())]}

        graph = new_graph(Nothing).add_node("remember", remember).add_edge(START, "remember").add_edge("remember", END)
        compiled = graph.compile(store=OwnedStore(InMemoryStore()))
        for user_id in ("alice", "bob"):
            with users.running(user_id):
                done = compiled.invoke({"found": []}) if blocks else await compiled.ainvoke({"found": []})
                assert done == {"found": [user_id]}


class TestCache:
    """Results of nodes."""

    class Asked(TypedDict):
        question: str
        answer: str

    def graph(self, cache: Any) -> Any:
        def answer(state: TestCache.Asked) -> Any:
            return {"answer": f"{state['question']}: {current_context().user_id}"}

        graph = new_graph(self.Asked).add_node("answer", answer, cache_policy=CachePolicy())
        return graph.add_edge(START, "answer").add_edge("answer", END).compile(cache=cache)

    async def test_without_the_adapter_a_result_is_everybodys(self, users: Users) -> None:
        graph = self.graph(InMemoryCache())
        for user_id in ("alice", "bob"):
            with users.running(user_id):
                done = await graph.ainvoke({"question": "who am I?"})
        assert done["answer"] == "who am I?: alice"

    async def test_a_result_is_the_users_own(self, users: Users) -> None:
        bare: InMemoryCache[Any] = InMemoryCache()
        graph = self.graph(OwnedCache(bare))
        for user_id in ("alice", "bob", "alice"):
            with users.running(user_id):
                done = await graph.ainvoke({"question": "who am I?"})
                assert done["answer"] == f"who am I?: {user_id}"
        assert len(bare._cache) == 2  # the third was found
        with users.running("alice"):
            await graph.aclear_cache()
        assert sum(map(len, bare._cache.values())) == 1

    def test_graphs_that_block_keep_results_too(self, users: Users) -> None:
        bare: InMemoryCache[Any] = InMemoryCache()
        graph = self.graph(OwnedCache(bare))
        for user_id in ("alice", "bob", "alice"):
            with users.running(user_id):
                assert graph.invoke({"question": "who?"})["answer"] == f"who?: {user_id}"
        with users.running("alice"):
            graph.clear_cache()
        assert sum(map(len, bare._cache.values())) <= 1

    def test_only_the_users_own_are_forgotten(self, users: Users) -> None:
        owned = OwnedCache(InMemoryCache())
        with users.running("alice"), pytest.raises(ValueError, match="which namespaces"):
            owned.clear()

    async def test_outside_of_a_context_nothing_is_given_or_kept(self) -> None:
        bare: InMemoryCache[Any] = InMemoryCache()
        owned = OwnedCache(bare)
        await owned.aset({(("a",), "k"): (1, None)})
        owned.set({(("a",), "k"): (1, None)})
        assert not bare._cache
        for attempt in (lambda: owned.get([(("a",), "k")]), lambda: owned.clear([("a",)])):
            with pytest.raises(ContextNotFoundError):
                attempt()
        with pytest.raises(ContextNotFoundError):
            await owned.aget([(("a",), "k")])
        with pytest.raises(ContextNotFoundError):
            await owned.aclear([("a",)])

    def test_only_a_cache_is_wrapped_and_once(self) -> None:
        for wrong in (OwnedCache(InMemoryCache()), object(), None):
            with pytest.raises(TypeError, match="a LangGraph cache is needed"):
                OwnedCache(wrong)  # type: ignore[arg-type]
