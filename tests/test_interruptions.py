"""Finalizers and signal handlers come in at any call of their own thread: what they do must not be lost, nor undone."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from types import FrameType
from typing import Any

import pytest

from support.clock import Clock
from support.waiting import PATIENCE
from ucm_middleware import Principal, UserContextManager, UserExecutionContext, create_isolated_execution_context
from ucm_middleware.errors import ContextLimitError, UserContextError
from ucm_middleware.registry import Registry

pytestmark = [pytest.mark.no_cover, pytest.mark.matrix]  # see pyproject.toml

TABLE = {"ucm_middleware.registry", "ucm_middleware.expiry"}
MOST = 400
"""More calls than anything here makes."""


class Interruption:
    """Does its work once, at the n-th moment in the table's code at which the interpreter may run something else."""

    def __init__(self, moment: int, work: Callable[[], object]) -> None:
        self._left = moment
        self._work = work
        self.happened = False

    def __enter__(self) -> "Interruption":
        sys.setprofile(self._look)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, arg: object) -> None:
        # A function is entered, or one of C has returned: there the interpreter looks for what waits.
        if event not in ("call", "c_return") or frame.f_globals.get("__name__") not in TABLE:
            return
        self._left -= 1
        if self._left == 0:
            sys.setprofile(None)
            self.happened = True
            self._work()


class House:
    """A manager with contexts of a few users in every form, and what can be done to them.

    The manager may be that of a house that is closed, with a table as new: to make one takes longer than all the rest.
    """

    def __init__(self, closed: "House | None" = None) -> None:
        if closed is None:
            self.clock = Clock()
            self.manager = UserContextManager(
                max_contexts_per_user=3, max_contexts=6, max_anonymous_contexts=2, clock=self.clock
            )
        else:
            self.clock, self.manager = closed.clock, closed.manager
            self.manager._registry.after_fork()
        self.manager._sweeper._planned = -1.0  # whatever it is asked for, it is awake already: no thread
        self.all: list[UserExecutionContext] = []
        self.lone = self.open("alice", "r-1")
        self.first, self.second = self.open("bob", "r-1"), self.open("bob", "r-2")
        self.keyed = create_isolated_execution_context("carol", "r-1")
        self.manager.set_context("carol", self.keyed, ttl_seconds=60)
        assert set(self.manager._registry._named.lone) == {"alice", "carol"}
        self.all.append(self.keyed)
        self.visitor = self.manager._open_for_connection(None, 7.0, None, False)
        self.all.append(self.visitor)

    def open(self, user_id: str, request_id: str | None = None, ttl: float | None = 60) -> UserExecutionContext:
        context = self.manager.create_isolated_context(user_id, request_id, ttl_seconds=ttl)
        self.all.append(context)
        return context

    def put(self, key: Any, user_id: str, request_id: str) -> None:
        context = create_isolated_execution_context(user_id, request_id)
        self.all.append(context)
        self.manager.set_context(key, context, ttl_seconds=30)

    def sweep(self, later: float) -> None:
        self.clock.advance(later)
        self.manager.sweep()

    def check(self) -> None:
        registry = self.manager._registry
        live = [context for _, context in registry.live()]
        assert sorted(map(id, live)) == sorted(id(c) for c in self.all if c.is_open and c.host is not None)
        assert len(registry) == len(live)
        for user in ("alice", "bob", "carol", "dave"):
            mine = [context for context in live if context.user_id == user]
            assert len(mine) <= registry.limits.per_user
            holder = registry._by_key.get(user)
            assert not mine or holder is None or holder.user_id == user, "a squatter stays"
        for kind, population in enumerate(registry._populations):
            assert population.live == sum(c.is_anonymous == bool(kind) for c in live)
        for key, context in registry.live():
            assert registry.lookup(key) is context, (key, context)
        for key, context in registry._by_key.items():
            assert context.is_open
            assert key in context.registry_keys
        assert all(registry._by_owner.values())
        for kind, population in enumerate(registry._populations):
            lone = [c.lifetime.deadline for c in population.lone.values()]
            assert lone == sorted(lone, key=lambda deadline: deadline or 0.0), "the first is not the next"
            assert not lone or (None in lone) is (population.ttl is None)
            queued = [of for queue in population.deadlines.queues.values() for of in queue.values()]
            timed = [c for c in live if c.is_anonymous == bool(kind) and c.lifetime.deadline is not None]
            noticed = {*map(id, queued), *map(id, population.lone.values())}
            assert {id(c) for c in timed} <= noticed, "nobody would notice its deadline"

    def close(self) -> None:
        self.manager.cleanup_all_contexts()
        registry = self.manager._registry
        assert (registry._by_key, registry._by_owner) == ({}, {})
        for population in registry._populations:
            assert (population.live, population.room) == (0, population.limit)
            assert not any(population.deadlines.queues.values()), "the queues keep a closed one"


OPERATIONS: dict[str, Callable[[House], object]] = {
    "open": lambda house: house.open("dave", "r-1"),
    "open for ever": lambda house: house.open("erin", "r-1", None),
    "open another": lambda house: house.open("alice", "r-2"),
    "open in place": lambda house: house.open("bob", "r-1"),
    "put": lambda house: house.put("carol", "carol", "r-2"),
    "open beside": lambda house: house.open("frank", "r-2"),
    "put new": lambda house: house.put("frank", "frank", "r-1"),
    "open third": lambda house: house.open("bob", "r-3"),
    "open fourth": lambda house: house.open("bob", "r-4"),
    "bob takes a text": lambda house: house.put("desk", "bob", "r-5"),
    "carol takes it": lambda house: house.put("desk", "carol", "r-6"),
    "carol's text": lambda house: house.put("draft", "carol", "r-7"),
    "carol's pair": lambda house: house.put(("carol", "draft"), "carol", "r-8"),
    "bob squats": lambda house: house.put("dave", "bob", "r-9"),
    "close lone": lambda house: house.lone.close(),
    "close one of two": lambda house: house.first.close(),
    "close keyed": lambda house: house.keyed.close(),
    "end lone": lambda house: house.lone.end("finished"),
    "bind to new": lambda house: house.visitor.bind("dave"),
    "bind to lone": lambda house: house.visitor.bind("alice"),
    "bind to many": lambda house: house.visitor.bind(Principal("bob")),
    "limit": lambda house: house.manager.end_within(house.lone, 5.0),
    "sweep": lambda house: house.sweep(6.95),  # a wait that was rounded down is over, and the deadline not there yet
    "sweep all": lambda house: house.sweep(100.0),
    "look": lambda house: house.manager._registry.next_wake(),
    "list": lambda house: house.manager.get_active_contexts(),
    "find": lambda house: house.manager.get_context(("alice", "r-1")),
}

AROUND_A_BINDING: dict[str, Callable[[House], object]] = {
    "bind to new": OPERATIONS["bind to new"],
    "close visitor": lambda house: house.visitor.close(),
    "limit visitor": lambda house: house.manager.end_within(house.visitor, 5.0),
    "take its pair": lambda house: house.put(("dave", house.visitor.request_id), "dave", "r-7"),
}
PAIRS = list(dict.fromkeys([*product(OPERATIONS, repeat=2), *product(AROUND_A_BINDING, repeat=2)]))
OPERATIONS |= AROUND_A_BINDING


def attempt(operation: str, house: House) -> None:
    with suppress(UserContextError):
        OPERATIONS[operation](house)


@pytest.mark.parametrize(("operation", "interruption"), PAIRS)
def test_whatever_comes_in_the_table_is_right_after(operation: str, interruption: str) -> None:
    house: House | None = None
    for moment in range(1, MOST):
        house = House(house)
        with Interruption(moment, partial(attempt, interruption, house)) as coming:
            attempt(operation, house)
        house.check()
        house.close()
        if not coming.happened:
            return
    raise AssertionError("it makes more calls than thought")


@pytest.mark.ucm_leaks("a step of opening or closing is interrupted for good")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_signal_handler_that_raises_leaves_the_lock_free(operation: str) -> None:
    def raise_it() -> None:
        raise KeyboardInterrupt

    for moment in range(1, MOST):
        house = House()
        with Interruption(moment, raise_it) as coming, suppress(KeyboardInterrupt):
            attempt(operation, house)
        registry = house.manager._registry
        through = threading.Thread(target=registry.live, daemon=True)
        through.start()
        through.join(PATIENCE)
        assert not through.is_alive()
        assert registry._held == 0
        if not coming.happened:
            return
    raise AssertionError("it makes more calls than thought")


@pytest.mark.ucm_leaks("the registry is asked past the manager, and refuses some")
def test_who_comes_in_the_middle_of_an_admission_finds_no_place_beyond_the_limit() -> None:
    for moment in range(1, MOST):
        manager = UserContextManager(max_contexts=1)
        opened: list[UserExecutionContext] = []

        def open_one(user_id: str, manager: UserContextManager = manager, opened: Any = opened) -> None:
            with suppress(ContextLimitError):
                opened.append(manager.create_isolated_context(user_id))

        with Interruption(moment, partial(open_one, "alice")) as coming:
            open_one("bob")
        assert [context for _, context in manager._registry.live()] == opened
        assert len(opened) == 1
        if not coming.happened:
            return
    raise AssertionError("it makes more calls than thought")


@pytest.mark.ucm_leaks("the one that is refused is nobody's")
def test_who_looks_in_the_middle_of_an_admission_sees_no_more_than_the_limit() -> None:
    seen: list[int] = []
    for moment in range(1, MOST):
        manager = UserContextManager(max_contexts=1)
        manager.create_isolated_context("alice")

        def look(registry: Registry = manager._registry) -> None:
            seen.append(len(registry.live()))

        with Interruption(moment, look) as looking, suppress(ContextLimitError):
            manager.create_isolated_context("bob")
        manager.cleanup_all_contexts()
        if not looking.happened:
            assert set(seen) == {1}
            return
    raise AssertionError("it makes more calls than thought")
