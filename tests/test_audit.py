"""The audit records: what is written down, how much of it is kept, and how it is read back."""

import json
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event, Thread
from types import FrameType
from typing import Any
from weakref import WeakSet

import pytest

from support.contexts import MakeManager, events, running_as, visitor
from support.waiting import PATIENCE
from ucm_middleware import ContextLimitError, CrossUserAccessError, UnifiedIDManager, UserContextManager
from ucm_middleware.audit.ledger import Ledger, Trail
from ucm_middleware.audit.memory import BATCH, MemoryLedger
from ucm_middleware.audit.records import AuditRecord, Data, Row
from ucm_middleware.audit.records import Event as Kind
from ucm_middleware.testing import RecordingLedger

VISITOR = "anonymous_" + "0" * 32
FIXED = {
    "user_id",
    "context_set_at",
    "context_source",
    "isolation_verified",
    "compliance_version",
    "events",
    "events_dropped",
}


def record(user_id: str | None, event: Kind = "closed", at: float = 0.0, data: Data = ()) -> AuditRecord:
    return AuditRecord(event, at, user_id, data=data)


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

    @pytest.mark.parametrize("users", [["alice"], [None], [VISITOR], ["alice", "bob"], ["alice", VISITOR]])
    def test_what_is_held_beyond_what_is_shown_is_bounded_too(self, users: list[str | None]) -> None:
        class Held:
            pass

        alive = WeakSet[Held]()
        ledger = MemoryLedger(records_per_user=8)
        for _ in range(20 * BATCH):
            for user in users:
                alive.add(held := Held())
                ledger.append(record(user, data=(("held", held),)))
                assert len(alive) <= (8 + 2) * len(users) + BATCH
        for user in users:
            trail = ledger.trail(user)
            assert trail is not None
            assert (len(trail.records), trail.dropped) == (8, 20 * BATCH - 8)

    def test_users_beyond_the_bound_are_forgotten_whole(self) -> None:
        ledger = MemoryLedger(records_per_user=1, users=1)
        for user in ("alice", "alice", "alice", "bob", "alice"):
            ledger.append(record(user))
            assert ledger.trail(user) is not None  # sorted in one by one
        trail = ledger.trail("alice")
        assert trail is not None
        assert trail.dropped == 0

    def test_once_users_were_forgotten_nobody_is_said_to_be_unknown(self) -> None:
        ledger = MemoryLedger(users=1, anonymous_users=1)
        for user in ("anonymous_1", "anonymous_2", "alice"):
            ledger.append(record(user))
        assert (ledger.knows("alice"), ledger.knows("bob")) == (True, False)
        ledger.append(record("bob"))
        assert ledger.trail("alice") is None
        assert (ledger.knows("alice"), ledger.knows("bob"), ledger.knows("carol")) == (True, True, True)

    @pytest.mark.parametrize("room", [True, False])
    @pytest.mark.parametrize("seed", range(10))
    def test_it_keeps_what_one_that_sorts_at_once_would(self, seed: int, room: bool) -> None:
        chance = random.Random(seed)
        users = [*(f"user-{number}" for number in range(8)), *(f"anonymous_{number}" for number in range(6)), None]
        weights = [chance.choice([1, 3, 30]) for _ in users]
        most, most_anonymous = (8, 6) if room else (4, 3)
        ledger = MemoryLedger(records_per_user=5, users=most, anonymous_users=most_anonymous)
        plain = Plain(5, most, most_anonymous)
        kinds: list[Kind] = ["opened", "closed", "denied", "refused", "privileged"]
        for at in range(1200):
            [user] = chance.choices(users, weights)
            for _ in range(chance.choice([1, 1, 2, 7])):
                one = record(user, chance.choice(kinds[2:] if user is None else kinds), at)
                ledger.append(one)
                plain.append(one)
            if chance.random() < 0.01 or at == 1199:
                for user in users:
                    found, expected = ledger.trail(user), plain.trail(user)
                    if room or user is None or expected is None or found is None:
                        assert found == expected
                    else:  # who is among the last again before the batch is sorted was never forgotten
                        assert found.records[-len(expected.records) :] == expected.records
                        assert found.dropped >= expected.dropped
                        assert expected.opening in (found.opening, None)

    @pytest.mark.usefixtures("threads_switch_often")
    def test_threads_lose_nothing_and_keep_their_order(self) -> None:
        ledger = MemoryLedger(records_per_user=20_000)
        users = [f"user-{number}" for number in range(4)]

        def write(user: str) -> None:
            for at in range(3000):
                ledger.append(record(user, at=at))
                ledger.append(record("everyone", at=at))

        threads = [Thread(target=write, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for user in users:
            assert kept_times(ledger, user) == list(range(3000))
        assert sorted(kept_times(ledger, "everyone")) == sorted([*range(3000)] * 4)

    def test_who_reads_waits_for_whoever_is_just_sorting(self) -> None:
        sorting, go_on = Event(), Event()

        class Slow(dict[str, list[Row]]):
            def __contains__(self, key: object) -> bool:
                sorting.set()
                return go_on.wait(PATIENCE) and super().__contains__(key)

        ledger = MemoryLedger()
        ledger._named = Slow()

        def write() -> None:
            for _ in range(BATCH):
                ledger.append(record("alice"))

        thread = Thread(target=write)
        thread.start()
        assert sorting.wait(PATIENCE)
        assert not ledger._lock.acquire(blocking=False)
        go_on.set()
        thread.join()
        trail = ledger.trail("alice")
        assert trail is not None
        assert len(trail.records) == 128

    def test_what_interrupts_the_sorting_disturbs_nothing(self) -> None:
        # A finalizer or a signal handler, at each moment: it writes more than a batch, and reads a trail.
        for moment in range(1, MOST):
            ledger = crowded()

            def more(ledger: MemoryLedger = ledger) -> None:
                for at in range(1000, 1000 + BATCH + 1):
                    ledger.append(record("alice", at=at))
                trail = ledger.trail("alice")
                assert trail is not None
                assert trail.records[0].at == 0  # alice is found at each moment

            happened = interrupted(moment, more, ledger)
            assert kept_times(ledger, "alice") == [*range(20), *(range(1000, 1000 + BATCH + 1) if happened else ())]
            assert [kept_times(ledger, user) for user in ("bob", VISITOR)] == [[*range(20)]] * 2
            assert kept_times(ledger, None) == sorted([*range(20)] * 2)
            if not happened:
                assert moment > 50
                return
        raise AssertionError("there were more moments")

    def test_what_stops_the_sorting_loses_nothing(self) -> None:
        # A signal handler that raises, such as the one of Ctrl-C.
        def stop() -> None:
            raise KeyboardInterrupt

        for moment in range(1, MOST):
            ledger = crowded()
            try:
                if not interrupted(moment, stop, ledger):
                    return
            except KeyboardInterrupt:
                pass
            for user in ("alice", "bob", VISITOR, None):
                assert {*kept_times(ledger, user)} == {*range(20)}
        raise AssertionError("there were more moments")


MOST = 1000
"""More calls than sorting makes."""


def kept_times(ledger: Ledger, user_id: str | None) -> list[float]:
    trail = ledger.trail(user_id)
    assert trail is not None
    assert trail.dropped == 0
    return times(trail.records)


def crowded() -> MemoryLedger:
    """A ledger with rows of everybody, all but the first of each still in line."""
    ledger = MemoryLedger(records_per_user=1000)
    for at in range(20):
        for user in ("alice", "bob", VISITOR):
            ledger.append(record(user, at=at))
        ledger.append(record(None, "refused", at=at))
        ledger.append(record(None, "privileged", at=at))
        if at == 0:
            ledger.trail(None)
    return ledger


def interrupted(moment: int, work: Callable[[], object], ledger: MemoryLedger) -> bool:
    """Sort, and do the work at the n-th moment at which the interpreter may run something else: False when there are
    not so many.
    """
    left = moment

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        # A function is entered, or one of C has returned.
        if event not in ("call", "c_return") or frame.f_code.co_name not in SORTING:
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            work()

    sys.setprofile(look)
    try:
        ledger.trail(None)
    finally:
        sys.setprofile(None)
    return left <= 0


SORTING = {"_sort_in", "_sort_batch", "_rows_for", "_users_like", "_drop_rows", "_drop_users"}


class Plain:
    """Keeps what a ledger is to keep, one record at a time."""

    def __init__(self, records: int, users: int, anonymous_users: int) -> None:
        self.most = {False: users, True: anonymous_users}
        self.records = records
        self.kept: dict[bool, OrderedDict[str, list[AuditRecord]]] = {False: OrderedDict(), True: OrderedDict()}
        self.nobodys: dict[bool, list[AuditRecord]] = {False: [], True: []}

    def append(self, one: AuditRecord) -> None:
        if one.user_id is None:
            self.nobodys[one.event == "refused"].append(one)
            return
        is_anonymous = one.user_id.startswith("anonymous_")
        users = self.kept[is_anonymous]
        users.setdefault(one.user_id, []).append(one)
        users.move_to_end(one.user_id)
        if len(users) > self.most[is_anonymous]:
            users.popitem(last=False)

    def trail(self, user_id: str | None) -> Trail | None:
        if user_id is None:
            shown = sorted(
                (one for kept in self.nobodys.values() for one in kept[-self.records :]), key=lambda one: one.at
            )
            return Trail(None, tuple(shown), sum(max(0, len(kept) - self.records) for kept in self.nobodys.values()))
        kept = self.kept[user_id.startswith("anonymous_")].get(user_id)
        if kept is None:
            return None
        opening = next((one for one in reversed(kept) if one.event == "opened"), None)
        return Trail(opening, tuple(kept[-self.records :]), max(0, len(kept) - self.records))


class TestRecord:
    def test_it_shows_what_it_says_and_no_more(self) -> None:
        shown = AuditRecord("closed", 0.0, "alice", request="r-1", reason="expired", seconds=1.5).to_dict()
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

    def test_ids_that_nobody_has_read_yet_are_those_of_the_context(self) -> None:
        manager = UserContextManager()
        context = visitor(manager)
        context.close()
        opened, closed = events(manager, context.user_id, "opened", "closed")
        ids = {"request_id": context.request_id, "thread_id": context.thread_id, "run_id": context.run_id}
        assert ids.items() <= opened.items()
        assert ids.items() <= closed.items()

    def test_it_is_never_changed(self) -> None:
        ledger = RecordingLedger()
        manager = UserContextManager(ledger=ledger)
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            manager.get_context("bob")
        visitor(manager).close()
        for one in ledger.records:
            for name in (*AuditRecord._fields, "request_id", "thread_id", "run_id", "another"):
                with pytest.raises(AttributeError):
                    setattr(one, name, None)
            assert type(one.data) is tuple
            assert {type(pair) for pair in one.data} <= {tuple}

    def test_its_data_is_not_in_its_repr(self) -> None:
        shown = repr(record("alice", data=(("audit_metadata", {"password": "hunter2"}),)))
        assert "hunter2" not in shown
        assert "closed" in shown

    def test_data_does_not_overrule_it(self) -> None:
        shown = AuditRecord(
            "denied", 0.0, "alice", outcome="denied", data=(("event", "x"), ("outcome", "ok"), ("at", 1))
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

    def __init__(self, event: Kind) -> None:
        super().__init__()
        self.event = event

    def append(self, row: Row) -> None:
        if row[0] == self.event:
            raise OSError("full")
        super().append(row)


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
        assert 0 <= failed["seconds"] < 60
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
            def append(self, row: Row) -> None:
                seen.append((row[0], row[2]))
                super().append(row)

        manager = UserContextManager(ledger=Mine())
        manager.create_isolated_context("alice").close()
        with manager.privileged(reason="audit", users=["alice"]):
            pass
        assert seen == [("opened", "alice"), ("closed", "alice"), ("privileged", None), ("privileged", "alice")]
