"""The registry: against a simple model, under many threads, and with ten thousand contexts in it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ucm_middleware import (
    ContextClosedError,
    ContextLimitError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
)
from ucm_middleware.lifetime import Lifetime, State
from ucm_middleware.registry import SLICE, Displaced, Key, Registry
from ucm_middleware.testing import closing_contexts

PER_USER, TOTAL, ANONYMOUS = 2, 4, 2
USERS = ("alice", "bob", "carol")
KEYS = (*USERS, "desk", "acme_x")
PAIR = "pair"  # stands for the pair (owner, request id) of the context at hand
ADMITTED = "admitted"  # the same, by the short way of new contexts
ALIAS = "alias"  # stands for another pair of that owner


class Clock:
    """Whole seconds: those are exact in floats, and in the queues of deadlines."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


def manager_with(clock: Clock, per_user: int = PER_USER, total: int = TOTAL) -> UserContextManager:
    """Its registry is what is tested. It is the host of the contexts, so that they leave the registry by closing."""
    return UserContextManager(
        max_contexts_per_user=per_user, max_contexts=total, max_anonymous_contexts=ANONYMOUS, clock=clock
    )


def context_of(manager: UserContextManager, user_id: str | None) -> UserExecutionContext:
    """A context of a user, or without a user an anonymous one, not yet in the registry."""
    context = anonymous(manager) if user_id is None else create_isolated_execution_context(user_id)
    assert context._attach(manager)
    return context


def anonymous(
    manager: UserContextManager, kind: type[UserExecutionContext] = UserExecutionContext
) -> UserExecutionContext:
    context = object.__new__(kind)
    context._start(
        manager.ids.generate_anonymous_id(), manager.ids.generate_core(), Lifetime.begin(State.UNBOUND, "a test"), True
    )
    return context


def pair_of(context: UserExecutionContext) -> Key:
    return (context.user_id, context.request_id)


@dataclass(eq=False)
class Known:
    """What the model knows of one context that is in the registry."""

    context: UserExecutionContext
    owner: str
    anonymous: bool
    keys: list[Key] = field(default_factory=list)
    deadline: float | None = None
    latest: float | None = None


class RegistryMachine(RuleBasedStateMachine):
    """Every answer of the registry is foretold by a list of what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.known: list[Known] = []

    @initialize()
    def start(self) -> None:
        self.manager = manager_with(self.clock)
        self.registry = self.manager._registry

    # The model.

    def alive(self, known: Known) -> bool:
        return known.deadline is None or self.clock.now < known.deadline

    def at(self, key: Key) -> Known | None:
        return next((known for known in self.known if key in known.keys), None)

    def pick(self, number: int, **wanted: bool) -> Known | None:
        """Some live context, anonymous or not."""
        fitting = [known for known in self.known if self.alive(known) and known.anonymous == wanted["anonymous"]]
        return fitting[number % len(fitting)] if fitting else None

    def is_foreign(self, owner: str, key: Key) -> bool:
        if isinstance(key, tuple) or key == owner:
            return isinstance(key, tuple) and key[0] != owner
        present = self.at(key)
        if present is not None and self.alive(present) and present.owner != owner:
            return True
        return any(known.owner == key and self.alive(known) for known in self.known)

    def must_go(self, owner: str, key: Key, newcomer: UserExecutionContext) -> dict[Known, str]:
        """Who has to make way, if it is alive."""
        present = self.at(key)
        if present is None or not self.alive(present) or present.context is newcomer:
            return {}
        return {present: "replaced" if present.owner == owner else "evicted"}

    def take_key_from_squatter(self, owner: str) -> None:
        """Who stood under another's id lives on under its pair."""
        squatter = self.at(owner)
        if squatter is not None and squatter.owner != owner:
            squatter.keys.remove(owner)
            squatter.keys = squatter.keys or [pair_of(squatter.context)]

    def limit_reached(self, owner: str, anonymous: bool, going: dict[Known, str]) -> str | None:
        staying = [known for known in self.known if self.alive(known) and known not in going]
        if anonymous:
            return "anonymous" if sum(known.anonymous for known in staying) >= ANONYMOUS else None
        if sum(known.owner == owner for known in staying) >= PER_USER:
            return "user"
        return "total" if sum(not known.anonymous for known in staying) >= TOTAL else None

    def settle(self, displaced: Displaced, going: dict[Known, str]) -> None:
        """Those that must go are told to, with the reason; beside them only expired ones are."""
        reasons: dict[UserExecutionContext, str] = {known.context: reason for known, reason in going.items()}
        for context, reason in displaced.items():
            known = next(known for known in self.known if known.context is context)
            assert reason == reasons.pop(context, "expired")
            assert reason != "expired" or not self.alive(known)
            self.close(known)
        assert reasons == {}

    def close(self, known: Known) -> None:
        known.context.close()
        self.known.remove(known)

    # The rules.

    @rule(
        user=st.sampled_from([*USERS, None]),
        key=st.sampled_from([*KEYS, PAIR, ADMITTED, ALIAS]),
        ttl=st.sampled_from([None, 1.0, 5.0, 60.0]),
    )
    def insert_a_new_one(self, user: str | None, key: str, ttl: float | None) -> None:
        context = context_of(self.manager, user)
        self.insert(Known(context, context.user_id, user is None), key, ttl)

    @rule(
        number=st.integers(0, 9),
        anonymous=st.booleans(),
        key=st.sampled_from([*KEYS, ALIAS]),
        ttl=st.sampled_from([None, 5.0]),
    )
    def insert_one_again(self, number: int, anonymous: bool, key: str, ttl: float | None) -> None:
        if (known := self.pick(number, anonymous=anonymous)) is not None:
            self.insert(known, key, ttl)

    def insert(self, known: Known, text: str, ttl: float | None) -> None:
        context, owner, new = known.context, known.owner, known not in self.known
        key: Key = {PAIR: pair_of(context), ADMITTED: pair_of(context), ALIAS: (owner, "desk")}.get(text, text)
        put = self.admit if text == ADMITTED else self.registry.insert
        if self.is_foreign(owner, key):
            with pytest.raises(CrossUserAccessError):
                self.registry.insert(context, key, ttl)
            return
        going = self.must_go(owner, key, context)
        if new and (scope := self.limit_reached(owner, known.anonymous, going)) is not None:
            with pytest.raises(ContextLimitError) as caught:
                put(context, key, ttl)
            assert caught.value.scope == scope
            return
        displaced = put(context, key, ttl) or {}
        self.settle(displaced, going)
        self.take_key_from_squatter(owner)
        if new:
            self.known.append(known)
        if key not in known.keys:
            known.keys.append(key)
        if ttl is not None:
            self.set_deadline(known, self.clock.now + ttl)

    def admit(self, context: UserExecutionContext, key: Key, ttl: float | None) -> Displaced | None:
        return self.registry.admit(context, ttl)

    def set_deadline(self, known: Known, deadline: float) -> None:
        known.deadline = deadline if known.latest is None else min(deadline, known.latest)

    @rule(user=st.sampled_from(USERS), key=st.sampled_from([*KEYS, PAIR]))
    def insert_under_a_foreign_pair(self, user: str, key: str) -> None:
        other = USERS[USERS.index(user) - 1]
        with pytest.raises(CrossUserAccessError):
            self.registry.insert(context_of(self.manager, user), (other, key), None)

    @rule()
    def insert_a_closed_one(self) -> None:
        context = context_of(self.manager, "alice")
        context.close()
        with pytest.raises(ContextClosedError):
            self.registry.insert(context, pair_of(context), None)

    @rule(number=st.integers(0, 9), user=st.sampled_from(USERS), closes=st.booleans())
    def bind_an_anonymous_one(self, number: int, user: str, closes: bool) -> None:
        known = self.pick(number, anonymous=True)
        if known is None:
            return
        if (scope := self.limit_reached(user, False, {})) is not None:
            with pytest.raises(ContextLimitError) as caught:
                self.registry.rebind(known.context, user, unreachable)
            assert caught.value.scope == scope
            assert known.context.is_anonymous
            return
        if closes:  # the teardown came first: nothing moves
            self.settle(self.registry.rebind(known.context, user, lambda: False), {})
            return
        going: dict[Known, str] = {}
        for key in known.keys:
            if isinstance(key, tuple):
                going.update(self.must_go(user, (user, key[1]), known.context))
        displaced = self.registry.rebind(known.context, user, lambda: known.context._become(user))
        self.settle(displaced, going)
        known.owner, known.anonymous = user, False
        self.take_key_from_squatter(user)
        known.keys = [(user, key[1]) if isinstance(key, tuple) else key for key in known.keys]

    @rule(number=st.integers(0, 9), anonymous=st.booleans())
    def take_one_out(self, number: int, anonymous: bool) -> None:
        if (known := self.pick(number, anonymous=anonymous)) is not None:
            self.close(known)
            assert not self.registry.remove(known.context)

    @rule(number=st.integers(0, 9), anonymous=st.booleans(), seconds=st.sampled_from([1.0, 5.0, 90.0]))
    def let_one_end_sooner(self, number: int, anonymous: bool, seconds: float) -> None:
        if (known := self.pick(number, anonymous=anonymous)) is not None:
            latest = self.clock.now + seconds
            known.latest = latest if known.latest is None else min(latest, known.latest)
            self.set_deadline(known, latest if known.deadline is None else known.deadline)
            assert self.registry.limit(known.context, seconds) == known.deadline

    @rule(seconds=st.sampled_from([1.0, 4.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: not all(self.alive(known) for known in self.known))
    @rule()
    def sweep(self) -> None:
        due: list[UserExecutionContext] = []
        while found := self.registry.take_due():
            due += found
        expired = [known for known in self.known if not self.alive(known)]
        assert len(due) == len(expired)
        assert {known.context for known in expired} == set(due)
        for known in expired:
            self.close(known)

    # What holds after every step.

    @invariant()
    def looking_up_finds_what_is_there(self) -> None:
        pairs = [key for known in self.known for key in known.keys]
        for key in {*KEYS, *pairs}:
            known = self.at(key)
            assert self.registry.lookup(key) is (None if known is None else known.context)
        assert self.registry.lookup("nobody") is None
        assert self.registry.lookup(("alice", "nothing")) is None

    @invariant()
    def counts_are_right(self) -> None:
        assert len(self.registry) == len(self.known)
        for user in USERS:
            contexts = {known.context for known in self.known if known.owner == user}
            assert {context for _, context in self.registry.live_of([user])} == contexts

    @invariant()
    def the_snapshot_shows_each_once_under_a_key_of_its_own(self) -> None:
        shown = self.registry.live()
        assert {context for _, context in shown} == {known.context for known in self.known}
        assert all(self.registry.lookup(key) is context for key, context in shown)
        assert len(shown) == len(self.known)

    @invariant()
    def deadlines_are_known_to_the_context_and_to_the_sweep(self) -> None:
        for known in self.known:
            assert known.context.lifetime.deadline == known.deadline
            assert known.context.lifetime.is_expired == (not self.alive(known))
        earliest = min((known.deadline for known in self.known if known.deadline is not None), default=None)
        wake = self.registry.next_wake()
        if earliest is None:
            assert wake is None
        else:
            assert wake is not None
            assert wake <= max(earliest, self.clock.now) + 0.0011  # the resolution, and what floats lose


def unreachable() -> NoReturn:
    raise AssertionError("a binding that is refused must not happen")


# Some contexts are put into the registry alone, past the manager, and stay open when it refuses them.
TestAgainstTheModel = pytest.mark.ucm_leaks("the registry refuses some")(RegistryMachine.TestCase)


def test_an_empty_registry_keeps_nothing_of_whom_it_knew() -> None:
    clock = Clock()
    manager = manager_with(clock)
    registry = manager._registry
    for number in range(50):
        context = context_of(manager, f"alice-{number}")
        registry.insert(context, f"desk-{number}", 5.0)
        context.close()
        lone = context_of(manager, f"bob-{number}")
        registry.admit(lone, 5.0)
        lone.close()
    assert (registry._named.lone, registry._by_key, registry._by_owner) == ({}, {}, {})
    assert (len(registry), registry.next_wake()) == (0, None)


def test_an_owner_that_changes_at_the_moment_of_removal_is_removed() -> None:
    # While a late binding holds the lock, another thread closes the context.
    asked = threading.Event()

    class Watched(UserExecutionContext):
        @property
        def user_id(self) -> str:
            if threading.current_thread() is remover:
                asked.set()
            return super().user_id

    manager = manager_with(Clock())
    registry = manager._registry
    context = anonymous(manager, Watched)
    assert context._attach(manager)
    remover = threading.Thread(target=registry.remove, args=(context,))

    def become() -> bool:
        remover.start()
        asked.wait(0.1)  # the remover may have to wait for the lock before it asks: then this runs out
        return context._become("alice")

    registry.insert(context, pair_of(context), None)
    registry.rebind(context, "alice", become)
    remover.join()
    assert len(registry) == 0
    context.close()
    assert registry.live_of(["alice"]) == []


@pytest.mark.usefixtures("threads_switch_often")
@pytest.mark.parametrize(("per_user", "total", "users"), [(3, 100, ["alice"]), (100, 3, ["alice", "bob", "carol"])])
def test_no_thread_slips_in_beyond_the_limit(
    per_user: int, total: int, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room = Registry._make_room

    def make_room_slowly(registry: Registry, *wanted: Any) -> None:
        make_room(registry, *wanted)
        time.sleep(0)  # between the check and the taking of the place, let the other threads run

    monkeypatch.setattr(Registry, "_make_room", make_room_slowly)
    manager = manager_with(Clock(), per_user, total)
    counting = threading.Lock()
    live, most, opened, refused = 0, 0, 0, 0
    everyone_is_here = threading.Barrier(8)

    def hammer(number: int) -> None:
        nonlocal live, most, opened, refused
        everyone_is_here.wait()
        for turn in range(300):
            user = users[(number + turn) % len(users)]
            try:
                context = manager.create_isolated_context(user)
            except ContextLimitError:
                with counting:
                    refused += 1
                continue
            with counting:
                live, opened = live + 1, opened + 1
                most = max(live, most)
            with counting:
                live -= 1
            context.close()

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 3
    assert opened + refused == 8 * 300
    assert opened > 0
    assert len(manager._registry) == 0
    for user in users:  # the counts are right after all: there is room for as many as ever
        contexts = [manager.create_isolated_context(user) for _ in range(3)]
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context(user)
        for context in contexts:
            context.close()


class Unwalked(dict[Any, Any]):
    """A table that answers for single keys and lets nobody walk further than a slice."""

    def refuse(self) -> NoReturn:
        raise AssertionError("walked over all live contexts")

    keys = values = items = copy = refuse

    def __iter__(self) -> Iterator[Any]:
        for number, key in enumerate(super().__iter__()):
            if number == SLICE:
                self.refuse()
            yield key


@pytest.mark.ucm_leaks("the registry is used past the manager, and refuses some")
@pytest.mark.parametrize("anonymous", [False, True])
def test_operations_cost_the_same_among_ten_and_among_ten_thousand(anonymous: bool) -> None:
    looks: list[int] = []
    for others in (10, 10_000):
        clock = Clock()
        manager = UserContextManager(
            max_contexts_per_user=1, max_contexts=others + 1, max_anonymous_contexts=others + 1, clock=clock
        )
        registry = manager._registry
        for number in range(others):
            context = context_of(manager, None if anonymous else f"user-{number}")
            if number % 2:
                registry.admit(context, 60.0)
            else:
                registry.insert(context, pair_of(context), 60.0)
        for population in registry._populations:
            population.lone = Unwalked(population.lone)
        registry._by_key, registry._by_owner = Unwalked(registry._by_key), Unwalked(registry._by_owner)
        clock.looks = 0
        use_once(registry, context_of(manager, None if anonymous else "alice"))
        looks.append(clock.looks)
    assert looks[0] == looks[1] > 0


def use_once(registry: Registry, context: UserExecutionContext) -> None:
    """Each operation that a request needs, at the limit too."""
    registry.admit(context, 30.0)
    assert registry.lookup(pair_of(context)) is context
    with pytest.raises(ContextLimitError):
        registry.insert(context_of_same_kind(context), "desk", 30.0)
    registry.limit(context, 20.0)
    assert registry.take_due() == []
    assert registry.next_wake() is not None
    if context.is_anonymous:
        registry.rebind(context, "bob", lambda: context._become("bob"))
    registry.insert(context, "desk", 5.0)
    assert [found for _, found in registry.live_of([context.user_id])] == [context]
    assert registry.remove(context)


def context_of_same_kind(context: UserExecutionContext) -> UserExecutionContext:
    assert isinstance(context.host, UserContextManager)
    return context_of(context.host, None if context.is_anonymous else "bob")


def test_a_sweep_is_not_disturbed_by_a_context_that_ends_meanwhile() -> None:
    manager = manager_with(Clock())
    context = manager.create_isolated_context("alice", ttl_seconds=60)
    manager.create_isolated_context("bob", ttl_seconds=60)
    ended = threading.Event()
    sweeping = threading.current_thread()

    def end() -> None:
        if context.end("finished"):  # the sweeper's own thread walks the queue as well
            ended.set()

    class Walked(dict[Any, Any]):
        def __iter__(self) -> Iterator[Any]:
            walk = super().__iter__()
            if threading.current_thread() is sweeping:  # and not the manager's own thread
                threading.Thread(target=end).start()
            ended.wait(0.1)  # it may have to wait until the sweep is through: then this runs out
            return walk

    named = manager._registry._named
    named.lone = Walked(named.lone)
    assert manager._registry.take_due() == []
    assert ended.wait(10)
    assert [shown["user_id"] for shown in manager.get_active_contexts().values()] == ["bob"]
    manager.cleanup_all_contexts()


class TestStandingAlone:
    """The short form: one context of an owner, under one key, in a table that is the queue of one time to live."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def manager(self, clock: Clock) -> Iterator[UserContextManager]:
        with closing_contexts(manager_with(clock, total=10_000)) as manager:
            yield manager

    @pytest.fixture
    def registry(self, manager: UserContextManager) -> Registry:
        return manager._registry

    def admitted(self, manager: UserContextManager, user_id: str | None, ttl: float | None) -> UserExecutionContext:
        context = context_of(manager, user_id)
        assert not manager._registry.admit(context, ttl)
        return context

    def stands_alone(self, registry: Registry, context: UserExecutionContext) -> bool:
        return any(context in population.lone.values() for population in registry._populations)

    @pytest.mark.parametrize("user_id", ["alice", None])
    def test_an_empty_table_adopts_another_time_to_live(
        self, manager: UserContextManager, registry: Registry, clock: Clock, user_id: str | None
    ) -> None:
        for ttl in (60.0, 5.0, None, 7.0):
            context, second = self.admitted(manager, user_id, ttl), self.admitted(manager, user_id and "bob", ttl)
            assert self.stands_alone(registry, context)
            assert self.stands_alone(registry, second)
            second.close()
            assert registry.next_wake() == (None if ttl is None else clock.now + ttl)
            clock.now += 7.0
            assert registry.take_due() == ([context] if ttl is not None and ttl <= 7 else [])
            context.close()

    def test_named_and_anonymous_ones_have_a_usual_time_each(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        named, visitor = self.admitted(manager, "alice", 60.0), self.admitted(manager, None, 5.0)
        assert self.stands_alone(registry, named)
        assert self.stands_alone(registry, visitor)
        assert registry.lookup(pair_of(visitor)) is visitor
        clock.now = 5.0
        assert registry.take_due() == [visitor]
        assert registry.next_wake() == 60.0

    def test_each_of_two_times_is_met_exactly(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        contexts = [self.admitted(manager, f"user-{number}", (60.0, 5.0, None)[number % 3]) for number in range(9)]
        clock.now = 4.9
        assert registry.take_due() == []
        clock.now = 5.0
        assert set(registry.take_due()) == set(contexts[1::3])
        clock.now = 59.9
        assert registry.take_due() == []
        clock.now = 60.0
        assert set(registry.take_due()) == set(contexts[::3])
        assert len(registry) == 9

    def test_the_time_of_whom_there_come_more_takes_over(self, manager: UserContextManager, registry: Registry) -> None:
        service = self.admitted(manager, "service", None)  # it lives as long as the application
        first, second = self.admitted(manager, "alice", 5.0), self.admitted(manager, "bob", 5.0)
        assert not self.stands_alone(registry, first)
        assert self.stands_alone(registry, second)
        assert registry.live_of(["service"]) == [(pair_of(service), service)]
        assert len(registry) == 3

    def test_a_deadline_that_is_brought_forward_leaves_the_order_right(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        first, second, third = (self.admitted(manager, user, 60.0) for user in USERS)
        assert registry.limit(second, 10.0) == 10.0
        assert registry.next_wake() == 10.0
        clock.now = 10.0
        assert registry.take_due() == [second]
        assert registry.next_wake() == 60.0
        clock.now = 60.0
        assert registry.take_due() == [first, third]

    def test_what_is_due_is_offered_once_stays_in_and_is_offered_again_when_asked(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        context = self.admitted(manager, "alice", 5.0)
        clock.now = 5.0
        assert [registry.take_due(), registry.take_due()] == [[context], []]
        assert registry.lookup(pair_of(context)) is context
        registry.postpone(context)
        assert registry.take_due() == []
        clock.now = 6.0
        assert registry.take_due() == [context]
        context.close()
        registry.postpone(context)
        assert (len(registry), registry.next_wake()) == (0, None)

    def test_what_ends_with_its_credentials_keeps_that_deadline(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        context = context_of(manager, "alice")
        assert registry.limit(context, 5.0) is None
        assert registry.admit(context, 60.0) == {}
        clock.now = 5.0
        assert registry.take_due() == [context]

    def test_what_has_closed_is_not_admitted(self, manager: UserContextManager, registry: Registry) -> None:
        context = context_of(manager, "alice")
        context.close()
        with pytest.raises(ContextClosedError):
            registry.admit(context, 60.0)
        assert len(registry) == 0

    def test_what_was_due_before_it_unfolds_is_due_at_once(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        context = self.admitted(manager, "alice", 5.0)
        clock.now = 5.0
        registry.insert(context, "desk", None)
        assert registry.take_due() == [context]

    def test_a_slice_takes_no_more_than_it_may(
        self, manager: UserContextManager, registry: Registry, clock: Clock
    ) -> None:
        contexts = [self.admitted(manager, f"user-{number}", 5.0) for number in range(2 * SLICE + 1)]
        clock.now = 5.0
        taken = [registry.take_due() for _ in range(4)]
        assert [len(part) for part in taken] == [SLICE, SLICE, 1, 0]
        assert [context for part in taken for context in part] == contexts

    @pytest.mark.ucm_leaks("the registry is used past the manager, and refuses some")
    def test_a_key_that_is_the_own_id_stands_alone_until_there_is_another(
        self, manager: UserContextManager, registry: Registry
    ) -> None:
        first, second = context_of(manager, "alice"), context_of(manager, "alice")
        assert registry.insert(first, "alice", None, 60.0) == {}
        assert self.stands_alone(registry, first)
        assert registry.lookup("alice") is first
        assert registry.lookup(pair_of(first)) is None
        assert registry.live() == [("alice", first)]
        with pytest.raises(CrossUserAccessError):
            registry.insert(context_of(manager, "bob"), "alice", 60.0)
        registry.admit(second, 60.0)
        assert not self.stands_alone(registry, first)
        assert registry.lookup("alice") is first
        assert registry.lookup(pair_of(second)) is second
        first.close()
        assert registry.lookup("alice") is None

    def test_an_anonymous_one_is_found_under_its_own_id_too(
        self, manager: UserContextManager, registry: Registry
    ) -> None:
        visitor = context_of(manager, None)
        registry.insert(visitor, visitor.user_id, 60.0)
        assert registry.lookup(visitor.user_id) is visitor

    def test_who_comes_in_the_middle_of_another_operation_does_not_stand_alone_beside_it(
        self, manager: UserContextManager, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = context_of(manager, "alice"), context_of(manager, "alice")
        make_room, waiting = Registry._make_room, [second]

        def make_room_and_be_interrupted(registry: Registry, *wanted: Any) -> None:
            make_room(registry, *wanted)
            while waiting:
                registry.admit(waiting.pop(), 60.0)

        monkeypatch.setattr(Registry, "_make_room", make_room_and_be_interrupted)
        registry.insert(first, "desk", 60.0)
        registry.limit(second, 5.0)
        assert {context for _, context in registry.live_of(["alice"])} == {first, second}

    def test_the_own_id_is_no_key_of_who_stands_under_the_pair(
        self, manager: UserContextManager, registry: Registry
    ) -> None:
        context = self.admitted(manager, "alice", 60.0)
        assert registry.lookup("alice") is None
        assert registry.lookup(pair_of(context)) is context

    def test_who_comes_takes_the_own_id_from_a_squatter(self, manager: UserContextManager, registry: Registry) -> None:
        squatter = context_of(manager, "bob")
        registry.insert(squatter, "alice", 60.0)
        self.admitted(manager, "alice", 60.0)
        assert registry.lookup("alice") is None
        assert registry.lookup(pair_of(squatter)) is squatter

    @pytest.mark.parametrize("ttl", [None, 30.0])
    def test_one_that_is_in_keeps_its_deadline_unless_it_is_given_another(
        self, manager: UserContextManager, registry: Registry, clock: Clock, ttl: float | None
    ) -> None:
        context = self.admitted(manager, "alice", 60.0)
        clock.now = 1.0
        registry.insert(context, "alice", ttl, 90.0)
        assert context.lifetime.deadline == (60.0 if ttl is None else 31.0)

    @pytest.mark.ucm_leaks("the registry is used past the manager, and refuses some")
    def test_who_is_refused_at_the_limit_leaves_nothing_in_and_gets_no_deadline(self, clock: Clock) -> None:
        manager = manager_with(clock, total=1)
        first = self.admitted(manager, "alice", 60.0)
        late = context_of(manager, "bob")
        with pytest.raises(ContextLimitError):
            manager._registry.admit(late, 60.0)
        assert late.lifetime.deadline is None
        assert [context for _, context in manager._registry.live()] == [first]
        first.close()
        assert manager._registry.admit(late, None) is None
        assert manager._registry.next_wake() is None
