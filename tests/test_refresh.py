"""Newer credentials of the same user keep a context; those of another user, or that have ended, do not."""

from datetime import UTC, datetime, timedelta

import pytest

from ucm_middleware import (
    ContextClosedError,
    CrossUserAccessError,
    IdentityConflictError,
    Principal,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
)
from ucm_middleware.ambient import enter, leave
from ucm_middleware.testing import FakeClock, RecordingLedger

HOUR = 3600.0


def alice_for(hours: float) -> Principal:
    """Credentials that hold so long from now. The wall clock goes on, the manager's does not."""
    return Principal("alice", expires_at=datetime.now(UTC) + timedelta(hours=hours))


@pytest.fixture
def context(ucm_manager: UserContextManager) -> UserExecutionContext:
    """A context that could live four hours, by credentials that hold for one."""
    context = ucm_manager.create_isolated_context("alice", ttl_seconds=4 * HOUR)
    context.bind(alice_for(1))
    return context


def test_without_it_the_context_ends_with_its_credentials(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    ucm_clock.advance(1.1 * HOUR)
    assert context.lifetime.reason == "expired"


def test_it_lives_on_with_the_new_ones_and_ends_with_them(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    context.refresh(alice_for(2))
    ucm_clock.advance(1.5 * HOUR)
    assert context.is_open
    ucm_clock.advance(0.6 * HOUR)
    assert context.lifetime.reason == "expired"


@pytest.mark.parametrize("renewed", [alice_for(100), Principal("alice"), "alice"])
def test_it_outlives_its_own_time_by_no_credentials(
    context: UserExecutionContext, ucm_clock: FakeClock, renewed: Principal | str
) -> None:
    context.refresh(renewed)
    ucm_clock.advance(3.9 * HOUR)
    assert context.is_open
    ucm_clock.advance(0.2 * HOUR)
    assert context.lifetime.reason == "expired"


def test_without_a_time_of_its_own_it_lives_as_long_as_they_hold(
    ucm_manager: UserContextManager, ucm_clock: FakeClock
) -> None:
    context = ucm_manager.create_isolated_context("alice")
    context.bind(alice_for(1))
    context.refresh("alice")
    assert context.lifetime.deadline is None
    ucm_clock.advance(1000 * HOUR)
    assert context.is_open
    context.refresh(alice_for(1))
    ucm_clock.advance(1.1 * HOUR)
    assert context.lifetime.reason == "expired"


def test_credentials_that_end_sooner_are_believed_too(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    context.refresh(alice_for(0.5))
    ucm_clock.advance(0.6 * HOUR)
    assert context.lifetime.reason == "expired"


def test_a_time_to_live_that_was_given_later_holds(
    ucm_manager: UserContextManager, context: UserExecutionContext, ucm_clock: FakeClock
) -> None:
    ucm_manager.set_context("alice", context, ttl_seconds=2 * HOUR)
    context.refresh("alice")
    ucm_clock.advance(1.9 * HOUR)
    assert context.is_open
    ucm_clock.advance(0.2 * HOUR)
    assert context.lifetime.reason == "expired"


def test_another_users_are_refused_and_recorded(context: UserExecutionContext, ucm_ledger: RecordingLedger) -> None:
    with pytest.raises(IdentityConflictError):
        context.refresh("bob")
    assert context.user_id == "alice"
    [denied] = ucm_ledger.select("denied")
    assert (denied.user_id, dict(denied.data)) == ("alice", {"action": "bind", "asked_for": "bob"})


def test_those_that_have_ended_change_nothing(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    with pytest.raises(UnauthenticatedError):
        context.refresh(alice_for(-1))
    ucm_clock.advance(0.9 * HOUR)
    assert context.is_open
    ucm_clock.advance(0.2 * HOUR)
    assert context.lifetime.reason == "expired"


def test_another_users_code_may_not(ucm_manager: UserContextManager, context: UserExecutionContext) -> None:
    token = enter(ucm_manager.create_isolated_context("bob"))
    try:
        with pytest.raises(CrossUserAccessError):
            context.refresh(alice_for(2))
    finally:
        leave(token)


def test_a_message_refreshes_its_connection(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    message = context.create_child_context("message").create_child_context("part")
    message.refresh(alice_for(2))
    ucm_clock.advance(1.5 * HOUR)
    assert message.is_open
    ucm_clock.advance(0.6 * HOUR)
    assert context.lifetime.reason == message.lifetime.reason == "expired"


def test_it_is_on_record(context: UserExecutionContext, ucm_ledger: RecordingLedger) -> None:
    context.refresh(alice_for(2))
    [record] = ucm_ledger.select("refreshed")
    assert (record.user_id, record.context_id, record.outcome) == ("alice", context.context_id, "ok")


def test_not_of_one_that_is_closed_or_past_its_deadline(context: UserExecutionContext, ucm_clock: FakeClock) -> None:
    ucm_clock.advance(1.1 * HOUR)
    with pytest.raises(ContextClosedError):
        context.refresh(alice_for(2))


def test_under_no_manager_too() -> None:
    context = create_isolated_execution_context("alice")
    context.bind(alice_for(1))
    before = context.lifetime.deadline
    context.refresh(alice_for(2))
    assert before is not None
    assert context.lifetime.deadline == pytest.approx(before + HOUR, abs=60)
    context.close()
