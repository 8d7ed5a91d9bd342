"""Floods of denials and refusals: none is lost, and no flood has more records than it should."""

import gc
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from types import FrameType
from typing import Any

import pytest

from support.clock import Clock
from support.contexts import MakeManager, running_as, visitor
from support.waiting import wait_until
from ucm_middleware import (
    ContextLimitError,
    CrossUserAccessError,
    InvalidContextError,
    ManagerDrainingError,
    UserContextManager,
)
from ucm_middleware.audit.denials import EACH, KINDS, OTHERS, WINDOW, Denials, Kind
from ucm_middleware.audit.records import AuditRecord, Event, Row
from ucm_middleware.testing import RecordingLedger

ALICE: Kind = ("alice", "denied", "get_context")
MOST = 2000
"""More calls than anything here makes."""


class Book:
    """Owns the denials, and adds up what is told."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.planned: list[float] = []
        self.told: list[tuple[Kind, int]] = []
        self.each = 0
        self.fails = False
        self.denials = Denials(self.write, self.clock, self.planned.append)

    def write(self, kind: Kind, count: int, first: float, last: float) -> None:
        assert 0 < first <= last
        if self.fails:
            raise OSError("full")
        self.told.append((kind, count))

    def deny(self, kind: Kind = ALICE, times: int = 1) -> None:
        for _ in range(times):
            if self.denials.has_record(kind):
                self.each += 1

    @property
    def total(self) -> int:
        return self.each + sum(count for _, count in self.told)


class TestCounting:
    def test_the_first_have_a_record_each_and_the_others_one(self) -> None:
        book = Book()
        book.deny(times=EACH + 25)
        assert (book.each, book.told) == (EACH, [])
        book.denials.tell_all()
        assert book.told == [(ALICE, 25)]
        book.denials.tell_all()
        assert book.told == [(ALICE, 25)]

    def test_a_window_ends_and_a_new_one_begins(self) -> None:
        book = Book()
        book.deny(times=EACH + 1)
        book.clock.advance(WINDOW - 0.1)
        book.denials.tell_due()
        book.deny()
        assert (book.each, book.told) == (EACH, [])
        book.clock.advance(0.1)
        book.deny()
        assert (book.each, book.told) == (EACH + 1, [(ALICE, 2)])

    def test_reading_in_the_middle_begins_no_new_window(self) -> None:
        book = Book()
        book.deny(times=EACH + 3)
        book.denials.tell("bob")
        assert book.told == []
        book.denials.tell("alice")
        book.deny(times=4)
        assert (book.each, book.told) == (EACH, [(ALICE, 3)])
        book.denials.tell("alice")
        assert book.told == [(ALICE, 3), (ALICE, 4)]

    def test_kinds_are_told_apart(self) -> None:
        book = Book()
        kinds: list[Kind] = [
            ALICE,
            ("bob", "denied", "get_context"),
            ("alice", "denied", "bind"),
            (None, "refused", "limit"),
        ]
        for kind in kinds:
            book.deny(kind, EACH + 2)
        book.denials.tell_all()
        assert (book.each, book.told) == (EACH * 4, [(kind, 2) for kind in kinds])

    def test_when_to_look_is_asked_for_with_the_first(self) -> None:
        book = Book()
        ends = book.clock() + WINDOW
        book.deny(times=EACH + 2)
        assert (book.planned, book.denials.next_wake()) == ([ends], ends)

    def test_whose_they_were_is_forgotten_when_the_window_ends(self) -> None:
        book = Book()
        book.deny()
        book.clock.advance(WINDOW)
        book.denials.tell_due()
        assert book.denials._floods == {}
        assert book.denials.next_wake() is None

    def test_what_the_ledger_does_not_take_is_kept_and_tried_a_window_later(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        book = Book()
        book.deny(times=EACH + 2)
        book.fails = True
        book.clock.advance(WINDOW)
        book.denials.tell_due()
        assert "2 denials could not be recorded" in caplog.text
        assert book.denials.next_wake() == book.clock() + WINDOW
        book.deny(times=3)
        book.fails = False
        book.clock.advance(WINDOW)
        book.denials.tell_due()
        assert book.told == [(ALICE, 5)]
        assert book.total == EACH + 5

    def test_no_thread_is_no_loss(self) -> None:
        book = Book()

        def plan(wake: float) -> None:
            raise RuntimeError("can't start new thread")

        book.denials = Denials(book.write, book.clock, plan)
        book.deny(times=EACH + 2)
        book.denials.tell_all()
        assert book.total == EACH + 2

    def test_many_kinds_take_bounded_room_and_none_is_lost(self) -> None:
        book = Book()
        for number in range(KINDS * 3):
            book.deny((f"user-{number}", "denied", "get_context"))
        assert len(book.denials._floods) <= KINDS + 1
        book.deny((None, "refused", "limit"), 50)
        book.denials.tell_all()
        assert book.total == KINDS * 3 + 50
        assert book.told == [
            ((None, "denied", OTHERS), KINDS * 2 - EACH),
            ((None, "refused", OTHERS), 50 - EACH),
        ]

    def test_windows_that_are_over_make_room(self) -> None:
        book = Book()
        for number in range(KINDS):
            book.deny((f"user-{number}", "denied", "get_context"))
        book.clock.advance(WINDOW)
        book.deny(times=EACH + 1)
        book.denials.tell_all()
        assert book.told == [(ALICE, 1)]
        assert len(book.denials._floods) == 1

    @pytest.mark.usefixtures("threads_switch_often")
    def test_threads_lose_none(self) -> None:
        book = Book()
        each: list[int] = []
        done = threading.Event()

        def deny() -> None:
            each.append(sum(book.denials.has_record(ALICE) for _ in range(3000)))

        def tell() -> None:
            while not done.is_set():
                book.clock.advance(WINDOW / 3)
                book.denials.tell_due()
                book.denials.tell("alice")

        threads = [threading.Thread(target=deny) for _ in range(4)]
        teller = threading.Thread(target=tell)
        teller.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        teller.join()
        book.denials.tell_all()
        assert sum(each) + book.total == 12_000

    @pytest.mark.parametrize("interruption", ["deny", "deny another", "tell", "window over", "tell all"])
    @pytest.mark.parametrize("work", ["deny", "tell", "due"])
    def test_what_comes_in_at_any_moment_loses_none(self, work: str, interruption: str) -> None:
        for moment in range(1, MOST):
            book = Book()
            book.deny(times=EACH + 3)
            denied = EACH + 3
            extra = 0

            def come(book: Book = book) -> None:
                nonlocal extra
                if interruption.startswith("deny"):
                    extra = 5
                    book.deny(ALICE if interruption == "deny" else ("bob", "denied", "bind"), 5)
                elif interruption == "window over":
                    book.clock.advance(WINDOW)
                    book.denials.tell_due()
                elif interruption == "tell":
                    book.denials.tell("alice")
                else:
                    book.denials.tell_all()

            def go(book: Book = book) -> None:
                if work == "deny":
                    book.deny()
                elif work == "tell":
                    book.denials.tell_all()
                else:
                    book.clock.advance(WINDOW)
                    book.denials.tell_due()

            happened = interrupted(moment, go, come)
            book.denials.tell_all()
            assert book.total == denied + (work == "deny") + extra
            if not happened:
                assert moment > 3
                return
        raise AssertionError("there were more moments")

    def test_a_signal_handler_that_raises_loses_no_count(self) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        for moment in range(1, MOST):
            book = Book()
            book.deny(times=EACH + 3)
            happened = False
            with suppress(KeyboardInterrupt):
                happened = interrupted(moment, book.denials.tell_all, stop)
                if not happened:
                    return
            book.denials.tell_all()
            assert book.total >= EACH + 3  # twice where it came between the writing and the return
        raise AssertionError("there were more moments")


def interrupted(moment: int, work: Callable[[], object], come: Callable[[], object]) -> bool:
    """Do the work, and something else at the n-th moment at which the interpreter may: False when there are fewer."""
    left = moment

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        if event not in ("call", "c_return") or frame.f_globals.get("__name__") not in WATCHED:
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            come()

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return left <= 0


WATCHED = {"ucm_middleware.audit.denials", "ucm_middleware.expiry", "weakref"}


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(make_manager: MakeManager, ledger: RecordingLedger, clock: Clock) -> UserContextManager:
    return make_manager(ledger=ledger, clock=clock)


def deny(manager: UserContextManager, times: int, user: str = "alice") -> None:
    with running_as(manager, user):
        for _ in range(times):
            with pytest.raises(CrossUserAccessError):
                manager.get_context("bob")


def counts(ledger: RecordingLedger, event: Event = "denied") -> list[int]:
    return [dict(record.data).get("count", 1) for record in ledger.select(event)]  # type: ignore[misc]


class TestInTheTrail:
    def test_a_flood_is_one_record_with_its_count(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        deny(manager, EACH + 30)
        assert counts(ledger) == [1] * EACH
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        [*each, flood] = [event for event in trail["events"] if event["event"] == "denied"]
        assert len(each) == EACH
        assert (flood["action"], flood["count"], flood["outcome"]) == ("get_context", 30, "denied")
        assert datetime.fromisoformat(flood["first"]) <= datetime.fromisoformat(flood["last"])
        assert "request_id" not in flood
        assert flood["first"] >= each[-1]["at"]

    def test_the_closing_says_how_many_there_were(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        deny(manager, EACH + 30)
        [closed] = ledger.select("closed")
        assert dict(closed.data)["denials"] == EACH + 30

    def test_the_sweep_notices_that_the_time_is_over(
        self, manager: UserContextManager, ledger: RecordingLedger, clock: Clock
    ) -> None:
        manager._sweeper._planned = -1.0  # it is awake already: no thread
        deny(manager, EACH + 2)
        assert manager._next_wake() == clock() + WINDOW
        assert manager.sweep() == 0
        assert counts(ledger) == [1] * EACH
        clock.advance(WINDOW)
        assert manager.sweep() == 0
        assert counts(ledger) == [*[1] * EACH, 2]
        assert manager._next_wake() is None

    def test_the_managers_own_thread_does_it(self, make_manager: MakeManager, ledger: RecordingLedger) -> None:
        now = [1000.0]  # the fake clock stands still for that thread
        manager = make_manager(ledger=ledger, clock=lambda: now[0])
        deny(manager, EACH + 2)
        now[0] += WINDOW
        manager._sweeper.plan(now[0] - 1)  # the real wait is a minute
        wait_until(lambda: len(ledger.select("denied")) == EACH + 1, "the record of those counted")
        assert counts(ledger)[-1] == 2

    async def test_draining_tells_all(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        deny(manager, EACH + 2)
        await manager.drain(0)
        assert counts(ledger)[-1] == 2

    def test_a_manager_that_goes_tells_all(self, ledger: RecordingLedger) -> None:
        manager = UserContextManager(ledger=ledger)
        deny(manager, EACH + 2)
        del manager
        assert counts(ledger)[-1] == 2

    def test_nobodys_refusals_are_counted_too(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        for _ in range(EACH + 4):
            manager.record_refusal(InvalidContextError("user_id", "is blank", "give one"), "user_id: is blank")
        system = manager.get_system_trail()
        assert [(event["reason"], event.get("count")) for event in system] == [("invalid", None)] * EACH + [
            ("invalid", 4)
        ]
        assert ledger.records[-1].actor_id is None

    def test_visitors_that_are_refused_are_one_flood(self, make_manager: MakeManager, ledger: RecordingLedger) -> None:
        manager = make_manager(max_anonymous_contexts=1, ledger=ledger)
        visitor(manager)
        for _ in range(EACH + 4):
            with pytest.raises(ContextLimitError):
                visitor(manager)
        manager.get_system_trail()
        refused = ledger.select("refused", user=None)
        assert counts(ledger, "refused") == [*[1] * EACH, 4]
        assert len(refused) == EACH + 1

    def test_a_ledger_that_fails_keeps_no_trail_from_being_read(
        self, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if "count" in dict(AuditRecord(*row).data):
                    raise OSError("full")
                super().append(row)

        manager = make_manager(ledger=Full())
        deny(manager, EACH + 2)
        trail: Any = manager.get_audit_trail("alice")
        assert len(trail["events"]) == EACH + 2
        assert "could not be recorded" in caplog.text

    def test_nothing_is_kept_alive(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        deny(manager, EACH + 2)
        gc.collect()
        gc.disable()
        try:
            deny(manager, EACH + 2)
            assert gc.collect() == 0
        finally:
            gc.enable()

    async def test_who_comes_while_draining_has_a_record(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        await manager.drain(0)
        with pytest.raises(ManagerDrainingError):
            manager.create_isolated_context("alice")
        [refused] = ledger.select("refused", user="alice")
        assert (refused.reason, refused.outcome) == ("draining", "denied")


def test_a_forked_child_begins_with_none() -> None:
    book = Book()
    book.deny(times=EACH + 3)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        book.denials.tell_all()
        os.write(writing, bytes([len(book.told), sum(book.denials.has_record(ALICE) for _ in range(20))]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 2) == bytes([0, EACH])
    os.close(reading)
    os.close(writing)
    book.denials.tell_all()
    assert book.told == [(ALICE, 3)]
