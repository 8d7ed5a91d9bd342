"""The guard: who may touch whose contexts, and the one way across."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest

from support.contexts import MakeManager, events, running_as, visitor
from ucm_middleware import (
    EVERYONE,
    ContextClosedError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
    create_isolated_execution_context,
    managed_user_context,
)

pytestmark = pytest.mark.security


@pytest.fixture
def manager(make_manager: MakeManager) -> UserContextManager:
    return make_manager()


def may_read(manager: UserContextManager, user_id: str) -> bool:
    """Whether the code that asks is let through to this user."""
    try:
        manager.get_audit_trail(user_id)
    except CrossUserAccessError:
        return False
    return True


class TestCodeInNoContext:
    """Trusted by a manager on its own; refused by one that serves, unless its guard was made open."""

    @pytest.mark.parametrize(
        ("guard", "serves", "trusted"),
        [("closed", False, True), ("closed", True, False), ("open", False, True), ("open", True, True)],
    )
    def test_it_is_trusted(self, guard: Literal["closed", "open"], serves: bool, trusted: bool) -> None:
        manager = UserContextManager(guard=guard)
        if serves:
            manager.serve()
        assert may_read(manager, "alice") is trusted

    @pytest.mark.parametrize("trusting", [UserContextManager(), UserContextManager(guard="open")])
    def test_a_context_made_by_hand_is_enough_where_code_is_trusted(self, trusting: UserContextManager) -> None:
        with managed_user_context(create_isolated_execution_context("alice")):
            assert may_read(trusting, "alice")
            assert not may_read(trusting, "bob")

    def test_it_gets_through_in_a_privileged_block_for_those_it_names(self, manager: UserContextManager) -> None:
        manager.serve()
        with manager.privileged(reason="nightly job", users=["alice"]):
            assert may_read(manager, "alice")
            assert not may_read(manager, "bob")
            context = manager.create_managed_context("alice", "r-1")
            with managed_user_context(context):
                assert may_read(manager, "alice")
            assert manager.get_active_contexts() == {}
        assert not may_read(manager, "alice")

    def test_a_listing_under_a_grant_has_those_it_names(self, manager: UserContextManager) -> None:
        for user in ("alice", "bob", "carol"):
            manager.create_isolated_context(user)
        manager.serve()
        with manager.privileged(reason="support", users=["alice", "bob"]):
            assert {shown["user_id"] for shown in manager.get_active_contexts().values()} == {"alice", "bob"}
        with manager.privileged(reason="monitoring", users=EVERYONE):
            assert len(manager.get_active_contexts()) == 3

    def test_a_denial_of_it_stands_in_no_users_trail(self, manager: UserContextManager) -> None:
        manager.serve()
        assert not may_read(manager, "alice")
        with manager.privileged(reason="audit", users=EVERYONE):
            denial, grant = manager.get_system_trail()
            assert (denial["event"], denial["outcome"], denial["action"]) == ("denied", "denied", "get_audit_trail")
            assert (grant["event"], grant["reason"]) == ("privileged", "audit")
            assert manager.get_audit_trail("alice") is None

    def test_it_is_told_what_to_do(self, manager: UserContextManager) -> None:
        manager.serve()
        with pytest.raises(CrossUserAccessError, match=r"in no user's context.*privileged"):
            manager.get_audit_trail("alice")
        ours = manager.privileged(reason="test", users=["alice"])
        with ours, running_as(manager, "alice"), pytest.raises(CrossUserAccessError, match=r"not belong.*privileged"):
            manager.get_audit_trail("bob")

    def test_what_stands_in_no_users_trail_is_not_for_users(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            manager.get_system_trail()

    @pytest.mark.parametrize("guard", ["ajar", "", None, True])
    def test_a_guard_is_open_or_closed(self, guard: Any) -> None:
        with pytest.raises(ValueError, match="guard"):
            UserContextManager(guard=guard)

    def test_an_own_key_does_not_stand_in_for_another_user(self, manager: UserContextManager) -> None:
        bob = create_isolated_execution_context("bob")
        manager.set_context("bob", bob)
        with running_as(manager, "alice") as alice:
            manager.set_context("bob", alice)
            assert manager.get_context("bob") is alice
            with manager.privileged(reason="support", users=["bob"]):
                assert manager.get_context("bob") is bob


class TestPrivileged:
    """Crossing users is possible in one place, for those it names, on the record, and as long as the block lasts."""

    def test_it_reaches_those_it_names_and_nobody_else(self, manager: UserContextManager) -> None:
        bob, carol = manager.create_isolated_context("bob", "r-1"), manager.create_isolated_context("carol", "r-1")
        with running_as(manager, "alice"), manager.privileged(reason="support ticket 7", users=["bob"]):
            assert manager.get_context(("bob", "r-1")) is bob
            with pytest.raises(CrossUserAccessError):
                manager.get_context(("carol", "r-1"))
            with pytest.raises(CrossUserAccessError):
                manager.cleanup_all_contexts()
            with manager.privileged(reason="audit", users=EVERYONE):
                assert manager.get_context(("carol", "r-1")) is carol

    def test_an_inner_block_does_not_widen_with_the_outer_one(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob", "r-1")
        carol = manager.create_isolated_context("carol", "r-1")
        with running_as(manager, "alice"), manager.privileged(reason="outer", users=["carol"]):
            with manager.privileged(reason="inner", users=["dan"]), pytest.raises(CrossUserAccessError):
                manager.get_context(("bob", "r-1"))
            assert manager.get_context(("carol", "r-1")) is carol

    async def test_a_task_that_outlives_the_block_has_nothing_of_it(self, manager: UserContextManager) -> None:
        bob = manager.create_isolated_context("bob", "r-1")
        looked, ended = asyncio.Event(), asyncio.Event()

        async def linger() -> bool:
            assert manager.get_context(("bob", "r-1")) is bob
            looked.set()
            await ended.wait()
            return may_read(manager, "bob")

        async with managed_user_context(manager.create_isolated_context("alice")):
            with manager.privileged(reason="support", users=["bob"]):
                task = asyncio.create_task(linger())
                await looked.wait()
            ended.set()
            assert await task is False

    def test_a_copied_context_outlives_the_block_without_the_grant(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob", "r-1")
        manager.serve()
        with manager.privileged(reason="support", users=["bob"]):
            inherited = contextvars.copy_context()
        with pytest.raises(CrossUserAccessError):
            inherited.run(manager.get_context, ("bob", "r-1"))

    def test_whoever_becomes_bob_is_not_privileged_any_more(self, manager: UserContextManager) -> None:
        bob = manager.create_isolated_context("bob", "r-1")
        manager.create_isolated_context("carol", "r-1")
        with running_as(manager, "alice"), manager.privileged(reason="support", users=EVERYONE):
            with managed_user_context(bob), pytest.raises(CrossUserAccessError):
                manager.get_context(("carol", "r-1"))
            manager.get_context(("carol", "r-1"))

    def test_it_is_on_record_before_anything_was_touched(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob")
        with running_as(manager, "alice"), manager.privileged(reason="ticket 7", users=["bob"]):
            for user in ("alice", "bob"):
                assert [event["reason"] for event in events(manager, user, "privileged")] == ["ticket 7"]

    def test_the_record_does_not_tell_bob_who_else_it_was_about(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob")
        with manager.privileged(reason="quarterly audit", users=["bob", "carol"]):
            pass
        with running_as(manager, "bob"):
            assert events(manager, "bob", "privileged")
            assert "carol" not in repr(manager.get_audit_trail("bob"))

    @pytest.mark.parametrize("reason", ["", "  \n"])
    def test_without_a_reason_there_is_no_access(self, manager: UserContextManager, reason: Any) -> None:
        with pytest.raises(InvalidContextError, match="reason"), manager.privileged(reason=reason, users=["bob"]):
            raise AssertionError("the block was entered")

    def test_text_is_not_taken_for_a_list_of_one_letter_users(self, manager: UserContextManager) -> None:
        with pytest.raises(InvalidContextError, match="users"), manager.privileged(reason="support", users="bob"):
            raise AssertionError("the block was entered")

    def test_it_ends_with_an_error_as_well(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice"):
            with pytest.raises(LookupError), manager.privileged(reason="support", users=["bob"]):
                raise LookupError
            assert not may_read(manager, "bob")

    def test_a_thread_that_inherited_it_loses_it_too(self, manager: UserContextManager) -> None:
        manager.serve()
        ended = threading.Event()
        answers: list[bool] = []

        def linger() -> None:
            ended.wait(10)
            answers.append(may_read(manager, "bob"))

        with manager.privileged(reason="support", users=["bob"]):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(linger,))
            thread.start()
        ended.set()
        thread.join(10)
        assert answers == [False]

    def test_a_visitor_is_not_named_but_reached_with_everyone(self, manager: UserContextManager) -> None:
        stranger = visitor(manager)
        manager.serve()
        with pytest.raises(InvalidContextError), manager.privileged(reason="support", users=[stranger.user_id]):
            raise AssertionError("the block was entered")
        with manager.privileged(reason="support", users=EVERYONE):
            assert manager.get_context((stranger.user_id, stranger.request_id)) is stranger

    def test_the_actors_trail_says_whose_contexts_it_was_for(self, manager: UserContextManager) -> None:
        with running_as(manager, "alice"):
            with manager.privileged(reason="audit", users=["carol", "bob"]):
                pass
            with manager.privileged(reason="audit", users=EVERYONE):
                pass
            named = [event["users"] for event in events(manager, "alice", "privileged")]
        assert named == [["bob", "carol"], "everyone"]

    def test_it_opens_nothing_of_another_manager(self, manager: UserContextManager, make_manager: MakeManager) -> None:
        manager.create_isolated_context("bob", "r-1")
        with running_as(manager, "alice"), make_manager().privileged(reason="mine", users=EVERYONE):
            with pytest.raises(CrossUserAccessError):
                manager.get_context(("bob", "r-1"))
            assert not may_read(manager, "bob")
            assert list(manager.get_active_contexts()) != []
            assert {shown["user_id"] for shown in manager.get_active_contexts().values()} == {"alice"}
        assert events(manager, "bob", "privileged") == []

    @pytest.mark.parametrize(
        "act",
        [
            lambda manager: manager.get_context(("bob", "r-1")),
            lambda manager: manager.get_audit_trail("bob"),
            lambda manager: manager.create_isolated_context("bob"),
            lambda manager: manager.get_active_contexts(),
            lambda manager: manager.clear_context(("bob", "r-1")),
        ],
        ids=["get_context", "get_audit_trail", "create", "get_active_contexts", "clear_context"],
    )
    def test_it_ends_with_the_context_that_it_was_taken_in(
        self, manager: UserContextManager, act: Callable[[UserContextManager], object]
    ) -> None:
        bob = manager.create_isolated_context("bob", "r-1")
        with running_as(manager, "alice") as alice, manager.privileged(reason="support", users=["bob"]):
            assert manager.get_context(("bob", "r-1")) is bob
            alice.close("revoked")
            with pytest.raises(ContextClosedError):
                act(manager)
        assert bob.is_open

    def test_it_does_not_come_back_by_assignment(self, manager: UserContextManager) -> None:
        with manager.privileged(reason="support", users=["bob"]) as grant:
            pass
        with pytest.raises(AttributeError):
            grant.alive = True  # type: ignore[misc]

    @pytest.mark.parametrize(("name", "value"), [("is_open", True), ("serving", False)])
    def test_nor_is_the_guard_switched_off_by_one(self, manager: UserContextManager, name: str, value: bool) -> None:
        with running_as(manager, "alice") as alice:
            assert alice.host is not None
            with pytest.raises(AttributeError):
                setattr(alice.host.guard, name, value)


class TestListings:
    def test_a_users_own_is_found_without_walking_everybodys(
        self, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> None:
            raise AssertionError("walked over all live contexts")

        manager.create_isolated_context("bob")
        monkeypatch.setattr(manager._registry, "live", refuse)
        with running_as(manager, "alice") as alice:
            assert list(manager.get_active_contexts()) == [("alice", alice.request_id)]
            with manager.privileged(reason="support", users=["bob"]):
                listed = manager.get_active_contexts().values()
                assert {shown["user_id"] for shown in listed} == {"alice", "bob"}
