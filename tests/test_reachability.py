"""The walk over what contexts reach: its budget, where it ends, what it cannot see, and what must not harm it."""

import asyncio
import contextvars
import gc
import io
import ipaddress
import logging
import os
import random
import ssl
import struct
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import EmailMessage
from functools import partial
from operator import itemgetter
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import wrapt
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr
from sqlalchemy.engine import _result_cy
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from ucm_middleware import (
    IsolationPolicy,
    UserContextManager,
    create_isolated_execution_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.errors import ConfigurationError, CrossUserAccessError, PluginError
from ucm_middleware.reachability import Check, IsolationReport, Root, Source, find_shared


def looked(alice: Any, bob: Any, **settings: Any) -> IsolationReport:
    """The look at two contexts, with one root each."""
    roots = [Root("alice", "alice.data", alice, opened="a.py:1"), Root("bob", "bob.data", bob, opened="b.py:2")]
    sources = [Source(root.owner, partial(list, [root])) for root in roots]
    return Check(sources, **settings).report()


def shown(alice: Any, bob: Any, **settings: Any) -> list[str]:
    return [str(finding) for finding in looked(alice, bob, **settings).findings]


@pytest.fixture
def manager() -> Iterator[UserContextManager]:
    manager = UserContextManager()
    yield manager
    manager.cleanup_all_contexts()


class Engine:
    """Is shared by design."""

    def __init__(self) -> None:
        self.pool: list[int] = []


class SubEngine(Engine):
    pass


class Row:
    """Holds what is shared, and something that it has from there."""

    __slots__ = ("part", "shared")

    def __init__(self, shared: Engine, part: list[int]) -> None:
        self.shared = shared
        self.part = part


class Plugin:
    @hookimpl
    def ucm_shared_types(self) -> list[type]:
        return [Engine]


class TestWhereItEnds:
    def test_at_what_an_object_has_from_a_shared_one_that_it_holds(self) -> None:
        """As two rows of one statement have what describes their columns, and the dict of its keys."""
        engine = Engine()
        alice, bob = Row(engine, engine.pool), Row(engine, engine.pool)
        assert shown([alice], [bob], shared_types=[Engine]) == []
        assert shown([alice], [bob]) != []
        reached = shown([alice], {"pool": engine.pool, "e": engine}, shared_types=[Engine])
        assert reached == ["alice.data[0].part is bob.data['pool'] (list)"]
        reached = shown({"pool": engine.pool, "e": engine}, [bob], shared_types=[Engine])
        assert reached == ["alice.data['pool'] is bob.data[0].part (list)"]
        other: list[int] = []
        reached = shown([Row(engine, other)], [Row(engine, other)], shared_types=[Engine])
        assert reached == ["alice.data[0].part is bob.data[0].part (list)"]

    def test_at_functions_that_cython_made_but_not_at_what_they_close_over(self) -> None:
        bare = _result_cy._is_compiled
        engine = sa.create_engine("sqlite://")
        with engine.connect() as connection:
            closure = connection.execute(sa.text("select 1"))._row_getter[0]
        engine.dispose()
        assert type(bare).__name__ == type(closure).__name__ == "cython_function_or_method"
        assert shown([bare], [bare]) == []
        (found,) = shown([closure], [closure])
        assert "_row_getter" in found

    def test_at_shared_types_and_their_subclasses(self) -> None:
        for engine in (Engine(), SubEngine()):
            assert shown([engine], {"e": engine}) == [f"alice.data[0] is bob.data['e'] ({type(engine).__name__})"]
            assert shown([engine], {"e": engine}, shared_types=[Engine]) == []
            assert shown([engine, engine.pool], [engine, engine.pool], shared_types=[Engine]) == [
                "alice.data[1] is bob.data[1] (list)"
            ]

    def test_at_what_the_process_has_for_everybody(self) -> None:
        loop = asyncio.new_event_loop()
        with ThreadPoolExecutor(1) as pool:
            everybodys: list[Any] = [
                *(loop, pool, logging.getLogger("a"), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), threading.Lock()),
                *(threading.RLock(), asyncio.Lock(), contextvars.ContextVar("a", default=[]), Starlette()),  # noqa: B039
            ]
            assert [shown([one], [one]) for one in everybodys] == [[]] * len(everybodys)
        loop.close()

    def test_but_not_at_what_tells_one_user_of_another(self) -> None:
        telling: list[Any] = [threading.Event(), asyncio.Event(), asyncio.Queue(), threading.Condition(), io.BytesIO()]
        for one in telling:
            assert shown([one], [one]) == [f"alice.data[0] is bob.data[0] ({type(one).__name__})"]

    def test_at_a_metaclass_that_has_an_equality(self) -> None:
        class Meta(type):
            def __eq__(cls, other: object) -> bool:
                raise ZeroDivisionError

            def __hash__(cls) -> int:
                raise ZeroDivisionError

        class Odd(metaclass=Meta):
            pass

        one = Odd()
        assert shown([one], [one], shared_types=[Odd]) == []
        assert len(shown([one], [one])) == 1


class TestWhatIsWalked:
    async def test_tasks_and_what_they_wait_for(self) -> None:
        shared: list[int] = []

        async def work(queue: asyncio.Queue[int], notes: list[int]) -> None:
            await queue.get()
            notes.append(1)

        own = [asyncio.create_task(work(asyncio.Queue(), [])) for _ in "ab"]
        others = [asyncio.create_task(work(asyncio.Queue(), shared)) for _ in "ab"]
        queue: asyncio.Queue[int] = asyncio.Queue()
        waiting = [asyncio.create_task(work(queue, [])) for _ in "ab"]
        await asyncio.sleep(0)
        try:
            assert shown(own[0], own[1]) == []
            assert shown(others[0], others[1]) == ["alice.data._coro<local> is bob.data._coro<local> (list)"]
            [finding] = shown(waiting[0], waiting[1])  # the other one's task stands in the queue's line
            assert finding.startswith("alice.data._coro<local>._getters[1]")
        finally:
            for task in (*own, *others, *waiting):
                task.cancel()
            await asyncio.gather(*own, *others, *waiting, return_exceptions=True)

    async def test_generators_iterators_and_exceptions(self) -> None:
        def generator(notes: list[int]) -> Iterator[list[int]]:
            yield notes

        async def agenerator(notes: list[int]) -> Any:
            yield notes

        def failed(notes: list[int]) -> Exception:
            try:
                raise ValueError(notes)
            except ValueError as error:
                return error.with_traceback(None)

        for make in (generator, agenerator, failed, iter, reversed, enumerate, lambda it: map(len, it)):
            shared: list[int] = [1]
            assert [kind.rpartition(" ")[2] for kind in shown(make(shared), make(shared))] == ["(list)"]
            assert shown(make([1]), make([1])) == []

    def test_variables_of_a_context(self) -> None:
        variable: contextvars.ContextVar[list[int]] = contextvars.ContextVar("cart")
        contexts = [contextvars.Context(), contextvars.Context()]
        shared: list[int] = []
        for context in contexts:
            context.run(variable.set, shared)
        assert shown(*contexts) == ["alice.data['cart'] is bob.data['cart'] (list)"]
        contexts[1].run(variable.set, [])
        assert shown(*contexts) == []

    def test_another_users_context_is_found_and_not_looked_into(self) -> None:
        alice = create_isolated_execution_context("alice", agent_context={"cart": [1]})
        notes = alice.agent_context["cart"]
        assert shown([notes], {"hers": alice}) == ["alice.context is bob.data['hers'] (UserExecutionContext)"]
        assert shown({"own": alice}, [notes]) == []
        alice.close()


class TestTheBudget:
    def test_ends_the_walk_and_says_so(self) -> None:
        data = [[{"n": [number]} for number in range(100)] for _ in range(500)]
        report = looked(data, [1], max_objects=20_000)
        assert not report
        assert (report.findings, report.skipped, report.is_complete) == ((), 2, False)
        assert report.objects < 30_000
        whole = looked(data, [1])
        assert whole
        assert whole.objects > 150_000

    def test_a_container_larger_than_what_is_left_is_read_as_far_as_it_goes(self) -> None:
        class ListOfOurs(list[int]):
            def __len__(self) -> int:
                return 0

        for huge in ([0] * 1_000_000, dict.fromkeys(range(1_000_000)), ListOfOurs([0] * 1_000_000)):
            report = looked([huge], [1], max_objects=10_000)
            assert report.objects < 20_000
            assert report.skipped == 2

    def test_no_time_is_no_look(self) -> None:
        shared: list[int] = []
        report = looked([shared], [shared], max_seconds=1e-9)
        assert (report.findings, report.skipped) == ((), 2)

    def test_what_is_found_before_it_ends_is_told(self) -> None:
        shared: list[int] = []
        report = looked([shared], [shared, [[{"n": [number]} for number in range(50_000)]]], max_objects=1000)
        [finding] = report.findings
        assert str(finding) == "alice.data[0] is bob.data[0] (list)"
        assert (finding.first_opened, finding.second_opened) == ("a.py:1", "b.py:2")
        assert report.skipped == 1

    @pytest.mark.parametrize("limit", [0, -1, True, "1", float("nan")])
    def test_is_checked(self, manager: UserContextManager, limit: Any) -> None:
        with pytest.raises(ConfigurationError, match="max_seconds must be"):
            manager.isolation_report(max_seconds=limit)
        with pytest.raises(ConfigurationError, match="max_objects must be"):
            manager.isolation_report(max_objects=limit)
        assert manager.isolation_report(max_seconds=None, max_objects=None)

    @pytest.mark.parametrize("setting", [{"sample": 2}, {"sample": True}, {"max_seconds": 0}, {"shared_types": [1]}])
    def test_so_is_the_policy(self, setting: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            IsolationPolicy(**setting)


def test_what_shows_nothing_of_what_it_holds_is_listed() -> None:
    hiding = [random.Random(), random.Random()]
    report = looked({"r": hiding[0]}, {"r": [hiding[1]]})
    assert report
    assert [(one.type_name, one.count, one.path) for one in report.unseen] == [("Random", 2, "alice.data['r']")]


class TestTheManager:
    def test_stops_at_what_a_plugin_or_the_policy_names(self) -> None:
        engine = Engine()
        for plugins, isolated in (((), False), ((Plugin(),), True)):
            manager = UserContextManager(plugins=plugins)
            for user in ("alice", "bob"):
                manager.create_isolated_context(user, db_session=[engine])
            assert manager.validate_isolation() is isolated
            manager.cleanup_all_contexts()
        manager = UserContextManager(isolation=IsolationPolicy(shared_types=(Engine,)))
        for user in ("alice", "bob"):
            manager.create_isolated_context(user, db_session=[engine])
        assert manager.validate_isolation()
        manager.cleanup_all_contexts()

    @pytest.mark.parametrize("answer", [None, [1], Engine()])
    def test_refuses_a_plugin_that_names_no_types(self, answer: Any) -> None:
        class Wrong:
            @hookimpl
            def ucm_shared_types(self) -> Any:
                return answer

        with pytest.raises(PluginError, match="ucm_shared_types returned"):
            UserContextManager(plugins=[Wrong()])

    @pytest.mark.parametrize("resources", [False, True])
    def test_looks_at_a_sample_of_what_closes(self, caplog: pytest.LogCaptureFixture, resources: bool) -> None:
        manager = UserContextManager(isolation=IsolationPolicy(sample=1.0, max_seconds=10.0))
        notes = ["of both"]
        contexts = [manager.create_isolated_context(user) for user in ("alice", "bob")]
        for context in contexts:
            context.agent_context["notes"] = notes
            if resources:
                context.callback(int)
        if resources:
            contexts[0].close()
        else:
            assert contexts[0].end("finished")
        [record] = [one for one in manager.get_system_trail() if one["event"] == "isolation_violated"]
        assert record["findings"] == [{"users": ["alice", "bob"], "type": "list"}]
        [message] = [one.getMessage() for one in caplog.records]
        assert "contexts of two users share a list; opened at " in message
        assert "alice" not in message
        caplog.clear()
        contexts[1].close()
        assert caplog.records == []

    def test_a_sample_tells_each_share_once(self) -> None:
        """Every request of two users comes upon it, and the trail is for other things too."""
        manager = UserContextManager(isolation=IsolationPolicy(sample=1.0, max_seconds=10.0))
        notes = ["of both"]
        manager.create_isolated_context("bob").agent_context["notes"] = notes

        def request(name: str) -> int:
            context = manager.create_isolated_context("alice")
            context.agent_context[name] = notes
            context.close()
            return len([one for one in manager.get_system_trail() if one["event"] == "isolation_violated"])

        assert [request("notes"), request("notes"), request("elsewhere")] == [1, 1, 2]
        manager.cleanup_all_contexts()

    def test_looks_at_none_otherwise(self, manager: UserContextManager) -> None:
        notes: list[int] = []
        for user in ("alice", "bob"):
            manager.create_isolated_context(user).agent_context["notes"] = notes
        manager.cleanup_all_contexts()
        assert not [one for one in manager.get_system_trail() if one["event"] == "isolation_violated"]


class Model(BaseModel):
    tags: list[str] = []
    inner: "Model | None" = None


class TestRealObjects:
    def test_sessions_of_one_engine_share_nothing_else(self) -> None:
        engine = sa.create_engine("sqlite://")
        with Session(engine) as one, Session(engine) as other:
            found = shown(one, other)
        assert found[0] == "alice.data.bind is bob.data.bind (Engine)"

    def test_clients_models_and_requests_are_separate(self) -> None:
        app = Starlette()

        async def receive() -> dict[str, str]:
            return {}

        def request() -> Request:
            scope = {"type": "http", "app": app, "router": app.router, "state": {}, "headers": [], "path": "/"}
            return Request(scope, receive)

        with httpx.Client() as one, httpx.Client() as other:
            assert shown(one, other) == []
        assert shown(Model(inner=Model()), Model(inner=Model())) == []
        inner = Model()
        shared = Model.model_construct(inner=inner), Model.model_construct(inner=inner)
        assert shown(*shared) == ["alice.data.inner is bob.data.inner (Model)"]
        assert shown(request(), request()) == []
        states = request(), request()
        states[1].scope["state"] = states[0].scope["state"]
        assert [one.rpartition(" ")[2] for one in shown(*states)] == ["(dict)"]


def test_other_threads_may_change_everything_meanwhile() -> None:
    data: dict[Any, Any] = {number: [number] for number in range(2000)}
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            data[number % 5000] = [{number: deque([number])}]
            data.pop((number * 7) % 5000, None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            shown(data, [data])
    finally:
        stop.set()
        thread.join()


# Random graphs of all kinds of objects that hold others, against a reference that knows what it has put where.


class Node:
    """Has attributes, slots, and methods."""

    __slots__ = ("__dict__", "__weakref__", "slot")

    def method(self) -> None:
        pass


@dataclass(frozen=True)
class Frozen:
    content: Any


@dataclass
class Thawed:
    content: Any = None


class DictOfOurs(dict[Any, Any]):
    """Has attributes too."""


def _closure(items: list[Any]) -> Any:
    held = items[0] if items else None
    return lambda: held


def _generator(items: list[Any]) -> Iterator[Any]:
    held = items[0] if items else None
    yield held


def _started(items: list[Any]) -> Iterator[Any]:
    generator = _generator(items)
    next(generator)
    return generator


# How each is made of what it holds, how much of that it holds, and whether two users may share it.
MADE: dict[str, tuple[Callable[[list[Any]], Any], int, bool]] = {
    "tuple": (tuple, 9, False),
    "frozen": (lambda items: Frozen(tuple(items)), 9, False),
    "closure": (_closure, 1, False),
    "generator": (_started, 1, True),
    "proxy": (lambda items: types.MappingProxyType(dict(enumerate(items))), 9, True),
    "method": (lambda items: items[0].method if items and type(items[0]) is Node else 0, 1, False),
    "weak": (lambda items: weakref.ref(items[0]) if items and type(items[0]) is Node else 0, 1, False),
}
FILLED: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "deque": deque, "node": Node, "attributes": Node}
FILLED |= {"dataclass": Thawed, "dict of ours": DictOfOurs, "attributes of dict": DictOfOurs}
Plan = list[tuple[str, list[int]]]
PLANS = st.lists(
    st.tuples(st.sampled_from([*MADE, *FILLED]), st.lists(st.integers(0, 14), max_size=4)), min_size=1, max_size=15
)


def build(plan: Plan) -> tuple[list[Any], dict[int, tuple[bool, list[int]]]]:
    """The objects of a plan, and of each, by its number, whether it is mutable and the numbers of those it holds."""
    objects: list[Any] = [FILLED[kind]() if kind in FILLED else None for kind, _ in plan]
    edges: dict[int, tuple[bool, list[int]]] = {}
    for number, (kind, targets) in enumerate(plan):
        if kind in MADE:
            make, most, mutable = MADE[kind]
            # Only what is there already: cycles come from what is filled later.
            held = [target % len(plan) for target in targets if objects[target % len(plan)] is not None][:most]
            objects[number] = made = make([objects[target] for target in held])
            inert = type(made) is int
            edges[number] = (mutable and not inert, [] if inert else held)
    for number, (kind, targets) in enumerate(plan):
        if kind in FILLED:
            held = [target % len(plan) for target in targets]
            items = [objects[target] for target in held]
            match kind:
                case "dict" | "dict of ours":
                    objects[number].update(enumerate(items))
                case "node":
                    objects[number].slot = items
                case "dataclass":
                    objects[number].content = tuple(items)
                case "attributes" | "attributes of dict":
                    objects[number].__dict__.update({f"a{at}": item for at, item in enumerate(items)})
                case _:
                    objects[number].extend(items)
            edges[number] = (True, held)
    return objects, edges


def reached(start: list[int], edges: dict[int, tuple[bool, list[int]]]) -> set[int]:
    """The slow reference: all that can be reached, one by one."""
    found: set[int] = set()
    waiting = list(start)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += edges[number][1]
    return found


def met(start: list[int], edges: dict[int, tuple[bool, list[int]]], first: dict[int, str]) -> set[int]:
    """The same, but not beyond what is mutable and somebody else's."""
    cut = {number: (True, [] if number in first and mutable else held) for number, (mutable, held) in edges.items()}
    return reached(start, cut)


def itself(value: Any) -> int:
    """The id of what users share where they share that: of a view, the dict that it shows."""
    return id(gc.get_referents(value)[0] if type(value) is types.MappingProxyType else value)


class TestRandomGraphs:
    @given(PLANS, st.lists(st.lists(st.integers(0, 14), max_size=3), min_size=2, max_size=4))
    def test_each_share_is_found_with_both_its_owners(self, plan: Plan, starts: list[list[int]]) -> None:
        objects, edges = build(plan)
        first: dict[int, str] = {}
        expected: set[tuple[int, str, str]] = set()
        sources: list[Source] = []
        for owner, some in zip(("alice", "bob", "carol", "dave"), starts, strict=False):
            start = [number % len(plan) for number in some]
            for number in met(start, edges, first):
                if number in first and edges[number][0]:
                    expected.add((itself(objects[number]), first[number], owner))
            for number in met(start, edges, first):
                first.setdefault(number, owner)
            data = [objects[number] for number in start]
            sources.append(Source(owner, partial(list, [Root(owner, f"{owner}.data", data)])))
        check = Check(sources)
        assert len(check.report().findings) == len(expected)
        marks = check._walk.marks
        found = {
            (id(one.value), marks[one.first].owner, marks[one.second].owner)
            for one in check._walk.shares
            if one.first is not None
        }
        assert found == expected

    @given(PLANS, st.lists(st.integers(0, 14), max_size=3), st.lists(st.integers(0, 14), max_size=3))
    def test_isolated_is_what_shares_nothing_mutable(self, plan: Plan, alices: list[int], bobs: list[int]) -> None:
        objects, edges = build(plan)
        alices, bobs = ([number % len(plan) for number in some] for some in (alices, bobs))
        both = reached(alices, edges) & reached(bobs, edges)
        mutable = {id(objects[number]) for number in both if edges[number][0]}
        found = shown([objects[number] for number in alices], [objects[number] for number in bobs])
        assert bool(found) is bool(mutable)

    @given(PLANS, st.data())
    def test_a_planted_share_is_named_by_its_type(self, plan: Plan, data: st.DataObject) -> None:
        alice, bob = build(plan)[0], build(plan)[0]
        assert shown(alice, bob) == []
        holders = [value for value in bob if type(value) in (list, deque)] + [bob]
        planted = Node()
        alice.append(Frozen((planted,)))
        data.draw(st.sampled_from(holders)).append(planted)
        [finding] = shown(alice, bob)
        assert finding.startswith(f"alice.data[{len(alice) - 1}].content[0] is bob.data")
        assert finding.endswith("(Node)")


def test_the_walk_itself_leaves_nothing_behind() -> None:
    data = [Node() for _ in range(100)]
    seen = weakref.ref(data[0])
    report = looked(data, [data[0]])
    del data
    gc.collect()
    assert seen() is None
    assert len(report.findings) == 1
    assert find_shared([]) == []


class TestAttacks:
    def test_the_time_holds_for_a_huge_container(self) -> None:
        """Counted in items, not by the clock: a walk out of time reads no more than a slice of it."""
        huge = dict.fromkeys(range(1_000_000))
        sources = [Source("alice", partial(list, [Root("alice", "alice.data", huge)]))]
        check = Check(sources, max_seconds=3600)
        budget = check._walk.budget
        reads = 0

        def late(self: Any) -> bool:
            nonlocal reads
            reads += 1
            return reads > 4

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(budget), "is_spent", property(late))
            report = check.report()
        assert report.objects < 20_000
        assert not report.is_complete

    def test_very_many_findings_end_the_walk(self) -> None:
        shared = [[number] for number in range(5000)]
        report = looked(shared, list(shared))
        assert (len(report.findings), report.is_complete) == (1000, False)

    def test_what_everybody_reaches_does_not_hide_the_rest(self) -> None:
        everybodys: list[int] = []
        two: list[int] = []
        roots = [Root(f"u{at}", f"u{at}.data", [everybodys]) for at in range(1500)]
        roots += [Root(f"v{at}", f"v{at}.data", [two]) for at in range(2)]
        found = find_shared(roots)
        assert len(found) == 101
        assert str(found[-1]) == "v0.data[0] is v1.data[0] (list)"

    def test_an_exception_leads_neither_to_its_callers_nor_to_the_module(self) -> None:
        def fail() -> Exception:
            try:
                raise ValueError([1])
            except ValueError as error:
                return error

        assert shown(fail(), fail()) == []

    async def test_a_task_that_leaves_the_set_of_all_tasks_does_not_lead_into_it(self) -> None:
        tasks: set[Any] = set()
        for _ in "ab":
            task = asyncio.create_task(asyncio.sleep(0))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(id)
        one, other = tasks
        found = shown(one, other)
        await asyncio.gather(one, other)
        assert found == []

    def test_a_partial_is_everybodys_but_not_what_it_holds(self) -> None:
        items: list[int] = []
        one, other = partial(int, base=16), partial(print, items)
        assert shown(one, [one]) == []
        assert shown(other, [other]) == ["alice.data.args[0] is bob.data[0].args[0] (list)"]

    def test_constants_and_the_processes_own_are_not_named(self) -> None:
        for one in (
            sys.stdout,
            os.environ,
            ipaddress.ip_address("::1"),
            itemgetter(1),
            struct.Struct("i"),
            SecretStr("a"),
        ):
            assert shown([one], {"a": one}) == []
        assert shown(EmailMessage(), EmailMessage()) == []

    def test_a_class_that_claims_to_have_a_dict(self) -> None:
        items: list[int] = []
        assert len(shown(wrapt.ObjectProxy(items), wrapt.ObjectProxy(items))) == 1

    def test_middleware_is_the_applications_and_an_answer_is_not(self) -> None:
        class Middleware:
            def __init__(self, app: Any) -> None:
                self.app = app

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

        middleware, answer = Middleware(None), Response()
        assert shown([middleware], [middleware]) == []
        assert shown([answer], [answer]) == ["alice.data[0] is bob.data[0] (Response)"]

    def test_a_context_is_found_by_all_others_and_not_by_its_own_user(self) -> None:
        contexts = [create_isolated_execution_context(user) for user in ("alice", "bob")]
        assert shown(contexts, [*contexts]) == [
            "bob.context is alice.data[1] (UserExecutionContext)",
            "alice.context is bob.data[0] (UserExecutionContext)",
        ]
        for context in contexts:
            context.close()

    def test_no_users_trail_has_another_users_keys(self) -> None:
        manager = UserContextManager()
        everybody = {"bob@example.com": [1]}
        alice, bob = (manager.create_isolated_context(user) for user in ("alice", "bob"))
        alice.agent_context["all"] = everybody
        bob.agent_context["mine"] = everybody["bob@example.com"]
        report = manager.isolation_report()
        assert "bob@example.com" in report.findings[0].first_path
        trails = [repr(manager.get_audit_trail(user)) for user in ("alice", "bob")]
        assert "alice.agent_context['all']" in trails[0]
        assert "bob.agent_context['mine']" in trails[1]
        assert "bob" not in trails[0]
        assert "alice" not in trails[1]
        manager.cleanup_all_contexts()

    def test_is_refused_within_a_users_context(self) -> None:
        manager = UserContextManager()
        with (
            managed_user_context(manager.create_isolated_context("alice")),
            pytest.raises(CrossUserAccessError),
        ):
            manager.isolation_report()
        manager.cleanup_all_contexts()
