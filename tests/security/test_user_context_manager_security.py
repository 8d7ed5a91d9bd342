"""The specification's security suite: what somebody with a valid account, or a bug, might try on another user."""

import asyncio
import contextvars
import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from inspect import isawaitable
from typing import Any
from unittest import mock

import pytest

from support.clock import Clock
from support.contexts import MakeManager, events, running_as, visitor
from ucm_middleware import (
    ContextClosedError,
    ContextExpiredError,
    ContextIsolationError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    Principal,
    Shared,
    UnauthenticatedError,
    UserContextError,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
    validate_user_context,
)

pytestmark = pytest.mark.security

SECRET = "s3cr3t-of-bob"
HOUR = 3600.0
ATTACHED: list[str] = []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(clock: Clock, make_manager: MakeManager) -> UserContextManager:
    return make_manager(clock=clock)


async def outcome(attempt: Callable[[], object]) -> tuple[type, str]:
    """What somebody who tries this gets to see."""
    try:
        result = attempt()
        if isawaitable(result):
            result = await result
    except UserContextError as error:
        return type(error), str(error)
    return type(result), repr(result)


Attack = Callable[[UserContextManager, str], object]

# What code that runs for alice may try on another user, given that user's id. Some request ids are no secret: gateways
# and applications hand them out, and they stand in logs.
ATTACKS: dict[str, Attack] = {
    "get": lambda manager, user: manager.get_context(user),
    "get by request": lambda manager, user: manager.get_context((user, "r-1")),
    "get by another key": lambda manager, user: manager.get_context(f"cart of {user}"),
    "clear": lambda manager, user: manager.clear_context(user),
    "clear by request": lambda manager, user: manager.clear_context((user, "r-1")),
    "clear by another key": lambda manager, user: manager.clear_context(f"cart of {user}"),
    "cleanup": lambda manager, user: manager.cleanup_context(user),
    "cleanup by request": lambda manager, user: manager.cleanup_context((user, "r-1")),
    "read the trail": lambda manager, user: manager.get_audit_trail(user),
    "create": lambda manager, user: manager.create_isolated_context(user),
    "create with a known request id": lambda manager, user: manager.create_isolated_context(user, "r-1"),
    "create managed": lambda manager, user: manager.create_managed_context(user),
    "create with ids": lambda manager, user: manager.create_context_with_unified_ids(user),
    "set a context of theirs": lambda manager, user: manager.set_context(user, create_isolated_execution_context(user)),
    "set one of theirs under a request of theirs": lambda manager, user: manager.set_context(
        (user, "r-9"), create_isolated_execution_context(user)
    ),
    "set theirs under an own key": lambda manager, user: manager.set_context(
        "alice", create_isolated_execution_context(user)
    ),
    "set the own one under their request": lambda manager, user: manager.set_context((user, "r-1"), current_context()),
    "enter a context of theirs": lambda manager, user: managed_user_context(
        create_isolated_execution_context(user)
    ).__enter__(),
}
WIDE_ATTACKS: dict[str, Callable[[UserContextManager], object]] = {
    "close everything": lambda manager: manager.cleanup_all_contexts(),
    "report on everything": lambda manager: manager.isolation_report(),
    "check everything": lambda manager: manager.validate_isolation(),
}


class TestIsolationBetweenUsers:
    """Code that runs for one user reaches that user's contexts, and is told nothing about others."""

    @pytest.fixture
    def bob(self, manager: UserContextManager) -> UserExecutionContext:
        context = manager.create_isolated_context("bob", "r-1", agent_context={"token": SECRET})
        manager.set_context("bob", context)
        manager.set_context("cart of bob", context)
        return context

    @pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
    async def test_every_way_to_another_user_is_refused_and_changes_nothing(
        self, manager: UserContextManager, bob: UserExecutionContext, attack: Attack
    ) -> None:
        before = manager.get_active_contexts().keys()
        with running_as(manager, "alice"):
            kind, text = await outcome(partial(attack, manager, "bob"))
        assert kind is CrossUserAccessError
        assert "bob" not in text
        assert manager.get_active_contexts().keys() == before
        assert manager.get_context("bob") is manager.get_context("cart of bob") is bob
        assert bob.agent_context == {"token": SECRET}

    @pytest.mark.parametrize("attack", WIDE_ATTACKS.values(), ids=WIDE_ATTACKS)
    async def test_nothing_that_concerns_everybody_is_done_for_one_user(
        self, manager: UserContextManager, bob: UserExecutionContext, attack: Callable[[UserContextManager], object]
    ) -> None:
        with running_as(manager, "alice"):
            assert (await outcome(partial(attack, manager)))[0] is CrossUserAccessError
        assert bob.is_open

    @pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
    async def test_whether_the_other_one_exists_makes_no_difference(
        self, manager: UserContextManager, bob: UserExecutionContext, attack: Attack
    ) -> None:
        with running_as(manager, "alice"):
            there = await outcome(partial(attack, manager, "bob"))
            not_there = await outcome(partial(attack, manager, "dan"))
            noted = [event["outcome"] for event in events(manager, "alice", "denied")]
        assert there == not_there
        assert noted == ["denied", "denied"]
        assert bob.is_open

    @pytest.mark.parametrize("key", ["bob", "cart of bob"])
    def test_the_own_context_under_a_taken_key_and_under_a_free_one_look_the_same(
        self, manager: UserContextManager, bob: UserExecutionContext, key: str
    ) -> None:
        def offer(key: str) -> tuple[type, str]:
            try:
                manager.set_context(key, current_context())
            except UserContextError as error:
                return type(error), str(error)
            return type(None), ""

        with running_as(manager, "alice"):
            assert offer(key) == offer(key.replace("bob", "dan"))
        assert manager.get_context(key) is bob

    def test_a_listing_has_the_own_contexts_only(self, manager: UserContextManager, bob: UserExecutionContext) -> None:
        with running_as(manager, "alice") as alice:
            shown = manager.get_active_contexts()
        assert [entry["request_id"] for entry in shown.values()] == [alice.request_id]
        assert "bob" not in repr(shown)

    def test_what_is_alices_own_stays_within_her_reach(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice") as here:
            other = manager.create_isolated_context("alice", "r-2")
            manager.set_context("alice", other)
            assert manager.get_context("alice") is manager.get_context(("alice", "r-2")) is other
            assert manager.clear_context("alice") is True
            assert manager.clear_context("alice") is False
            assert current_context() is here

    def test_a_denial_stands_in_the_trail_of_the_one_who_tried(
        self, manager: UserContextManager, bob: UserExecutionContext
    ) -> None:
        with running_as(manager, "alice") as alice, pytest.raises(CrossUserAccessError):
            manager.get_context("bob")
        [denial] = events(manager, "alice", "denied")
        assert denial["request_id"] == alice.request_id
        assert denial["action"] == "get_context"
        assert events(manager, "bob", "denied") == []

    async def test_one_anonymous_visitor_is_a_stranger_to_the_other(self, manager: UserContextManager) -> None:
        here, there = visitor(manager), visitor(manager)
        assert here.user_id != there.user_id
        with managed_user_context(here), pytest.raises(CrossUserAccessError):
            manager.get_context((there.user_id, there.request_id))

    def test_a_serving_manager_does_not_trust_code_that_runs_for_nobody(
        self, manager: UserContextManager, bob: UserExecutionContext
    ) -> None:
        manager.serve()
        for attempt in (lambda: manager.get_context("bob"), manager.get_active_contexts, manager.cleanup_all_contexts):
            with pytest.raises(CrossUserAccessError):
                attempt()

    def test_nor_code_that_made_itself_a_context_of_bob(
        self, manager: UserContextManager, bob: UserExecutionContext, make_manager: MakeManager
    ) -> None:
        manager.serve()
        strangers = make_manager()
        for impostor in (create_isolated_execution_context("bob"), strangers.create_isolated_context("bob")):
            with managed_user_context(impostor), pytest.raises(CrossUserAccessError):
                manager.get_context("bob")


class TestKeysHaveOwners:
    """Nobody overwrites or occupies another's key, and no spelling makes two keys collide."""

    def test_the_same_text_when_joined_is_not_the_same_key(self, manager: UserContextManager) -> None:
        first = manager.create_isolated_context("acme", "x_r77")
        second = manager.create_isolated_context("acme_x", "r77")
        assert manager.get_context(("acme", "x_r77")) is first
        assert manager.get_context(("acme_x", "r77")) is second
        assert len(manager.get_active_contexts()) == 2
        manager.clear_context(("acme", "x_r77"))
        assert manager.get_context(("acme_x", "r77")) is second

    @pytest.mark.parametrize("text", ["('acme', 'r77')", "acme r77", "acme:r77", "acme_r77", "acme/r77"])
    def test_no_text_spells_a_pair(self, manager: UserContextManager, text: str) -> None:
        pair = manager.create_isolated_context("acme", "r77")
        other = create_isolated_execution_context("zoe")
        manager.set_context(text, other)
        assert manager.get_context(("acme", "r77")) is pair
        assert manager.get_context(text) is other

    @pytest.mark.parametrize("twin", ["Alice", "ALICE", "\u0430lice", "alice.", "\uff41lice", "alic\u00e9"])
    def test_look_alikes_are_different_users(self, manager: UserContextManager, twin: str) -> None:
        alice = manager.create_isolated_context("alice", "r-1")
        manager.set_context("alice", alice)
        with running_as(manager, twin), pytest.raises(CrossUserAccessError):
            manager.get_context("alice")
        manager.set_context(twin, create_isolated_execution_context(twin))
        assert manager.get_context("alice") is alice

    def test_composed_and_decomposed_letters_are_different_users(self, manager: UserContextManager) -> None:
        composed = manager.create_isolated_context("jos\u00e9", "r-1")
        decomposed = manager.create_isolated_context("jose\u0301", "r-1")
        assert manager.get_context(("jos\u00e9", "r-1")) is composed
        assert manager.get_context(("jose\u0301", "r-1")) is decomposed

    def test_a_key_in_use_is_not_overwritten(self, manager: UserContextManager) -> None:
        bob = create_isolated_execution_context("bob")
        manager.set_context("cart", bob)
        for attempt in ("cart", ("bob", "r-1")):
            with pytest.raises(CrossUserAccessError):
                manager.set_context(attempt, create_isolated_execution_context("alice"))
        assert manager.get_context("cart") is bob

    def test_the_pair_of_another_user_is_not_occupied_before_they_come(self, manager: UserContextManager) -> None:
        with pytest.raises(CrossUserAccessError):
            manager.set_context(("bob", "r-1"), create_isolated_execution_context("alice"))
        assert manager.create_isolated_context("bob", "r-1").user_id == "bob"

    @pytest.mark.parametrize(
        "arrive",
        [lambda manager: manager.create_isolated_context("bob"), lambda manager: visitor(manager).bind("bob")],
        ids=["create", "late binding"],
    )
    def test_a_squatter_loses_the_key_when_its_owner_comes_and_no_more(
        self, manager: UserContextManager, arrive: Callable[[UserContextManager], object]
    ) -> None:
        squatter = create_isolated_execution_context("alice", "r-1")
        manager.set_context("bob", squatter)
        arrive(manager)
        with pytest.raises(ContextNotFoundError):
            manager.get_context("bob")
        assert squatter.is_open
        assert {shown["user_id"] for shown in manager.get_active_contexts().values()} == {"alice", "bob"}

    def test_a_squatter_is_closed_when_the_owner_takes_the_key(self, manager: UserContextManager) -> None:
        squatter, bob = create_isolated_execution_context("alice"), create_isolated_execution_context("bob")
        manager.set_context("bob", squatter)
        manager.set_context("bob", bob)
        assert manager.get_context("bob") is bob
        assert squatter.is_open is False
        assert events(manager, "alice", "closed")[0]["reason"] == "evicted"

    def test_nobody_squats_while_the_owner_is_there(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob")
        with pytest.raises(CrossUserAccessError):
            manager.set_context("bob", create_isolated_execution_context("alice"))

    def test_a_key_is_free_again_once_its_context_closed_or_expired(
        self, manager: UserContextManager, clock: Clock
    ) -> None:
        for user in ("alice", "bob"):
            manager.set_context("desk 4", create_isolated_execution_context(user), ttl_seconds=HOUR)
            clock.advance(HOUR)
        last = create_isolated_execution_context("carol")
        manager.set_context("desk 4", last)
        assert manager.get_context("desk 4") is last
        last.close()
        manager.set_context("desk 4", create_isolated_execution_context("dan"))


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """Run ``work`` in so many threads that all begin at the same moment; errors of ours come back as results."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait(10)
        try:
            return work(number)
        except UserContextError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class TestConcurrentAccess:
    """Threads and tasks at once: nothing is lost, doubled or mixed up."""

    def test_each_thread_finds_its_own_user(self, manager: UserContextManager) -> None:
        def work(number: int) -> object:
            user = f"user-{number}"
            for turn in range(20):
                with running_as(manager, user) as context:
                    context.agent_context["turn"] = (user, turn)
                    manager.set_context(user, context)
                    found = manager.get_context(user)
                    assert found is current_context()
                    assert found.agent_context == {"turn": (user, turn)}
                    assert {entry["user_id"] for entry in manager.get_active_contexts().values()} == {user}
            return user

        assert in_threads(16, work) == [f"user-{number}" for number in range(16)]
        assert manager.get_active_contexts() == {}

    async def test_each_task_finds_its_own_user(self, manager: UserContextManager) -> None:
        async def work(user: str) -> list[str]:
            seen = []
            async with managed_user_context(manager.create_isolated_context(user)) as context:
                context.agent_context["user"] = user
                for _ in range(10):
                    await asyncio.sleep(0)
                    assert current_context() is context
                    seen.append(current_context().agent_context["user"])
                seen.append(await asyncio.to_thread(lambda: current_context().user_id))
            return seen

        users = [f"user-{number}" for number in range(50)]
        assert await asyncio.gather(*map(work, users)) == [[user] * 11 for user in users]
        assert manager.get_active_contexts() == {}

    def test_the_limit_is_exact_when_threads_race_for_it(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=5)
        results = in_threads(24, lambda _: manager.create_isolated_context("alice"))
        assert sum(isinstance(result, UserExecutionContext) for result in results) == 5
        assert sum(isinstance(result, ContextLimitError) for result in results) == 19
        assert len(manager.get_active_contexts()) == 5

    def test_of_many_that_race_for_one_key_one_is_live_and_the_others_are_closed(
        self, manager: UserContextManager
    ) -> None:
        made = [create_isolated_execution_context("alice") for _ in range(16)]
        in_threads(16, lambda number: manager.set_context("alice", made[number]))
        assert [context for context in made if context.is_open] == [manager.get_context("alice")]
        assert len(manager.get_active_contexts()) == 1

    def test_of_two_users_that_race_to_bind_one_wins(self, manager: UserContextManager) -> None:
        for _ in range(50):
            context = visitor(manager)
            results = in_threads(2, lambda number, context=context: context.bind(("alice", "bob")[number]))  # type: ignore[misc]
            [refused] = [result for result in results if result is not None]
            assert isinstance(refused, IdentityConflictError)
            winner = ("alice", "bob")[results.index(None)]
            assert context.user_id == winner
            assert [entry["user_id"] for entry in manager.get_active_contexts().values()] == [winner]
            context.close()
            assert manager.get_active_contexts() == {}

    def test_of_many_that_close_one_releases(self, manager: UserContextManager) -> None:
        released: list[int] = []
        context = manager.create_isolated_context("alice")
        context.callback(released.append, 1)
        in_threads(16, lambda _: context.close())
        assert released == [1]

    def test_many_that_sweep_at_once_close_each_context_once(self, manager: UserContextManager) -> None:
        contexts = [manager.create_isolated_context(f"user-{n}", ttl_seconds=HOUR) for n in range(64)]
        manager._registry.clock = lambda: 1e9  # the clock of every thread
        assert sum(n for n in in_threads(8, lambda _: manager.sweep()) if isinstance(n, int)) == 64
        assert not any(context.is_open for context in contexts)

    async def test_an_executor_thread_runs_for_nobody(self, manager: UserContextManager) -> None:
        manager.serve()

        def look() -> None:
            with pytest.raises(ContextNotFoundError):
                current_context()
            with pytest.raises(CrossUserAccessError):
                manager.get_context(("alice", "r-1"))

        with manager.privileged(reason="a job of hers", users=["alice"]):
            async with managed_user_context(manager.create_isolated_context("alice", "r-1")):
                await asyncio.get_running_loop().run_in_executor(None, look)


class TestNoCrossUserContamination:
    """What one user's code sets, another's never sees."""

    def test_contexts_nest_and_come_back(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice") as alice:
            with manager.privileged(reason="support", users=["bob"]), running_as(manager, "bob") as bob:
                assert current_context() is bob
                bob.agent_context["mine"] = SECRET
            assert current_context() is alice
            assert alice.agent_context == {}
        with pytest.raises(ContextNotFoundError):
            current_context()

    async def test_a_task_stays_with_the_user_that_it_was_started_for(self, manager: UserContextManager) -> None:
        go_on = asyncio.Event()

        async def work() -> str:
            await go_on.wait()
            return current_context().user_id

        async with managed_user_context(manager.create_isolated_context("alice")):
            task = asyncio.create_task(work())
            with manager.privileged(reason="support", users=["bob"]), running_as(manager, "bob"):
                go_on.set()
                assert await task == "alice"

    def test_the_same_data_given_to_two_users_is_two(self, manager: UserContextManager) -> None:
        template = {"notes": [], "nested": {"tags": {"new"}}}
        alice = manager.create_isolated_context("alice", agent_context=template, audit_metadata=template)
        bob = manager.create_isolated_context("bob", agent_context=template, audit_metadata=template)
        alice.agent_context["notes"].append(SECRET)
        alice.agent_context["nested"]["tags"].add(SECRET)
        alice.audit_metadata["notes"].append(SECRET)
        assert bob.agent_context == bob.audit_metadata == template == {"notes": [], "nested": {"tags": {"new"}}}
        assert manager.validate_isolation() is True

    def test_no_data_at_all_is_two_as_well(self, manager: UserContextManager) -> None:
        alice, bob = manager.create_isolated_context("alice"), manager.create_isolated_context("bob")
        alice.agent_context["token"] = alice.audit_metadata["token"] = SECRET
        assert bob.agent_context == bob.audit_metadata == {}

    def test_a_setting_of_one_context_reaches_no_other(self, manager: UserContextManager) -> None:
        alice, bob = manager.create_isolated_context("alice"), manager.create_isolated_context("bob")
        alice.environment.set("API_KEY", SECRET)
        assert bob.environment.get("API_KEY") is None
        assert manager.environment.get("API_KEY") is None

    def test_what_two_users_share_is_named_by_both_paths(self, manager: UserContextManager) -> None:
        cache: dict[str, str] = {}
        manager.create_isolated_context("alice").agent_context["cache"] = {"answers": cache}
        manager.create_isolated_context("bob").agent_context["memo"] = [cache]
        assert manager.validate_isolation() is False
        [finding] = manager.isolation_report().findings
        assert "alice.agent_context['cache']['answers']" in str(finding)
        assert "bob.agent_context['memo'][0]" in str(finding)

    def test_what_is_attached_to_two_users_contexts_is_found(self, manager: UserContextManager) -> None:
        for user in ("alice", "bob"):
            setattr(manager.create_isolated_context(user), "attached", ATTACHED)  # noqa: B010 - it is not declared
        [finding] = manager.isolation_report().findings
        assert "alice.attached" in str(finding)
        assert "bob.attached" in str(finding)

    def test_what_a_child_shares_with_another_user_is_found(self, manager: UserContextManager) -> None:
        child = manager.create_isolated_context("alice").create_child_context("search")
        bob = manager.create_isolated_context("bob")
        child.agent_context["notes"] = bob.agent_context["notes"] = []
        assert manager.validate_isolation() is False

    @pytest.mark.parametrize("session", [mock.Mock(spec=["close"]), object()], ids=["with close", "without"])
    def test_one_session_for_two_users_is_found(self, manager: UserContextManager, session: object) -> None:
        manager.create_isolated_context("alice", db_session=session)
        manager.create_isolated_context("bob", db_session=session)
        assert "db_session" in str(manager.isolation_report().findings[0])

    def test_one_session_for_two_contexts_of_one_user_is_no_leak(self, manager: UserContextManager) -> None:
        session = mock.Mock(spec=["close"])
        manager.create_isolated_context("alice", db_session=session)
        manager.create_isolated_context("alice", db_session=session)
        assert manager.validate_isolation() is True

    def test_what_is_marked_is_shared_on_purpose(self, manager: UserContextManager) -> None:
        pool = {"connections": [SECRET]}
        marked = Shared(pool)
        alice = manager.create_isolated_context("alice", agent_context={"pool": marked})
        bob = manager.create_isolated_context("bob", agent_context={"pool": marked})
        assert alice.agent_context["pool"].value is bob.agent_context["pool"].value is pool
        assert manager.validate_isolation() is True


class Held:
    """Something whose end can be seen."""

    def __deepcopy__(self, memo: object) -> "Held":
        return self


def keep_by_set(manager: UserContextManager) -> UserExecutionContext:
    context = create_isolated_execution_context("alice")
    manager.set_context("alice", context)
    manager.set_context("desk 4", context)
    return context


def keep_by_child(manager: UserContextManager) -> UserExecutionContext:
    parent = manager.create_isolated_context("alice")
    child = parent.create_child_context("search")
    parent.callback(child.close)
    return parent


def keep_by_binding(manager: UserContextManager) -> UserExecutionContext:
    context = visitor(manager)
    context.bind("alice")
    return context


def keep_with_everything(manager: UserContextManager) -> UserExecutionContext:
    context = manager.create_isolated_context("alice", ttl_seconds=HOUR, audit_metadata={"ticket": 7})
    context.environment.set("A", "b")
    context.callback(lambda: context.agent_context.clear())
    with managed_user_context(context):
        manager.get_audit_trail("alice")
    return context


WAYS_TO_KEEP: list[Callable[[UserContextManager], UserExecutionContext]] = [
    keep_by_set,
    keep_by_child,
    keep_by_binding,
    keep_with_everything,
]


class TestMemoryReferences:
    """Nothing is held in common, and nothing is held that has closed."""

    def test_what_was_passed_in_may_change_after(self) -> None:
        given = {"nested": {"list": [1]}}
        context = create_isolated_execution_context("alice", agent_context=given, audit_metadata=given)
        given["nested"]["list"].append(2)
        given["more"] = {}
        assert context.agent_context == context.audit_metadata == {"nested": {"list": [1]}}
        context.agent_context["nested"]["list"].append(3)
        assert given["nested"] == {"list": [1, 2]}

    @pytest.mark.parametrize("keep", WAYS_TO_KEEP)
    def test_a_closed_context_is_freed_at_once(
        self, manager: UserContextManager, keep: Callable[[UserContextManager], UserExecutionContext]
    ) -> None:
        context = keep(manager)
        reference = weakref.ref(context)
        context.close()
        gc.disable()  # reference counting must do it: a cycle would wait for the collector, with all that it holds
        try:
            del context
            assert reference() is None
        finally:
            gc.enable()

    def test_so_is_one_that_expired_or_was_replaced(self, manager: UserContextManager, clock: Clock) -> None:
        contexts = [create_isolated_execution_context("alice") for _ in range(3)]
        references = list(map(weakref.ref, contexts))
        while contexts:
            manager.set_context("alice", contexts.pop(), ttl_seconds=HOUR)
        clock.advance(HOUR)
        assert manager.sweep() == 1
        assert [reference() for reference in references] == [None, None, None]

    def test_what_it_held_is_freed_though_somebody_keeps_the_context(self, manager: UserContextManager) -> None:
        held = [Held() for _ in range(4)]
        references = list(map(weakref.ref, held))
        context = manager.create_isolated_context("alice", agent_context={"a": held[0]}, db_session=held[1])
        context.agent_context["later"] = [held[2]]
        setattr(context, "attached", held[3])  # noqa: B010 - mypy knows that it is not declared
        held.clear()
        assert all(reference() is not None for reference in references)
        context.close()
        assert [reference() for reference in references] == [None] * 4

    def test_an_error_about_it_does_not_hold_it(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        context.close()
        with pytest.raises(ContextClosedError) as caught:
            validate_user_context(context)
        error = caught.value.with_traceback(None)
        reference = weakref.ref(context)
        del caught, context
        assert reference() is None
        assert str(error)

    def test_the_trail_keeps_and_hands_out_copies_of_the_metadata(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice", audit_metadata={"tags": ["new"]})
        context.audit_metadata["tags"].append("changed")
        for _ in range(2):
            trail = manager.get_audit_trail("alice")
            assert trail is not None
            assert trail["tags"] == trail["events"][0]["audit_metadata"]["tags"] == ["new"]
            trail["tags"].append("forged")
            trail["events"][0]["audit_metadata"]["tags"].append("forged")

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
    @pytest.mark.parametrize("managed", [True, False])
    def test_there_is_no_second_one(
        self, manager: UserContextManager, duplicate: Callable[[object], object], managed: bool
    ) -> None:
        make = manager.create_isolated_context if managed else create_isolated_execution_context
        with pytest.raises(TypeError, match="create_child_context"):
            duplicate(make("alice", agent_context={"token": SECRET}))

    def test_nor_one_inside_the_data_of_another(self) -> None:
        bob = create_isolated_execution_context("bob")
        with pytest.raises(InvalidContextError) as caught:
            create_isolated_execution_context("alice", agent_context={"friends": [bob]})
        assert caught.value.field == "agent_context['friends'][0]"

    @pytest.mark.parametrize("value", [threading.Lock(), (n for n in range(3))], ids=["lock", "generator"])
    def test_what_cannot_be_copied_is_refused_by_its_path(self, value: object) -> None:
        with pytest.raises(InvalidContextError, match="Shared") as caught:
            create_isolated_execution_context("alice", agent_context={"tools": [value]})
        assert caught.value.field == "agent_context['tools'][0]"


# Every use of a context that has closed, by code that kept it.
USES: dict[str, Callable[[UserExecutionContext], object]] = {
    "agent_context": lambda context: context.agent_context,
    "audit_metadata": lambda context: context.audit_metadata,
    "db_session": lambda context: context.db_session,
    "environment": lambda context: context.environment,
    "child": lambda context: context.create_child_context("search"),
    "verify": lambda context: context.verify_isolation(),
    "bind": lambda context: context.bind("alice"),
    "enter": lambda context: managed_user_context(context),
    "callback": lambda context: context.callback(print),
    "validate": lambda context: validate_user_context(context),
}


class TestCleanup:
    """After its end a context is empty, its resources are released, and its name is free."""

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_every_use_after_the_end_is_refused_with_the_place_where_it_began(
        self, manager: UserContextManager, use: Callable[[UserExecutionContext], object]
    ) -> None:
        context = manager.create_isolated_context("alice", agent_context={"token": SECRET})
        data = context.agent_context
        assert manager.clear_context(("alice", context.request_id)) is True
        with pytest.raises(ContextClosedError) as caught:
            use(context)
        assert caught.value.request_id == context.request_id
        assert __file__ in caught.value.opened_by
        assert caught.value.reason == "cleared"
        assert data == {}

    def test_a_straggling_thread_is_stopped(self, manager: UserContextManager) -> None:
        begun, closed = threading.Event(), threading.Event()

        def straggle() -> str:
            begun.set()
            closed.wait(10)
            with pytest.raises(ContextClosedError, match="is closed") as caught:
                current_context()
            with pytest.raises(ContextClosedError):
                manager.get_context("alice")
            return caught.value.reason

        with ThreadPoolExecutor(1) as pool:
            with running_as(manager, "alice"):
                result = pool.submit(contextvars.copy_context().run, straggle)
                begun.wait(10)
            closed.set()
            assert result.result(10) == "finished"

    async def test_a_straggling_task_is_stopped(self, manager: UserContextManager) -> None:
        closed = asyncio.Event()

        async def straggle() -> str:
            mine = current_context().agent_context
            await closed.wait()
            with pytest.raises(ContextClosedError):
                current_context()
            return repr(mine)

        async with managed_user_context(manager.create_isolated_context("alice")) as context:
            context.agent_context["token"] = SECRET
            task = asyncio.create_task(straggle())
            await asyncio.sleep(0)
        closed.set()
        assert await task == "{}"

    def test_resources_go_in_reverse_and_all_of_them(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        released: list[str] = []
        context = manager.create_isolated_context("alice")
        context.callback(released.append, "first")
        context.callback(partial(int, "no number"))
        context.callback(released.append, "third")
        assert manager.clear_context(("alice", context.request_id)) is True
        assert released == ["third", "first"]
        [closing] = events(manager, "alice", "closed")
        assert closing["outcome"] == "failed"
        assert len(closing["unreleased"]) == 1
        assert "resource not released" in caplog.text

    async def test_asynchronous_ones_are_waited_for(self, manager: UserContextManager) -> None:
        released: list[str] = []

        async def release() -> None:
            await asyncio.sleep(0)
            released.append("it")

        context = manager.create_isolated_context("alice", "r-1")
        context.callback(release)
        assert await manager.cleanup_context(("alice", "r-1")) is True
        assert released == ["it"]
        assert await manager.cleanup_context(("alice", "r-1")) is False

    @pytest.mark.usefixtures("caplog")
    def test_one_users_failure_is_not_the_others(self, manager: UserContextManager) -> None:
        released: list[str] = []
        manager.create_isolated_context("alice").callback(partial(int, "no number"))
        manager.create_isolated_context("bob").callback(released.append, "bob")
        assert manager.cleanup_all_contexts() == 2
        assert released == ["bob"]
        assert events(manager, "bob", "closed")[0]["outcome"] == "ok"
        assert manager.get_active_contexts() == {}
        assert manager.cleanup_all_contexts() == 0


class TestLimits:
    """Limits are exact: they count what is live, of whom it is."""

    def test_the_eleventh_is_refused_and_nobody_else_is(self, manager: UserContextManager) -> None:
        made = [manager.create_isolated_context("alice") for _ in range(UserContextManager.MAX_CONTEXTS_PER_USER)]
        assert len(made) == 10
        with pytest.raises(ContextLimitError) as caught:
            manager.create_isolated_context("alice")
        assert (caught.value.scope, caught.value.limit) == ("user", 10)
        manager.create_isolated_context("bob")
        made[3].close()
        manager.create_isolated_context("alice")

    def test_the_own_key_is_replaced_at_the_limit(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        first, second = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context("alice", first)
        manager.set_context("alice", second)
        assert manager.get_context("alice") is second
        assert first.is_open is False
        with pytest.raises(ContextLimitError):
            manager.set_context("another key", create_isolated_execution_context("alice"))
        assert manager.get_context("alice") is second

    def test_visitors_have_a_limit_of_their_own(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts=1, max_anonymous_contexts=2)
        visitor(manager)
        stranger = visitor(manager)
        with pytest.raises(ContextLimitError) as caught:
            visitor(manager)
        assert caught.value.scope == "anonymous"
        manager.create_isolated_context("alice")
        with pytest.raises(ContextLimitError) as caught:
            manager.create_isolated_context("bob")
        assert caught.value.scope == "total"
        with pytest.raises(ContextLimitError):
            stranger.bind("bob")
        assert stranger.is_anonymous

    @pytest.mark.parametrize("crowd", ["named", "anonymous"])
    def test_what_has_expired_does_not_count(self, clock: Clock, crowd: str, make_manager: MakeManager) -> None:
        manager = make_manager(
            max_contexts_per_user=1, max_contexts=1, max_anonymous_contexts=600, clock=clock, ttl=HOUR
        )
        for _ in range(600 if crowd == "anonymous" else 0):
            visitor(manager, ttl=HOUR)
        manager.create_isolated_context("alice")
        clock.advance(HOUR)
        manager.create_isolated_context("alice")
        clock.advance(HOUR)
        manager.create_isolated_context("bob")
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context("carol")

    def test_a_refusal_is_on_record(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        manager.create_isolated_context("alice")
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context("alice")
        assert "limit" in events(manager, "alice", "refused")[0]["reason"]


class TestExpiry:
    """Gone at the deadline: on the monotonic clock, to the moment, whether or not a sweep came by."""

    def test_to_the_moment(self, manager: UserContextManager, clock: Clock) -> None:
        context = manager.create_isolated_context("alice", "r-1", ttl_seconds=60)
        clock.advance(59.999)
        assert manager.get_context(("alice", "r-1")) is context
        clock.advance(0.001)
        assert manager.get_active_contexts() == {}
        with pytest.raises(ContextExpiredError):
            manager.get_context(("alice", "r-1"))
        with pytest.raises(KeyError):
            manager.get_context(("alice", "r-1"))

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_no_use_is_left_even_before_the_sweep(
        self, manager: UserContextManager, clock: Clock, use: Callable[[UserExecutionContext], object]
    ) -> None:
        context = manager.create_isolated_context("alice", ttl_seconds=60)
        clock.advance(60)
        with pytest.raises(ContextClosedError) as caught:
            use(context)
        assert caught.value.reason == "expired"

    @pytest.mark.parametrize(
        "act",
        [
            lambda manager: current_context(),
            lambda manager: manager.create_isolated_context("alice", ttl_seconds=600),
            lambda manager: manager.get_audit_trail("alice"),
            lambda manager: manager.get_active_contexts(),
        ],
        ids=["current_context", "create", "read the trail", "list"],
    )
    def test_code_in_it_is_nobody_even_before_the_sweep(
        self, manager: UserContextManager, clock: Clock, act: Callable[[UserContextManager], object]
    ) -> None:
        with managed_user_context(manager.create_isolated_context("alice", ttl_seconds=60)):
            clock.advance(60)
            with pytest.raises(ContextClosedError) as caught:
                act(manager)
        assert caught.value.reason == "expired"

    async def test_a_sweep_closes_what_is_due_and_nothing_else(self, manager: UserContextManager, clock: Clock) -> None:
        released: list[str] = []
        for user, ttl in (("alice", 60), ("bob", 61), ("carol", None)):
            context = manager.create_isolated_context(user, ttl_seconds=ttl)
            await context.enter_async_context(nullcontext())  # so that it has a loop, this one
            context.callback(released.append, user)
        clock.advance(60)
        assert manager.sweep() == 1
        assert manager.sweep() == 0
        assert released == ["alice"]
        clock.advance(10_000)
        assert manager.sweep() == 1
        assert released == ["alice", "bob"]
        assert [entry["user_id"] for entry in manager.get_active_contexts().values()] == ["carol"]
        await context.aclose()

    def test_resources_see_that_the_work_was_cut_off(self, manager: UserContextManager, clock: Clock) -> None:
        released = threading.Event()
        seen: list[object] = []

        @contextmanager
        def transaction() -> Iterator[None]:
            try:
                yield
            except ContextClosedError as error:
                seen.append(error.reason)
                raise
            finally:
                released.set()

        context = manager.create_isolated_context("alice", ttl_seconds=60)
        context.enter_context(transaction())
        clock.advance(60)
        assert manager.sweep() == 1
        assert released.wait(10)
        assert seen == ["expired"]

    def test_it_ends_with_the_credentials(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        context.bind(Principal("alice", expires_at=datetime.now(UTC) + timedelta(seconds=90)))
        [shown] = manager.get_active_contexts().values()
        assert 0 < shown["expires_in_seconds"] <= 90
        with pytest.raises(UnauthenticatedError):
            visitor(manager).bind(Principal("bob", expires_at=datetime.now(UTC) - timedelta(seconds=1)))


class TestValidation:
    """Only live contexts that vouch for themselves get in, and nobody changes who they are for."""

    @pytest.mark.parametrize("thing", [None, "alice", {"user_id": "alice"}, 7, UserExecutionContext], ids=repr)
    def test_what_is_no_context_is_refused(self, manager: UserContextManager, thing: Any) -> None:
        with pytest.raises(InvalidContextError, match="context"):
            manager.set_context("alice", thing)
        with pytest.raises(InvalidContextError, match="context"):
            validate_user_context(thing)

    def test_what_does_not_vouch_for_itself_is_refused(self, manager: UserContextManager) -> None:
        context = create_isolated_execution_context("alice")
        found = ContextIsolationError("shared", ["a", "b"])
        with mock.patch.object(context, "verify_isolation", side_effect=[False, None, 1, found]):
            for _ in range(3):
                with pytest.raises(ContextIsolationError):
                    manager.set_context("alice", context)
            with pytest.raises(ContextIsolationError) as caught:
                manager.set_context("alice", context)
        assert caught.value.findings == ("a", "b")
        assert manager.get_active_contexts() == {}
        manager.set_context("alice", context)

    def test_what_closes_meanwhile_does_not_get_in(self, manager: UserContextManager) -> None:
        class Closing(UserExecutionContext):
            def verify_isolation(self) -> bool:
                self.close()  # as an expiry in another thread may, at this very moment
                return True

        with pytest.raises(ContextClosedError):
            manager.set_context("alice", Closing(user_id="alice", thread_id="t-1", run_id="r-1"))
        assert manager.get_active_contexts() == {}
        with pytest.raises(ContextNotFoundError):
            manager.get_context("alice")

    @pytest.mark.parametrize(
        "name",
        [
            "user_id",
            "thread_id",
            "run_id",
            "request_id",
            "websocket_client_id",
            "created_at",
            "operation_depth",
            "parent_request_id",
            "is_anonymous",
            "agent_context",
            "audit_metadata",
            "db_session",
            "environment",
            "is_open",
        ],
    )
    def test_a_declared_field_is_not_assigned_nor_deleted(self, name: str) -> None:
        context = create_isolated_execution_context("alice")
        before = getattr(context, name)
        with pytest.raises(AttributeError):
            setattr(context, name, "bob")
        with pytest.raises(AttributeError):
            delattr(context, name)
        assert getattr(context, name) == before

    def test_a_method_can_be_patched_for_a_test(self) -> None:
        context = create_isolated_execution_context("alice")
        with mock.patch.object(context, "to_dict", return_value={"patched": True}):
            assert context.to_dict() == {"patched": True}
        assert context.to_dict()["user_id"] == "alice"

    def test_a_context_has_one_user_for_ever(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        context.bind("alice")
        context.bind("alice")
        with pytest.raises(IdentityConflictError):
            context.bind("bob")
        with pytest.raises(IdentityConflictError):
            manager.create_isolated_context("alice").bind("bob")
        assert context.user_id == "alice"

    @pytest.mark.parametrize(
        "use",
        [
            lambda context: context.callback(print),
            lambda context: context.create_child_context("search"),
            lambda context: context.closing(mock.Mock(spec=["close"])),
            lambda context: context.enter_context(contextmanager(lambda: iter([1]))()),
        ],
        ids=["callback", "child", "closing", "resource"],
    )
    def test_nobody_is_bound_to_what_was_opened_for_a_stranger(
        self, manager: UserContextManager, use: Callable[[UserExecutionContext], object]
    ) -> None:
        context = visitor(manager)
        use(context)
        with pytest.raises(IdentityConflictError, match="anonymous"):
            context.bind("alice")
        assert context.is_anonymous
        context.close()

    def test_code_of_another_user_does_not_bind_a_visitor(self, manager: UserContextManager) -> None:
        stranger = visitor(manager)
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            stranger.bind("alice")
        assert stranger.is_anonymous


class TestSecrets:
    """Secrets are in the data, and nowhere that is printed, listed or logged."""

    def test_no_view_shows_them(self, manager: UserContextManager) -> None:
        class Session:
            def __repr__(self) -> str:
                return SECRET

            def close(self) -> None: ...

        data = {"token": SECRET, "nested": [SECRET]}
        context = manager.create_isolated_context("bob", agent_context=data, db_session=Session())
        context.environment.set("API_KEY", SECRET)
        views = [repr(context), str(context), repr(context.to_dict()), repr(context.get_audit_trail())]
        views += [repr(manager.get_active_contexts()), repr(context.environment), repr(Shared(SECRET))]
        views += [repr(manager), repr(manager.isolation_report()), repr(manager.get_audit_trail("bob"))]
        assert SECRET not in "".join(views)

    def test_no_error_shows_them(self, manager: UserContextManager) -> None:
        class Stubborn:
            def __deepcopy__(self, memo: object) -> None:
                raise ValueError(SECRET)

            def __repr__(self) -> str:
                return SECRET

        attempts: list[Callable[[], object]] = [
            lambda: manager.create_isolated_context("bob", agent_context={"a": [SECRET, Stubborn()]}),
            lambda: manager.create_isolated_context(f"{SECRET}\n"),
            lambda: manager.create_isolated_context("bob", thread_id=f" {SECRET}"),
            lambda: manager.get_context(f"{SECRET}\x00"),
            lambda: manager.create_isolated_context("bob", agent_context={"user_id": SECRET}),
        ]
        for attempt in attempts:
            with pytest.raises(InvalidContextError) as caught:
                attempt()
            assert SECRET not in str(caught.value)
            assert caught.value.__cause__ is None

    def test_nothing_that_is_logged_shows_them(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        context = manager.create_isolated_context("bob", agent_context={"token": SECRET})
        context.callback(partial(int, "no number"))
        context.close()
        assert caplog.records
        assert SECRET not in caplog.text


class TestAudit:
    """The trail says what happened, to whom and why, and nobody can write another's."""

    def test_what_an_auditor_asks_for_is_there(self, manager: UserContextManager) -> None:
        manager.set_context("alice", create_isolated_execution_context("alice", audit_metadata={"ticket": 7}))
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        assert trail["user_id"] == "alice"
        assert trail["context_source"] == "set_context"
        assert trail["isolation_verified"] is True
        assert trail["compliance_version"] == "1.0"
        assert trail["ticket"] == 7
        assert datetime.now(UTC) - datetime.fromisoformat(trail["context_set_at"]) < timedelta(minutes=1)
        assert [event["event"] for event in trail["events"]] == ["opened"]

    def test_metadata_does_not_overrule_the_record(self, manager: UserContextManager) -> None:
        forged = {"context_source": "bank", "isolation_verified": 1, "compliance_version": "9", "events": [], "x": 1}
        manager.create_isolated_context("alice", audit_metadata=forged)
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        assert (trail["context_source"], trail["isolation_verified"], trail["x"]) == ("create_context", True, 1)
        assert trail["compliance_version"] == "1.0"
        assert trail["events"]

    def test_it_outlives_the_context_and_the_other_users_noise(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob", "r-1").close()
        for _ in range(1000):
            manager.create_isolated_context("alice").close()
        assert [event["event"] for event in events(manager, "bob", "opened", "closed")] == ["opened", "closed"]
        assert manager.get_audit_trail("carol") is None

    def test_a_copy_is_handed_out(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("alice")
        for _ in range(2):
            trail = manager.get_audit_trail("alice")
            assert trail is not None
            assert len(trail["events"]) == 1
            trail["events"].clear()

    def test_a_breach_of_isolation_is_on_record(self, manager: UserContextManager) -> None:
        shared: list[int] = []
        for user in ("alice", "bob"):
            manager.create_isolated_context(user).agent_context["list"] = shared
        assert manager.validate_isolation() is False
        [record] = manager.get_system_trail()
        assert record["event"] == "isolation_violated"
        assert record["findings"] == [{"users": ["alice", "bob"], "type": "list"}]
        for user in ("alice", "bob"):
            trail = manager.get_audit_trail(user)
            assert trail is not None
            assert trail["events"][-1]["path"] == f"{user}.agent_context['list']"
            assert ("alice" in str(trail)) == (user == "alice")  # neither is told of the other


BAD_IDS: dict[str, Any] = {
    "empty": "",
    "blank": "   ",
    "not text": 7,
    "nothing": None,
    "bytes": b"alice",
    "too long": "a" * 257,
    "control character": "ali\x07ce",
    "line break": "alice\r\nSet-Cookie: admin=1",
    "tab": "ali\tce",
    "NUL": "alice\x00",
    "bidirectional": "alice\u202egpj",
    "invisible": "ali\u200bce",
    "soft hyphen": "ali\u00adce",
    "leading blank": " alice",
    "trailing blank": "alice ",
    "placeholder": "placeholder",
    "none": "None",
    "null": "NULL",
    "undefined": "undefined",
    "test": "test",
    "default": "Default",
    "temporary": "temp_1",
    "mock": "MOCK_user",
    "for a test": "test_alice",
    "reserved": "anonymous_" + "0" * 32,
}
GOOD_IDS = [
    "alice",
    "alice@example.com",
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "auth0|5f7c",
    "O'Brien",
    "Dvořák",
    "李雷",
    "Ольга",
    "مريم",
    "Test-Hausen",
    "testuser",
    "a" * 256,
    "0",
    "admin",
    "template_of_a_very_long_generated_name",
]
ENTRANCES: dict[str, Callable[[UserContextManager, Any], object]] = {
    "user_id": lambda manager, value: manager.create_isolated_context(value),
    "request_id": lambda manager, value: manager.create_isolated_context("alice", value),
    "thread_id": lambda manager, value: manager.create_isolated_context("alice", thread_id=value),
    "run_id": lambda manager, value: manager.create_isolated_context("alice", run_id=value),
    "websocket_client_id": lambda manager, value: manager.create_isolated_context("alice", websocket_client_id=value),
    "key to get": lambda manager, value: manager.get_context(value),
    "key to clear": lambda manager, value: manager.clear_context(value),
    "key to set": lambda manager, value: manager.set_context(value, create_isolated_execution_context("alice")),
    "pair": lambda manager, value: manager.get_context((value, "r-1")),
    "pair's request": lambda manager, value: manager.get_context(("alice", value)),
    "trail": lambda manager, value: manager.get_audit_trail(value),
    "privileged": lambda manager, value: manager.privileged(reason="support", users=[value]).__enter__(),
    "principal": lambda manager, value: Principal(value),
    "late binding": lambda manager, value: visitor(manager).bind(value),
    "from_request": lambda manager, value: UserExecutionContext.from_request(
        user_id=value, thread_id="t-1", run_id="r-1"
    ),
}
# None stands for "make one", or the product's own anonymous ids are keys: not input that anybody must refuse.
FINE_THERE = {
    *((name, "nothing") for name in ("request_id", "thread_id", "run_id", "websocket_client_id")),
    *((name, "reserved") for name in ("key to get", "key to clear", "key to set", "pair", "trail")),
}


class TestInputRejection:
    """Bad input is refused at every entrance, by an error that names the field and the rule; ordinary ids pass."""

    @pytest.mark.parametrize(
        ("entrance", "bad"), [(a, b) for a in ENTRANCES for b in BAD_IDS if (a, b) not in FINE_THERE]
    )
    def test_a_bad_id_is_refused_at_every_entrance(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch, entrance: str, bad: str
    ) -> None:
        monkeypatch.delenv("UCM_ENVIRONMENT")
        with pytest.raises(InvalidContextError) as caught:
            ENTRANCES[entrance](manager, BAD_IDS[bad])
        error = caught.value
        assert error.field
        assert error.field in str(error)
        assert error.rule in str(error)
        assert error.remedy in str(error)
        assert "\n" not in str(error)
        assert all(shown["is_anonymous"] for shown in manager.get_active_contexts().values())

    @pytest.mark.parametrize("good", GOOD_IDS)
    def test_an_ordinary_id_passes_unchanged(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch, good: str
    ) -> None:
        monkeypatch.delenv("UCM_ENVIRONMENT")
        context = manager.create_isolated_context(good, good, thread_id=good, run_id=good, websocket_client_id=good)
        ids = (context.user_id, context.request_id, context.thread_id, context.run_id, context.websocket_client_id)
        assert ids == (good,) * 5
        assert manager.get_context((good, good)) is context
        manager.set_context(good, context)
        assert manager.get_context(good) is context

    @pytest.mark.parametrize("key", [("alice",), ("alice", "r-1", "more"), (), ["alice", "r-1"]], ids=repr)
    def test_a_key_is_text_or_a_pair(self, manager: UserContextManager, key: Any) -> None:
        with pytest.raises(InvalidContextError, match="key"):
            manager.get_context(key)

    @pytest.mark.parametrize("field", ["agent_context", "audit_metadata"])
    @pytest.mark.parametrize("key", ["user_id", "thread_id", "run_id", "request_id", "created_at", "db_session"])
    def test_a_key_that_could_be_taken_for_the_identity_is_refused(self, field: str, key: str) -> None:
        with pytest.raises(InvalidContextError, match=f"{field}.*{key}.*reserved"):
            UserExecutionContext(user_id="alice", thread_id="t-1", run_id="r-1", **{field: {key: "bob"}})  # type: ignore[arg-type]

    @pytest.mark.parametrize("data", [[("a", 1)], "text", 7, {7: "x"}], ids=repr)
    def test_data_is_a_mapping_with_text_for_keys(self, data: Any) -> None:
        with pytest.raises(InvalidContextError, match="agent_context"):
            create_isolated_execution_context("alice", agent_context=data)

    def test_data_without_end_is_refused(self) -> None:
        bottomless: dict[str, Any] = {}
        deepest = bottomless
        for _ in range(100_000):
            deepest["a"] = deepest = {}
        with pytest.raises(InvalidContextError, match="nested"):
            create_isolated_execution_context("alice", agent_context=bottomless)
        while bottomless:  # taken apart by hand: freeing it in one go is another recursion
            bottomless = bottomless.pop("a")
