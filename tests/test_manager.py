"""UserContextManager: what each of its methods does and answers."""

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest

from support.clock import Clock
from support.contexts import MakeManager, events, running_as, visitor
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextExpiredError,
    ContextIsolationError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    IsolatedEnvironment,
    ManagerDrainingError,
    Principal,
    UnauthenticatedError,
    UnifiedIDManager,
    UserContextError,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
)
from ucm_middleware.ambient import ambient_grant
from ucm_middleware.registry import Registry
from ucm_middleware.testing import closing_contexts

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(clock: Clock) -> Iterator[UserContextManager]:
    with closing_contexts(UserContextManager(clock=clock)) as manager:
        yield manager


class TestKeys:
    def test_what_was_set_is_got_itself(self, manager: UserContextManager) -> None:
        context = create_isolated_execution_context("alice")
        manager.set_context("alice", context)
        assert manager.get_context("alice") is context
        assert manager.get_context(user_id="alice") is context

    def test_nothing_there_is_a_key_error_that_reads_well(self, manager: UserContextManager) -> None:
        with pytest.raises(KeyError) as caught:
            manager.get_context("alice")
        assert isinstance(caught.value, ContextNotFoundError)
        assert str(caught.value).startswith("there is no live context under this key")
        assert manager.get_active_contexts() == {}

    def test_another_one_under_the_key_closes_the_first(self, manager: UserContextManager) -> None:
        first, second = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context("alice", first)
        manager.set_context("alice", second)
        assert first.is_open is False
        assert events(manager, "alice", "closed")[0]["reason"] == "replaced"
        manager.set_context("alice", second)
        assert second.is_open

    def test_a_session_that_the_new_one_holds_stays_open(self, manager: UserContextManager) -> None:
        kept, gone = mock.Mock(spec=["close"]), mock.Mock(spec=["close"])
        first = create_isolated_execution_context("alice", db_session=kept)
        first.closing(gone)
        manager.set_context("alice", first)
        manager.set_context("alice", create_isolated_execution_context("alice", db_session=kept))
        kept.close.assert_not_called()
        gone.close.assert_called_once_with()
        manager.clear_context("alice")
        kept.close.assert_called_once_with()

    def test_one_context_may_stand_under_many_keys(self) -> None:
        manager = UserContextManager(max_contexts_per_user=1)
        context = create_isolated_execution_context("alice")
        for key in ("alice", "desk 4", ("alice", "r-1")):
            manager.set_context(key, context)
        assert len(manager.get_active_contexts()) == 1
        assert manager.clear_context("desk 4") is True
        assert context.is_open is False
        for key in ("alice", "desk 4", ("alice", "r-1")):
            assert manager.clear_context(key) is False

    def test_a_text_is_one_key_for_trusted_code_and_for_the_user(self, manager: UserContextManager) -> None:
        given = manager.create_isolated_context("alice")
        manager.set_context("desk 4", given)
        with running_as(manager, "alice") as own:
            assert manager.get_context("desk 4") is given
            manager.set_context("desk 5", own)
            assert manager.get_context(("alice", "desk 5")) is own

    def test_a_context_of_another_manager_is_left_to_it(
        self, manager: UserContextManager, make_manager: MakeManager
    ) -> None:
        context = make_manager().create_isolated_context("alice")
        with pytest.raises(ConfigurationError, match="another manager"):
            manager.set_context("alice", context)
        assert context.is_open

    def test_what_one_manager_refused_another_may_take(self, make_manager: MakeManager) -> None:
        full = make_manager(max_contexts_per_user=1)
        full.create_isolated_context("alice")
        context = create_isolated_execution_context("alice")
        with pytest.raises(ContextLimitError):
            full.set_context("alice", context)
        make_manager().set_context("alice", context)

    @pytest.mark.parametrize("under_the_manager", [True, False])
    def test_a_child_has_no_key(self, manager: UserContextManager, under_the_manager: bool) -> None:
        parent = create_isolated_execution_context("alice")
        if under_the_manager:
            manager.set_context("alice", parent)
        before = manager.get_active_contexts()
        child = parent.create_child_context("part")
        for context in (child, child.create_child_context("part of it")):
            with pytest.raises(InvalidContextError, match=r"child context.*give its root"):
                manager.set_context("desk 4", context)
        assert manager.get_active_contexts().keys() == before.keys()
        assert manager.clear_context("desk 4") is False
        assert child.host is parent.host
        assert child.is_open
        parent.close()

    def test_a_foreign_child_is_refused_as_anything_foreign(self, manager: UserContextManager) -> None:
        child = manager.create_isolated_context("bob").create_child_context("part")
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            manager.set_context("desk 4", child)

    def test_metadata_that_cannot_be_copied_stops_nothing_and_is_shown_by_its_type(
        self, manager: UserContextManager
    ) -> None:
        context, stranger = create_isolated_execution_context("alice"), visitor(manager)
        for one in (context, stranger):
            one.audit_metadata.update({"ticket": 7, "lock": threading.Lock()})
        manager.set_context("alice", context)
        stranger.bind("bob")
        for user in ("alice", "bob"):
            trail = manager.get_audit_trail(user)
            assert trail is not None
            assert trail["ticket"] == 7
            assert "lock" in trail["lock"]

    async def test_a_synchronous_clear_in_a_loop_releases_what_is_asynchronous_there(
        self, manager: UserContextManager
    ) -> None:
        released = asyncio.Event()
        context = manager.create_isolated_context("alice", "r-1")

        async def release() -> None:
            released.set()

        context.callback(release)
        assert manager.clear_context(("alice", "r-1")) is True
        assert manager.get_active_contexts() == {}
        await asyncio.wait_for(released.wait(), 10)
        assert await context.aclose() == ()


class TestMaking:
    def test_ids_that_are_not_given_are_made(self, manager: UserContextManager) -> None:
        ids = UnifiedIDManager()
        for context in (
            manager.create_isolated_context("alice"),
            manager.create_managed_context("alice"),
            manager.create_context_with_unified_ids("alice"),
        ):
            assert ids.parse(context.request_id).kind == "request"
            assert ids.parse(context.thread_id).kind == "thread"
            assert ids.extract_thread_id(context.run_id) == context.thread_id
            assert context.websocket_client_id is None
            assert manager.get_context(("alice", context.request_id)) is context

    def test_the_managed_way_takes_what_the_isolated_one_takes(self) -> None:
        # By name: a misspelt argument is then seen by whoever checks types.
        of_managed, of_isolated = (
            inspect.signature(make).parameters
            for make in (UserContextManager.create_managed_context, UserContextManager.create_isolated_context)
        )
        assert of_managed == of_isolated

    def test_what_is_given_is_taken(self, manager: UserContextManager) -> None:
        session = mock.Mock(spec=["close"])
        context = manager.create_managed_context(
            "alice",
            "r-1",
            thread_id="t-1",
            run_id="run-1",
            db_session=session,
            websocket_client_id="w-1",
            agent_context={"a": 1},
            audit_metadata={"b": 2},
        )
        assert (context.thread_id, context.run_id, context.websocket_client_id) == ("t-1", "run-1", "w-1")
        assert context.db_session is session
        assert (context.agent_context, context.audit_metadata) == ({"a": 1}, {"b": 2})

    def test_what_does_not_vouch_for_itself_is_not_made(self, manager: UserContextManager) -> None:
        session = mock.Mock(spec=["close"])
        refusing = mock.patch.object(UserExecutionContext, "verify_isolation", side_effect=ContextIsolationError("x"))
        with refusing, pytest.raises(ContextIsolationError):
            manager.create_isolated_context("alice", db_session=session)
        assert manager.get_active_contexts() == {}

    async def test_it_works_inside_a_running_loop(self, manager: UserContextManager) -> None:
        async with managed_user_context(manager.create_managed_context("alice")) as context:
            assert manager.get_context(("alice", context.request_id)) is context
        assert manager.get_active_contexts() == {}

    def test_a_second_context_for_a_request_takes_the_place_of_the_first(self, manager: UserContextManager) -> None:
        first = manager.create_isolated_context("alice", "r-1")
        second = manager.create_isolated_context("alice", "r-1")
        assert first.is_open is False
        assert manager.get_context(("alice", "r-1")) is second

    def test_settings_come_from_the_managers(self, make_manager: MakeManager) -> None:
        manager = make_manager(environment=IsolatedEnvironment(environ={"REGION": "eu"}))
        context = manager.create_isolated_context("alice")
        assert context.environment.get("REGION") == "eu"
        context.environment.set("REGION", "us")
        assert manager.create_isolated_context("alice").environment.get("REGION") == "eu"

    def test_a_managed_one_always_ends(self, manager: UserContextManager, clock: Clock) -> None:
        managed = manager.create_managed_context("alice")
        plain = manager.create_isolated_context("alice")
        clock.advance(UserContextManager.MANAGED_TTL - 1)
        assert manager.sweep() == 0
        clock.advance(1)
        assert manager.sweep() == 1
        assert (managed.is_open, plain.is_open) == (False, True)

    @pytest.mark.parametrize(("given", "end"), [(None, 60), (30, 30), (90, 90)])
    def test_the_managers_own_life_holds_where_none_is_given(
        self, clock: Clock, given: float | None, end: float, make_manager: MakeManager
    ) -> None:
        manager = make_manager(ttl=60, clock=clock)
        for context in (
            manager.create_isolated_context("alice", ttl_seconds=given),
            manager.create_managed_context("alice", ttl_seconds=given),
        ):
            assert manager.get_active_contexts()["alice", context.request_id]["expires_in_seconds"] == end


class TestListing:
    def test_an_entry_is_plain_and_has_these_fields(self, manager: UserContextManager, clock: Clock) -> None:
        context = manager.create_isolated_context("alice", "r-1", ttl_seconds=60)
        manager.set_context("desk 4", context, ttl_seconds=60)
        clock.advance(20)
        [(key, shown)] = manager.get_active_contexts().items()
        assert key == ("alice", "r-1")
        assert shown.pop("age_seconds") >= 0
        assert datetime.fromisoformat(shown.pop("created_at")) == context.created_at
        assert shown == {
            "user_id": "alice",
            "request_id": "r-1",
            "thread_id": context.thread_id,
            "run_id": context.run_id,
            "websocket_client_id": None,
            "expires_in_seconds": 40,
            "is_anonymous": False,
        }

    def test_it_has_one_entry_for_each_live_root_context(self, manager: UserContextManager, clock: Clock) -> None:
        kept = manager.create_isolated_context("alice", "r-1")
        kept.create_child_context("part")
        manager.create_isolated_context("alice", "r-2").close()
        manager.create_isolated_context("alice", "r-3", ttl_seconds=60)
        clock.advance(60)
        stranger = visitor(manager)
        assert set(manager.get_active_contexts()) == {("alice", "r-1"), (stranger.user_id, stranger.request_id)}


Displace = Callable[[UserContextManager], object]


def at_the_limit(manager: UserContextManager) -> None:
    manager.create_isolated_context("alice")


def by_looking(manager: UserContextManager) -> None:
    with pytest.raises(ContextExpiredError):
        manager.get_context(("bob", "r-1"))


DISPLACE = pytest.mark.parametrize("displace", [at_the_limit, by_looking])


class TestOthersReleases:
    """Whoever finds that another user's context must go does not wait for its releases, nor lends them its rights."""

    @pytest.fixture
    def full(self, clock: Clock, make_manager: MakeManager) -> UserContextManager:
        """With room for two."""
        return make_manager(max_contexts=2, clock=clock)

    @DISPLACE
    def test_they_run_elsewhere_and_as_the_other_user(
        self, full: UserContextManager, clock: Clock, displace: Displace
    ) -> None:
        bobs = full.create_isolated_context("bob", "r-1", ttl_seconds=60)
        returned = threading.Event()
        seen: list[object] = []

        def release() -> None:
            seen.append(returned.wait(PATIENCE))
            seen.append(current_context())
            seen.append(ambient_grant())

        bobs.callback(release)
        with running_as(full, "alice"), full.privileged(reason="support", users=["bob"]):
            clock.advance(60)
            displace(full)
            returned.set()
            wait_until(lambda: repr(bobs).endswith("closed>"), "bob's is closed")
        assert seen == [True, bobs, None]

    @DISPLACE
    async def test_on_an_event_loop_too(self, full: UserContextManager, clock: Clock, displace: Displace) -> None:
        bobs = full.create_isolated_context("bob", "r-1", ttl_seconds=60)
        released = asyncio.Event()
        variable: ContextVar[str] = ContextVar("variable")
        seen: list[object] = []

        async def release() -> None:
            note()
            released.set()

        def note() -> None:
            seen.append((current_context(), ambient_grant(), variable.get("unset")))

        bobs.callback(release)
        bobs.callback(note)
        variable.set("alice's")
        with running_as(full, "alice"), full.privileged(reason="support", users=["bob"]):
            clock.advance(60)
            displace(full)
            assert seen == []
            await released.wait()
        assert seen == [(bobs, None, "unset"), (bobs, None, "unset")]


class TestIsolation:
    @pytest.mark.parametrize("of_a_child", [False, True])
    def test_a_resource_of_two_users_is_found(self, manager: UserContextManager, of_a_child: bool) -> None:
        connection = mock.Mock(spec=["close"])
        for user in ("alice", "bob"):
            context = manager.create_isolated_context(user)
            (context.create_child_context("part") if of_a_child else context).closing(connection, name="connection")
        assert manager.validate_isolation() is False
        [finding] = manager.isolation_report().findings
        assert "alice.connection" in str(finding)
        assert "bob.connection" in str(finding)

    def test_one_of_one_users_contexts_is_not(self, manager: UserContextManager) -> None:
        connection = mock.Mock(spec=["close"])
        for _ in range(2):
            manager.create_isolated_context("alice").closing(connection)
        manager.create_isolated_context("bob").closing(mock.Mock(spec=["close"]))
        assert manager.validate_isolation() is True


class TestLimits:
    def test_children_do_not_count(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        manager.create_isolated_context("alice").create_child_context("part")
        assert len(manager.get_active_contexts()) == 1

    def test_at_the_limit_a_text_key_replaces_what_the_owner_has_there(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        first, second = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context(("alice", "draft"), first)  # as alice's own code does with "draft"
        manager.set_context("draft", second)
        assert (first.is_open, second.is_open) == (False, True)
        assert manager.get_context("draft") is manager.get_context(("alice", "draft")) is second

    def test_whoever_binds_at_the_limit_of_that_user_stays_anonymous(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1)
        manager.create_isolated_context("alice")
        stranger = visitor(manager)
        with pytest.raises(ContextLimitError):
            stranger.bind("alice")
        assert stranger.is_anonymous
        stranger.bind("bob")
        assert stranger.user_id == "bob"

    def test_what_has_expired_is_not_replaced_by_whoever_is_bound(self, make_manager: MakeManager) -> None:
        clock = Clock()
        manager = make_manager(clock=clock)
        manager.create_isolated_context("alice", "draft", ttl_seconds=1.0)
        stranger = visitor(manager)
        manager.set_context((stranger.user_id, "draft"), stranger)
        clock.advance(1.0)
        stranger.bind("alice")
        assert [event["reason"] for event in events(manager, "alice", "closed")] == ["expired"]
        assert manager.get_context(("alice", "draft")) is stranger

    def test_whoever_is_bound_counts_as_named(self, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts=1, max_anonymous_contexts=1)
        visitor(manager).bind("alice")
        stranger = visitor(manager)
        with pytest.raises(ContextLimitError) as caught:
            manager.create_isolated_context("bob")
        assert caught.value.scope == "total"
        stranger.close()
        visitor(manager)

    def test_a_class_may_set_them(self) -> None:
        class Small(UserContextManager):
            MAX_CONTEXTS_PER_USER = 2

        with closing_contexts(Small()) as manager:
            manager.create_isolated_context("alice")
            manager.create_isolated_context("alice")
            with pytest.raises(ContextLimitError):
                manager.create_isolated_context("alice")

    @pytest.mark.parametrize("limit", [0, -1, 1.5, True, "10"])
    @pytest.mark.parametrize("name", ["max_contexts_per_user", "max_contexts", "max_anonymous_contexts"])
    def test_no_limit_at_all_is_a_mistake(self, name: str, limit: Any) -> None:
        with pytest.raises(ConfigurationError, match=name):
            UserContextManager(**{name: limit})


class TestExpiry:
    def test_setting_it_anew_renews_it(self, manager: UserContextManager, clock: Clock) -> None:
        context = create_isolated_execution_context("alice")
        manager.set_context("alice", context, ttl_seconds=60)
        clock.advance(59)
        manager.set_context("alice", context, ttl_seconds=60)
        clock.advance(59)
        assert manager.sweep() == 0
        assert manager.get_context("alice") is context
        clock.advance(1)
        assert manager.sweep() == 1

    @pytest.mark.parametrize("ttl_seconds", [None, HOUR])
    @pytest.mark.parametrize("known_before", [False, True])
    def test_nothing_outlives_the_credentials(
        self, manager: UserContextManager, ttl_seconds: float | None, known_before: bool
    ) -> None:
        context = manager.create_isolated_context("alice") if known_before else visitor(manager)
        context.bind(Principal("alice", datetime.now(UTC) + timedelta(seconds=60)))
        manager.set_context("alice", context, ttl_seconds=ttl_seconds)
        [shown] = manager.get_active_contexts().values()
        assert 0 < shown["expires_in_seconds"] <= 60

    def test_a_key_more_takes_no_deadline_away(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice", ttl_seconds=60)
        manager.set_context("alice", context)
        [shown] = manager.get_active_contexts().values()
        assert shown["expires_in_seconds"] == 60

    def test_expired_credentials_bind_not_even_the_same_user(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        with pytest.raises(UnauthenticatedError):
            context.bind(Principal("alice", datetime.now(UTC) - timedelta(seconds=1)))

    @pytest.mark.parametrize(
        "ttl",
        [0, -1, float("nan"), float("inf"), -float("inf"), "60", True, timedelta(seconds=60), 366 * 24 * HOUR, 10**400],
        ids=lambda ttl: str(ttl)[:8],
    )
    def test_a_life_that_makes_no_sense_is_refused(self, manager: UserContextManager, ttl: Any) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: manager.set_context("alice", create_isolated_execution_context("alice"), ttl_seconds=ttl),
            lambda: manager.create_isolated_context("alice", ttl_seconds=ttl),
            lambda: manager.create_managed_context("alice", ttl_seconds=ttl),
        ]
        for attempt in attempts:
            with pytest.raises(InvalidContextError, match="ttl_seconds"):
                attempt()
        assert manager.get_active_contexts() == {}
        with pytest.raises(ConfigurationError, match="ttl is"):
            UserContextManager(ttl=ttl)

    def test_whoever_finds_it_expired_ends_it(self, manager: UserContextManager, clock: Clock) -> None:
        first, second = (manager.create_isolated_context("alice", name, ttl_seconds=60) for name in ("r-1", "r-2"))
        clock.advance(60)
        with pytest.raises(ContextExpiredError):
            manager.get_context(("alice", "r-1"))
        assert manager.clear_context(("alice", "r-2")) is False
        wait_until(lambda: not first.is_open and not second.is_open, "both are closed")
        with pytest.raises(ContextNotFoundError) as caught:
            manager.get_context(("alice", "r-1"))
        assert type(caught.value) is ContextNotFoundError

    def test_what_does_not_vouch_for_itself_is_not_bound(self, manager: UserContextManager) -> None:
        stranger = visitor(manager)
        refusing = mock.patch.object(UserExecutionContext, "verify_isolation", side_effect=ContextIsolationError("x"))
        with refusing, pytest.raises(ContextIsolationError):
            stranger.bind("alice")
        assert stranger.is_anonymous

    def test_what_makes_room_for_a_late_identity_is_closed(self, clock: Clock, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1, clock=clock)
        expired = manager.create_isolated_context("alice", ttl_seconds=60)
        clock.advance(60)
        stranger = visitor(manager)
        stranger.bind("alice")
        wait_until(lambda: not expired.is_open, "the expired one is closed")
        assert [shown["request_id"] for shown in manager.get_active_contexts().values()] == [stranger.request_id]

    def test_a_manager_sweeps_by_itself(self) -> None:
        context = UserContextManager().create_isolated_context("alice", ttl_seconds=0.01)
        wait_until(lambda: not context.is_open, "the context has expired")


class TestRefusedSessions:
    """A session that came with a context which may not live is still the caller's."""

    class Session:
        closed = False

        def close(self) -> None:
            self.closed = True

    def test_at_the_limit(self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(manager.MAX_CONTEXTS_PER_USER):
            manager.create_isolated_context("alice")
        made: list[UserExecutionContext] = []
        verify = UserExecutionContext.verify_isolation

        def note(context: UserExecutionContext) -> bool:
            made.append(context)
            return verify(context)

        monkeypatch.setattr(UserExecutionContext, "verify_isolation", note)
        session = self.Session()
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context("alice", db_session=session)
        (refused,) = made
        assert not refused.is_open
        assert refused.lifetime.targets() == []
        assert not session.closed

    def test_when_the_owner_closes_what_lives(self, manager: UserContextManager) -> None:
        session = self.Session()
        manager.create_isolated_context("alice", db_session=session).close()
        assert session.closed


def test_without_the_gil_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ConfigurationError, match="PYTHON_GIL=1"):
        UserContextManager()


class TestRaces:
    """Two things at the same moment, brought about on purpose."""

    def test_whoever_comes_second_to_bind_is_told(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = visitor(manager)
        monkeypatch.setattr(UserExecutionContext, "_become", lambda context, user_id: False)
        with pytest.raises(IdentityConflictError):
            context.bind("alice")
        assert [shown["is_anonymous"] for shown in manager.get_active_contexts().values()] == [True]

    @pytest.mark.parametrize("moment", ["bound", "opened", "put"])
    def test_who_has_expired_is_closed_also_when_whoever_needed_the_room_is_refused(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        manager = UserContextManager(max_contexts=1, clock=clock)
        expired = manager.create_isolated_context("alice", ttl_seconds=HOUR)
        clock.advance(HOUR)
        room = Registry._make_room

        def make_room(registry: Registry, *args: Any) -> None:
            room(registry, *args)
            context.close()

        context = visitor(manager) if moment == "bound" else create_isolated_execution_context("bob")
        monkeypatch.setattr(Registry, "_make_room", make_room)
        monkeypatch.setattr(UserExecutionContext, "_with_own_ids", lambda *args: context)
        with pytest.raises(UserContextError):
            if moment == "bound":
                context.bind("bob")
            elif moment == "opened":
                manager.create_isolated_context("bob")
            else:
                manager.set_context("bob", context)
        assert not expired.is_open
        assert len(manager._registry) == 0

    def test_a_context_that_closes_while_it_is_bound_does_not_stay(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = visitor(manager)
        lock = Signalling()
        monkeypatch.setattr(manager._registry, "_lock", lock)
        closing = threading.Thread(target=context.close)
        become = UserExecutionContext._become

        def become_and_meet_a_close(bound_context: UserExecutionContext, user_id: str) -> bool:
            bound = become(bound_context, user_id)
            lock.wanted.clear()
            closing.start()
            assert lock.wanted.wait(10), "the close did not come for the registry's lock"
            return bound

        monkeypatch.setattr(UserExecutionContext, "_become", become_and_meet_a_close)
        context.bind("alice")
        closing.join(10)
        assert context.is_open is False
        assert manager.get_active_contexts() == {}

    def test_a_context_that_a_thread_is_just_closing_is_not_listed(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listings: list[object] = []
        context_closing = UserContextManager.context_closing

        def look_first(manager: UserContextManager, context: UserExecutionContext) -> None:
            listings.append(manager.get_active_contexts())  # as another thread may
            context_closing(manager, context)

        monkeypatch.setattr(UserContextManager, "context_closing", look_first)
        manager.create_isolated_context("alice").close()
        assert listings == [{}]

    def test_a_context_that_is_bound_while_it_is_set_is_registered_once(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = visitor(manager)
        lock = Signalling()
        lock.before = lambda: context.bind("alice")  # as another thread may, that gets the lock before this one
        monkeypatch.setattr(manager._registry, "_lock", lock)
        manager.set_context(("alice", "desk"), context)
        assert len(manager.get_active_contexts()) == 1
        context.close()
        assert manager.get_active_contexts() == {}


class Signalling:
    """A lock that tells when somebody else comes for it."""

    def __init__(self) -> None:
        self.wanted = threading.Event()
        self.before: Callable[[], object] | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self.wanted.set()
        before, self.before = self.before, None
        if before is not None:
            before()
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()


class TestTheEnd:
    def test_clearing_everything_counts_what_there_was(self, manager: UserContextManager) -> None:
        contexts = [manager.create_isolated_context(user) for user in ("alice", "alice", "bob")]
        contexts.append(visitor(manager))
        assert manager.cleanup_all_contexts() == 4
        assert not any(context.is_open for context in contexts)
        assert manager.cleanup_all_contexts() == 0
        assert manager.is_healthy() is True

    async def test_draining_waits_for_the_last_one(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        draining = asyncio.create_task(manager.drain(60))
        await asyncio.sleep(0)
        assert not draining.done()
        context.close()
        assert await draining == 0

    async def test_with_nothing_live_it_is_over_at_once(self, manager: UserContextManager) -> None:
        assert await asyncio.wait_for(manager.drain(60), 10) == 0

    async def test_it_waits_for_what_is_still_being_released(self, manager: UserContextManager) -> None:
        go_on, released = asyncio.Event(), asyncio.Event()

        async def release() -> None:
            await go_on.wait()
            released.set()

        context = manager.create_isolated_context("alice")
        context.callback(release)
        context.close()
        assert manager.get_active_contexts() == {}
        draining = asyncio.create_task(manager.drain(60))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not draining.done()
        go_on.set()
        assert await draining == 0
        assert released.is_set()

    async def test_what_does_not_end_in_time_is_closed(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        released: list[str] = []
        context = manager.create_isolated_context("alice")

        async def release() -> None:
            await asyncio.sleep(0)
            released.append("alice")

        context.callback(release)
        assert await manager.drain(0) == 1
        assert released == ["alice"]
        with pytest.raises(ContextClosedError, match="shutdown"):
            context.agent_context.clear()
        assert "1 contexts are still open" in caplog.text

    async def test_what_is_open_may_open_more_until_it_ends(self, manager: UserContextManager) -> None:
        async with managed_user_context(manager.create_isolated_context("alice")):
            draining = asyncio.create_task(manager.drain(PATIENCE))
            await asyncio.sleep(0)
            assert manager.is_healthy() is False
            async with managed_user_context(manager.create_isolated_context("alice")) as another:
                assert another.is_open
        assert await draining == 0

    @pytest.mark.parametrize("below", [False, True], ids=["in its context", "in a child of it"])
    async def test_who_drains_is_not_waited_for_and_not_closed(self, manager: UserContextManager, below: bool) -> None:
        other = manager.create_isolated_context("bob")
        async with managed_user_context(manager.create_isolated_context("alice")) as own:
            draining = own.create_child_context("draining") if below else own
            async with managed_user_context(draining) if below else nullcontext():
                assert await manager.drain(0) == 1
                waiting = asyncio.create_task(manager.drain(PATIENCE))
                assert await asyncio.wait_for(waiting, PATIENCE / 2) == 0
                assert current_context() is draining
        assert (own.lifetime.reason, other.lifetime.reason) == ("finished", "shutdown")
        assert await asyncio.wait_for(manager.drain(PATIENCE), PATIENCE / 2) == 0

    async def test_nothing_is_opened_any_more_until_it_serves_again(self, manager: UserContextManager) -> None:
        await manager.drain(0)
        assert manager.is_healthy() is False
        attempts: list[Callable[[], object]] = [
            lambda: visitor(manager),
            lambda: manager.create_isolated_context("alice"),
            lambda: manager.set_context("alice", create_isolated_execution_context("alice")),
        ]
        for attempt in attempts:
            with pytest.raises(ManagerDrainingError):
                attempt()
        assert manager.get_active_contexts() == {}
        manager.serve()
        assert manager.is_healthy() is True
        assert isinstance(visitor(manager), UserExecutionContext)


class TestTheLimitOfConnections:
    @pytest.mark.parametrize(("contexts", "connections"), [(1, 1), (2, 1), (5, 4), (10, 8), (1000, 800)])
    def test_it_leaves_room_for_requests(self, contexts: int, connections: int) -> None:
        assert UserContextManager(max_contexts_per_user=contexts)._registry.limits.connections == connections
        assert UserContextManager(max_connections_per_user=3)._registry.limits.connections == 3

    def test_more_connections_than_contexts_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="raise max_contexts_per_user too"):
            UserContextManager(max_contexts_per_user=5, max_connections_per_user=6)
