"""The audit records: what is written down, how much of it is kept, and how it is read back."""

import gc
import json
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from support.contexts import MakeManager, events, running_as, visitor
from ucm_middleware import ContextLimitError, CrossUserAccessError, UnifiedIDManager, UserContextManager
from ucm_middleware.audit.ledger import BATCH, MemoryLedger
from ucm_middleware.audit.records import AuditRecord, Event

FIXED = {
    "user_id",
    "context_set_at",
    "context_source",
    "isolation_verified",
    "compliance_version",
    "events",
    "events_dropped",
}


def record(user_id: str | None, event: Event = "closed", at: float = 0.0) -> AuditRecord:
    return AuditRecord(event, at, user_id)


def times(records: Iterable[AuditRecord]) -> list[float]:
    return [one.at for one in records]


class TestMemoryLedger:
    def test_a_user_never_seen_has_no_trail(self) -> None:
        assert MemoryLedger().trail("alice") is None

    def test_the_newest_are_kept_in_order_and_the_rest_is_counted(self) -> None:
        ledger = MemoryLedger(records_per_user=3)
        for at in range(5):
            ledger.append(record("alice", at=at))
        trail = ledger.trail("alice")
        assert trail is not None
        assert times(trail.records) == [2, 3, 4]
        assert trail.dropped == 2

    def test_one_users_flood_drops_nothing_of_another(self) -> None:
        ledger = MemoryLedger(records_per_user=3)
        for at in range(3):
            ledger.append(record("bob", at=at))
        for at in range(100):
            ledger.append(record("alice", at=at))
        trail = ledger.trail("bob")
        assert trail is not None
        assert times(trail.records) == [0, 1, 2]
        assert trail.dropped == 0

    def test_a_flood_of_visitors_pushes_out_no_named_user(self) -> None:
        ledger = MemoryLedger(users=2, anonymous_users=2)
        ledger.append(record("alice"))
        for number in range(10):
            ledger.append(record(f"anonymous_{number:032x}"))
        assert ledger.trail("alice") is not None
        assert [number for number in range(10) if ledger.trail(f"anonymous_{number:032x}")] == [8, 9]

    def test_of_too_many_users_those_seen_last_stay(self) -> None:
        ledger = MemoryLedger(users=2)
        for user in ("alice", "bob", "alice", "carol"):
            ledger.append(record(user))
        assert [user for user in ("alice", "bob", "carol") if ledger.trail(user)] == ["alice", "carol"]

    def test_the_opening_outlives_its_record(self) -> None:
        ledger = MemoryLedger(records_per_user=1)
        ledger.append(record("alice", "opened", at=1))
        ledger.append(record("alice", "closed", at=2))
        trail = ledger.trail("alice")
        assert trail is not None
        assert trail.opening is not None
        assert trail.opening.at == 1
        assert times(trail.records) == [2]

    def test_what_is_nobodys_is_kept_apart_and_bounded_too(self) -> None:
        ledger = MemoryLedger(records_per_user=2)
        for at in range(5):
            ledger.append(record(None, "refused", at=at))
        trail = ledger.trail(None)
        assert trail is not None
        assert times(trail.records) == [3, 4]

    def test_a_flood_of_refusals_pushes_out_nothing_else_of_nobodys(self) -> None:
        ledger = MemoryLedger(records_per_user=2)
        ledger.append(record(None, "privileged", at=1))
        for at in range(2, 10):
            ledger.append(record(None, "refused", at=at))
        trail = ledger.trail(None)
        assert trail is not None
        assert times(trail.records) == [1, 8, 9]

    def test_what_was_read_does_not_grow(self) -> None:
        ledger = MemoryLedger()
        ledger.append(record("alice"))
        trail = ledger.trail("alice")
        ledger.append(record("alice"))
        assert trail is not None
        assert len(trail.records) == 1

    def test_what_waits_to_be_sorted_is_bounded_too(self) -> None:
        ledger = MemoryLedger(records_per_user=3)
        written = [record("alice", at=number) for number in range(5000)]
        for one in written:
            ledger.append(one)
        seconds = {one.at for one in written}
        written.clear()
        alive = [one for one in gc.get_objects() if type(one) is AuditRecord and one.at in seconds]
        assert len(alive) <= 3 + BATCH

    @pytest.mark.parametrize("before", [True, False])
    def test_what_interrupts_the_sorting_disturbs_nothing(self, before: bool) -> None:
        # A finalizer or a signal handler, as the line is found not to be empty, or with a record in hand.
        class Interrupted(deque[AuditRecord]):
            def popleft(self) -> AuditRecord:
                if before:
                    interrupt()
                taken = super().popleft()
                interrupt()
                return taken

        def interrupt() -> None:
            if len(written) == 1:
                written.extend(record("alice") for _ in range(BATCH - before))
                for one in written[1:]:
                    ledger.append(one)

        written = [record("alice")]
        ledger = MemoryLedger(records_per_user=2 * BATCH)
        ledger._incoming = Interrupted(written)
        trail = ledger.trail("alice")
        assert trail is not None
        assert trail.records == tuple(written)


class TestRecord:
    def test_it_shows_what_it_says_and_no_more(self) -> None:
        shown = AuditRecord("closed", 0.0, "alice", "r-1", reason="expired", data={"seconds": 1.5}).to_dict()
        assert shown == {
            "event": "closed",
            "at": "1970-01-01T00:00:00+00:00",
            "outcome": "ok",
            "request_id": "r-1",
            "reason": "expired",
            "seconds": 1.5,
        }

    def test_ids_that_were_not_given_are_those_of_the_context(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        context = manager.create_isolated_context("alice")
        (opened,) = events(manager, "alice", "opened")
        assert (opened["thread_id"], opened["run_id"]) == (context.thread_id, context.run_id)
        assert UnifiedIDManager().extract_thread_id(context.run_id) == context.thread_id

    def test_ids_that_were_given_are_shown_as_they_are(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        given = UnifiedIDManager().generate_request_id()
        manager.create_isolated_context("alice", given, thread_id="t-1", run_id="r-1")
        (opened,) = events(manager, "alice", "opened")
        assert (opened["request_id"], opened["thread_id"], opened["run_id"]) == (given, "t-1", "r-1")

    def test_data_does_not_overrule_it(self) -> None:
        shown = AuditRecord(
            "denied", 0.0, "alice", outcome="denied", data={"event": "x", "outcome": "ok", "at": 1}
        ).to_dict()
        assert (shown["event"], shown["outcome"], shown["at"]) == ("denied", "denied", "1970-01-01T00:00:00+00:00")


@pytest.fixture
def manager(make_manager: MakeManager) -> UserContextManager:
    return make_manager()


def trail_of(manager: UserContextManager, user_id: str) -> dict[str, Any]:
    trail = manager.get_audit_trail(user_id)
    assert trail is not None
    return trail


class Full(MemoryLedger):
    """A ledger that has no room for records of one kind."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event

    def append(self, record: AuditRecord) -> None:
        if record.event == self.event:
            raise OSError("full")
        super().append(record)


class TestTrail:
    def test_its_shape_before_and_after_the_end(self, manager: UserContextManager) -> None:
        assert manager.get_audit_trail("alice") is None
        context = manager.create_isolated_context("alice", "r-1", audit_metadata={"ticket": 7})
        open_trail = trail_of(manager, "alice")
        context.close()
        closed_trail = trail_of(manager, "alice")
        assert open_trail.keys() == closed_trail.keys() == FIXED | {"ticket"}
        for name in FIXED - {"events"} | {"ticket"}:
            assert open_trail[name] == closed_trail[name]
        assert [event["event"] for event in closed_trail["events"]] == ["opened", "closed"]
        assert json.loads(json.dumps(closed_trail)) == closed_trail
        assert datetime.fromisoformat(open_trail["context_set_at"]) - context.created_at < timedelta(seconds=60)

    def test_fixed_fields_win(self, manager: UserContextManager) -> None:
        forged = dict.fromkeys(FIXED - {"user_id"}, "forged")
        manager.create_isolated_context("alice", audit_metadata=forged)
        trail = trail_of(manager, "alice")
        assert "forged" not in [trail[name] for name in FIXED]

    @pytest.mark.parametrize("source", ["set_context", "create_context", "connection", "bind"])
    def test_the_source_says_how_the_context_came_to_be(self, manager: UserContextManager, source: str) -> None:
        if source == "create_context":
            context = manager.create_isolated_context("alice")
        else:
            context = visitor(manager)
            if source != "connection":
                context.bind("alice")
            if source == "set_context":
                manager.set_context("alice", context)
        assert trail_of(manager, context.user_id)["context_source"] == source

    def test_a_child_is_told_from_a_root_context(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        before = trail_of(manager, "alice")
        child = context.create_child_context("bind")
        after = trail_of(manager, "alice")
        fixed = FIXED - {"events"}
        assert {name: after[name] for name in fixed} == {name: before[name] for name in fixed}
        opened = after["events"][-1]
        assert (opened["request_id"], opened["parent_request_id"]) == (child.request_id, context.request_id)
        assert opened["operation"] == "bind"

    def test_late_binding_stands_in_both_trails(self, manager: UserContextManager) -> None:
        context = visitor(manager)
        anonymous_id = context.user_id
        context.bind("alice")
        assert events(manager, "alice", "bound")[0]["anonymous_id"] == anonymous_id
        assert events(manager, anonymous_id, "bound")[0]["user_id"] == "alice"

    def test_a_grant_stands_once_in_each_trail_that_there_is(self, manager: UserContextManager) -> None:
        manager.create_isolated_context("bob")
        with running_as(manager, "alice"), manager.privileged(reason="support", users=["alice", "bob", "a typo"]):
            for user in ("alice", "bob"):
                assert len(events(manager, user, "privileged")) == 1
            assert manager.get_audit_trail("a typo") is None

    def test_the_end_says_why_how_long_and_what_was_not_released(
        self, manager: UserContextManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        context = manager.create_isolated_context("alice", "r-1")
        context.callback(partial(int, "no number"))
        manager.clear_context(("alice", "r-1"))
        manager.create_isolated_context("alice", "r-2").close("expired")
        failed, expired = events(manager, "alice", "closed")
        assert (failed["request_id"], failed["reason"], failed["outcome"]) == ("r-1", "cleared", "failed")
        assert failed["seconds"] >= 0
        assert "ValueError" in failed["unreleased"][0]
        assert (expired["reason"], expired["outcome"]) == ("expired", "failed")
        assert caplog.records

    def test_refusals_and_denials_are_there(self) -> None:
        manager = UserContextManager(max_contexts_per_user=1)
        with running_as(manager, "alice"):
            with pytest.raises(ContextLimitError):
                manager.create_isolated_context("alice")
            with pytest.raises(CrossUserAccessError):
                manager.clear_context("bob")
            [refusal], [denial] = events(manager, "alice", "refused"), events(manager, "alice", "denied")
        assert (refusal["outcome"], denial["outcome"]) == ("denied", "denied")
        assert (denial["action"], denial["asked_for"]) == ("clear_context", "bob")

    def test_records_are_in_the_order_of_what_happened(self, manager: UserContextManager) -> None:
        for _ in range(5):
            manager.create_isolated_context("alice").close()
        trail = trail_of(manager, "alice")
        assert [event["event"] for event in trail["events"]] == ["opened", "closed"] * 5
        moments = [datetime.fromisoformat(event["at"]) for event in trail["events"]]
        assert moments == sorted(moments)
        assert all(moment.tzinfo == UTC for moment in moments)

    def test_metadata_is_what_it_was_in_the_end(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice", audit_metadata={"ticket": 7})
        context.audit_metadata["answer"] = 42
        assert "answer" not in trail_of(manager, "alice")
        context.close()
        trail = trail_of(manager, "alice")
        assert (trail["ticket"], trail["answer"]) == (7, 42)
        manager.create_isolated_context("alice", audit_metadata={"ticket": 8})
        assert trail_of(manager, "alice")["ticket"] == 8

    def test_metadata_outlives_its_record(self, make_manager: MakeManager) -> None:
        manager = make_manager(ledger=MemoryLedger(records_per_user=2))
        context = manager.create_isolated_context("alice", audit_metadata={"ticket": 7})
        for _ in range(3):
            context.create_child_context("part")
        trail = trail_of(manager, "alice")
        assert "opened" not in [event["event"] for event in trail["events"]]
        assert trail["ticket"] == 7

    def test_what_was_dropped_is_counted(self) -> None:
        manager = UserContextManager(ledger=MemoryLedger(records_per_user=4))
        for _ in range(5):
            manager.create_isolated_context("alice").close()
        trail = trail_of(manager, "alice")
        assert (len(trail["events"]), trail["events_dropped"]) == (4, 6)

    def test_what_cannot_be_recorded_does_not_live(self) -> None:
        manager = UserContextManager(ledger=Full("opened"))
        with pytest.raises(OSError, match="full"):
            manager.create_isolated_context("alice")
        assert manager.get_active_contexts() == {}

    def test_an_end_that_cannot_be_recorded_is_an_end(self, caplog: pytest.LogCaptureFixture) -> None:
        manager = UserContextManager(ledger=Full("closed"))
        released: list[str] = []
        context = manager.create_isolated_context("alice")
        context.callback(released.append, "it")
        context.close()
        assert (context.is_open, released) == (False, ["it"])
        assert manager.get_active_contexts() == {}
        assert "could not be recorded" in caplog.text

    def test_a_denial_that_cannot_be_recorded_is_a_denial(self) -> None:
        manager = UserContextManager(ledger=Full("denied"))
        with running_as(manager, "alice"), pytest.raises((OSError, CrossUserAccessError)):
            manager.get_context("bob")

    def test_no_grant_without_a_record(self) -> None:
        manager = UserContextManager(ledger=Full("privileged"))
        with pytest.raises(OSError, match="full"), manager.privileged(reason="support", users=["alice"]):
            raise AssertionError("the block was entered")

    def test_a_ledger_of_ones_own_gets_everything(self) -> None:
        seen: list[tuple[str, str | None]] = []

        class Mine(MemoryLedger):
            def append(self, record: AuditRecord) -> None:
                seen.append((record.event, record.user_id))
                super().append(record)

        manager = UserContextManager(ledger=Mine())
        manager.create_isolated_context("alice").close()
        with manager.privileged(reason="audit", users=["alice"]):
            pass
        assert seen == [("opened", "alice"), ("closed", "alice"), ("privileged", None), ("privileged", "alice")]
