"""A record for each thing that happens to a context: which, in what order, and what it says."""

import asyncio
import gc
import json
import re
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from support.asgi import exchange, http_scope, status_of
from support.contexts import MakeManager, running_as, visitor
from ucm_middleware import (
    ContextClosedError,
    ContextLimitError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    agent_run,
    create_isolated_execution_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.audit.denials import EACH, KINDS
from ucm_middleware.audit.records import AuditRecord, Event, Row, UserMention
from ucm_middleware.guard import EVERYONE
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import Receive, Scope, Send

SECRET = "hunter2"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "audit-records.md"


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(make_manager: MakeManager, ledger: RecordingLedger) -> UserContextManager:
    return make_manager(ledger=ledger)


@contextmanager
def table(*, fails: bool = False) -> Generator[str]:
    yield "rows"
    if fails:
        raise ValueError(SECRET)


@asynccontextmanager
async def socket(*, fails: bool = False) -> AsyncGenerator[str]:
    try:
        yield "socket"
    finally:
        if fails:
            raise ValueError(SECRET)


@asynccontextmanager
async def endless() -> AsyncGenerator[None]:
    yield
    await asyncio.Event().wait()


class Session:
    def close(self) -> None: ...


def brief(ledger: RecordingLedger, user: str = "alice") -> list[tuple[str, Any]]:
    """The user's records: the event, and of a resource its name, else the reason."""
    return [(record.event, dict(record.data).get("name", record.reason)) for record in ledger.select(user=user)]


def only(ledger: RecordingLedger, event: Event, user: str = "alice") -> tuple[AuditRecord, dict[str, Any]]:
    [record] = ledger.select(event, user=user)
    return record, dict(record.data)


def within(context: UserExecutionContext, *records: AuditRecord) -> bool:
    return all((one.context_id, one.request_id) == (context.context_id, context.request_id) for one in records)


class FullOfResources(RecordingLedger):
    """A ledger that takes no record of a resource."""

    def append(self, row: Row) -> None:
        if row[0].startswith("resource"):
            raise OSError("full")
        super().append(row)


class TestResources:
    async def test_each_way_in_and_out_has_its_two_records(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice", db_session=Session())
        context.enter_context(table())
        await context.enter_async_context(socket(), name="sock")
        await context.enter_async_context(socket(), owner_task=True, name="owned")
        context.callback(int)
        context.closing(Session(), name="cart")
        await context.aclose()
        assert brief(ledger) == [
            ("opened", None),
            ("resource_entered", "db_session"),
            ("resource_entered", "table"),
            ("resource_entered", "sock"),
            ("resource_entered", "owned"),
            ("resource_entered", "int"),
            ("resource_entered", "cart"),
            ("resource_exited", "cart"),
            ("resource_exited", "int"),
            ("resource_exited", "owned"),
            ("resource_exited", "sock"),
            ("resource_exited", "table"),
            ("resource_exited", "db_session"),
            ("closed", "closed"),
        ]
        assert within(context, *ledger.records)
        assert dict(ledger.records[-1].data) == {"resources": 6}
        assert {record.outcome for record in ledger.records} == {"ok"}

    @pytest.mark.ucm_leaks("it is about what is not released")
    async def test_what_fails_says_how_and_never_in_what_words(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")
        context.enter_context(table(fails=True), name="sync")
        await context.enter_async_context(socket(fails=True), name="async")
        await context.enter_async_context(endless(), name="slow", timeout=0.01)
        await context.enter_async_context(socket(fails=True), owner_task=True, name="owned")
        await context.aclose()
        failed = ledger.select("resource_failed")
        assert [(one.outcome, one.reason, dict(one.data)) for one in failed] == [
            ("failed", "failed", {"name": "owned", "error": "ValueError"}),
            ("failed", "timed out", {"name": "slow", "error": "TimeoutError"}),
            ("failed", "failed", {"name": "async", "error": "ValueError"}),
            ("failed", "failed", {"name": "sync", "error": "ValueError"}),
        ]
        assert ledger.select("resource_exited") == []
        closed, data = only(ledger, "closed")
        assert (closed.outcome, data["resources"], len(data["unreleased"])) == ("failed", 4, 4)
        assert SECRET not in str([tuple(record) for record in ledger.records])

    @pytest.mark.ucm_leaks("it is about what is not released")
    def test_what_is_interrupted_or_has_no_loop_says_so(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        def interrupt() -> None:
            raise asyncio.CancelledError

        def stop() -> None:
            raise KeyboardInterrupt

        context = manager.create_isolated_context("alice")
        asyncio.run(context.enter_async_context(socket(), name="socket"))
        context.callback(interrupt)
        context.callback(stop)
        with pytest.raises(KeyboardInterrupt):
            context.close()
        reasons = [(one.reason, dict(one.data)["error"]) for one in ledger.select("resource_failed")]
        assert reasons == [("failed", "KeyboardInterrupt"), ("cancelled", "RuntimeError"), ("unclosed", "RuntimeError")]

    @pytest.mark.ucm_leaks("it is about what is not released")
    def test_an_owner_that_left_with_its_loop_has_exited(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")

        async def enter() -> None:
            await context.enter_async_context(socket(), owner_task=True, name="good")
            await context.enter_async_context(socket(fails=True), owner_task=True, name="bad")

        with suppress(ValueError):
            asyncio.run(enter())
        context.close()
        assert dict(only(ledger, "resource_exited")[0].data)["name"] == "good"
        assert only(ledger, "resource_failed")[1] == {"name": "bad", "error": "ValueError"}

    async def test_a_release_in_the_background_has_its_record_before_the_end(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")
        await context.enter_async_context(socket(), name="sock")
        context.close("cleared")
        await context.lifetime.wait_closed()
        assert brief(ledger)[-2:] == [("resource_exited", "sock"), ("closed", "cleared")]

    def test_a_close_that_turns_out_to_be_asynchronous_counts_once(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def later() -> None: ...

        async def run() -> None:
            context = manager.create_isolated_context("alice")
            context.closing(SimpleNamespace(close=lambda: later()), name="odd")
            await context.aclose()

        asyncio.run(run())
        assert brief(ledger)[1:3] == [("resource_entered", "odd"), ("resource_exited", "odd")]
        assert len(ledger.records) == 4

    async def test_what_never_was_entered_has_no_record(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        @asynccontextmanager
        async def shut() -> AsyncGenerator[None]:
            raise OSError(SECRET)
            yield

        context = manager.create_isolated_context("alice")
        for owner_task in (False, True):
            with pytest.raises(OSError, match=SECRET):
                await context.enter_async_context(shut(), owner_task=owner_task)
        await context.aclose()
        assert brief(ledger) == [("opened", None), ("closed", "closed")]

    async def test_an_entering_that_was_cancelled_has_none_either(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        begun = asyncio.Event()

        @asynccontextmanager
        async def stuck() -> AsyncGenerator[None]:
            begun.set()
            await asyncio.Event().wait()
            yield

        context = manager.create_isolated_context("alice")
        entering = asyncio.ensure_future(context.enter_async_context(stuck(), owner_task=True))
        await begun.wait()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        await context.aclose()
        assert brief(ledger) == [("opened", None), ("closed", "closed")]

    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_what_is_entered_too_late_has_both_after_the_end(
        self, manager: UserContextManager, ledger: RecordingLedger, owner_task: bool
    ) -> None:
        context = manager.create_isolated_context("alice")

        @asynccontextmanager
        async def slow() -> AsyncGenerator[None]:
            if not owner_task:
                context.close()
            yield

        entering = asyncio.ensure_future(context.enter_async_context(slow(), name="late", owner_task=owner_task))
        if owner_task:
            while context.is_open:
                await asyncio.sleep(0)
                if context.lifetime.has_resources:
                    await entering
                    await context.aclose()
            assert brief(ledger)[1:] == [
                ("resource_entered", "late"),
                ("resource_exited", "late"),
                ("closed", "closed"),
            ]
            return
        with pytest.raises(ContextClosedError):
            await entering
        assert brief(ledger)[1:] == [("closed", "closed"), ("resource_entered", "late"), ("resource_exited", "late")]
        assert within(context, *ledger.records)

    def test_what_goes_over_to_the_next_context_says_so(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        session = Session()
        old, new = (create_isolated_execution_context("alice", f"r-{n}", db_session=session) for n in (1, 2))
        manager.set_context("alice", old)
        manager.set_context("alice", new)
        exited, data = only(ledger, "resource_exited")
        assert data == {"name": "db_session", "handed_over": True}
        assert within(old, exited)
        new.close()
        assert [one.request_id for one in ledger.select("resource_entered")] == ["r-1", "r-2"]
        assert [dict(one.data) for one in ledger.select("resource_exited")] == [data, {"name": "db_session"}]

    def test_a_context_made_by_hand_tells_what_it_has_when_it_comes_in(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = create_isolated_execution_context("alice", db_session=Session())
        context.callback(int)
        manager.set_context("alice", context)
        manager.set_context("desk", context)
        context.close()
        assert [event for event, _ in brief(ledger)] == [
            *("opened", "resource_entered", "resource_entered", "opened"),
            *("resource_exited", "resource_exited", "closed"),
        ]

    def test_under_no_manager_there_are_none(self) -> None:
        context = create_isolated_execution_context("alice", db_session=Session())
        context.callback(int)
        context.close()
        assert context.lifetime.journal is None

    def test_a_plain_context_has_no_journal(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        context = manager.create_isolated_context("alice")
        context.close()
        assert context.lifetime.journal is None
        assert only(ledger, "closed")[1] == {}

    async def test_what_a_plugin_wraps_with_goes_with_the_user(
        self, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        class Wraps:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self) -> AsyncGenerator[None]:
                yield

        manager = make_manager(plugins=[Wraps()], ledger=ledger)
        context = visitor(manager)
        anonymous_id = context.user_id
        await context._enter_around(manager.hooks.around_context(context))
        context.bind("alice")
        await context.aclose()
        assert [event for event, _ in brief(ledger, anonymous_id)] == ["opened", "resource_entered", "bound"]
        assert [event for event, _ in brief(ledger)] == ["opened", "bound", "resource_exited", "closed"]

    async def test_a_ledger_that_fails_loses_no_resource(
        self, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger = FullOfResources()
        manager = make_manager(ledger=ledger)
        released: list[str] = []
        context = manager.create_isolated_context("alice")
        context.callback(released.append, "callback")
        context.enter_context(table(fails=True))
        assert await context.enter_async_context(socket(), owner_task=True) == "socket"
        await context.aclose()
        assert released == ["callback"]
        assert brief(ledger) == [("opened", None), ("closed", "closed")]
        assert "could not be written" in caplog.text

    def test_records_leave_nothing_for_the_cycle_collector(self, manager: UserContextManager) -> None:
        async def request() -> None:
            context = manager.create_isolated_context("alice", db_session=Session())
            context.callback(int)
            await context.enter_async_context(socket())
            await context.enter_async_context(socket(), owner_task=True)
            await context.aclose()

        async def run() -> None:
            await request()
            gc.collect()
            gc.disable()
            try:
                await request()
                assert gc.collect() == 0
            finally:
                gc.enable()

        asyncio.run(run())

    def test_each_that_is_entered_ends_whatever_threads_do(
        self, manager: UserContextManager, ledger: RecordingLedger, threads_switch_often: None
    ) -> None:
        for _ in range(100):
            context = manager.create_isolated_context("alice")

            def enter(context: UserExecutionContext = context) -> None:
                for _ in range(20):
                    with suppress(ContextClosedError):
                        context.enter_context(table())

            threads = [threading.Thread(target=enter) for _ in range(2)]
            for thread in threads:
                thread.start()
            context.close()
            for thread in threads:
                thread.join()
            assert len(ledger.select("resource_entered")) == len(ledger.select("resource_exited"))


class TestStatistics:
    async def test_the_end_says_what_there_was(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        with running_as(manager, "alice") as context:
            context.callback(int)
            for name in ("one", "two"):
                context.create_child_context(name)
            for _ in range(3):
                with pytest.raises(CrossUserAccessError):
                    manager.get_context("bob")
        closed = ledger.select("closed")[-1]
        assert within(context, closed)
        assert dict(closed.data) == {"resources": 1, "children": 2, "denials": 3}

    def test_who_asks_another_manager_keeps_the_own_journal(
        self, manager: UserContextManager, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        others = RecordingLedger()
        other = make_manager(ledger=others)
        by_hand = create_isolated_execution_context("alice")
        with running_as(manager, "alice") as context:
            with pytest.raises(CrossUserAccessError):
                other.get_context("bob")
            context.callback(int)
        with managed_user_context(by_hand), pytest.raises(CrossUserAccessError):
            other.get_context("bob")
        assert [event for event, _ in brief(others)] == ["denied", "denied"]
        assert by_hand.lifetime.journal is None
        assert dict(ledger.select("closed")[-1].data) == {"resources": 1, "denials": 1}


class TestEnds:
    @pytest.mark.parametrize("reason", ["expired", "revoked"])
    def test_being_cut_off_is_on_record_before_the_end(
        self, manager: UserContextManager, ledger: RecordingLedger, reason: Any
    ) -> None:
        context = manager.create_isolated_context("alice")
        context.callback(int)
        child = context.create_child_context("part")
        context.close(reason)
        events = [(one.event, one.request_id == child.request_id) for one in ledger.records[3:]]
        assert events == [(reason, False), ("closed", True), ("resource_exited", False), ("closed", False)]
        record, data = only(ledger, reason)
        assert (record.outcome, record.reason, data) == ("ok", None, {})
        assert record.seconds is not None
        assert 0 <= record.seconds < 60

    @pytest.mark.parametrize("reason", ["closed", "evicted", "shutdown", "disconnected", "failed"])
    def test_other_ends_have_one_record(
        self, manager: UserContextManager, ledger: RecordingLedger, reason: Any
    ) -> None:
        manager.create_isolated_context("alice").close(reason)
        assert brief(ledger) == [("opened", None), ("closed", reason)]

    def test_a_child_that_is_cut_off_alone_has_its_own(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")
        child = context.create_child_context("part")
        child.close("revoked")
        assert within(child, only(ledger, "revoked")[0])

    def test_a_ledger_that_fails_keeps_none_open(
        self, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "expired":
                    raise OSError("full")
                super().append(row)

        manager = make_manager(ledger=Full())
        context = manager.create_isolated_context("alice")
        context.close("expired")
        assert not context.is_open
        assert manager.get_active_contexts() == {}
        assert "could not be recorded" in caplog.text


class TestAgentRuns:
    async def test_a_run_has_a_record_at_both_ends_in_its_own_context(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")
        async with agent_run(context, "search", {"query": SECRET, "password": SECRET}) as run:
            started, data = only(ledger, "agent_run")
            assert data == {
                "phase": "agent_started",
                "agent": "search",
                "parameters": ["query", "password"],
                "sequence": 1,
                "connections": 0,
            }
            assert (started.outcome, started.seconds) == ("ok", None)
        started, ended = ledger.select("agent_run")
        assert within(run.context, started, ended)
        assert dict(ended.data) == {
            "phase": "agent_completed",
            "agent": "search",
            "sequence": 2,
            "connections": 0,
        }
        assert (ended.outcome, ended.reason) == ("ok", None)
        assert ended.seconds is not None
        assert 0 <= ended.seconds < 60
        assert [event for event, _ in brief(ledger)] == ["opened", "child_opened", "agent_run", "agent_run", "closed"]
        assert SECRET not in str([tuple(record) for record in ledger.records])

    @pytest.mark.parametrize(
        ("error", "reason"), [(ValueError(SECRET), "failed"), (asyncio.CancelledError(), "cancelled")]
    )
    async def test_a_run_that_does_not_end_well_says_how(
        self, manager: UserContextManager, ledger: RecordingLedger, error: BaseException, reason: str
    ) -> None:
        context = manager.create_isolated_context("alice")
        with pytest.raises(type(error)):
            async with agent_run(context, "search"):
                raise error
        ended = ledger.select("agent_run")[-1]
        assert (ended.outcome, ended.reason, dict(ended.data)["error"]) == ("failed", reason, type(error).__name__)
        assert SECRET not in str(tuple(ended))

    async def test_a_run_that_is_cut_off_says_why(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        context = manager.create_isolated_context("alice")
        running = asyncio.Event()

        async def run() -> None:
            async with agent_run(context, "search"):
                running.set()
                await asyncio.Event().wait()

        task = asyncio.ensure_future(run())
        await running.wait()
        context.close("revoked")
        with pytest.raises(ContextClosedError):
            await task
        ended = ledger.select("agent_run")[-1]
        assert (ended.outcome, ended.reason) == ("failed", "revoked")

    async def test_what_cannot_be_recorded_does_not_run(
        self, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Full(RecordingLedger):
            room = 0

            def append(self, row: Row) -> None:
                if row[0] == "agent_run":
                    self.room -= 1
                    if self.room < 0:
                        raise OSError("full")
                super().append(row)

        ledger = Full()
        context = make_manager(ledger=ledger).create_isolated_context("alice")
        with pytest.raises(OSError, match="full"):
            async with agent_run(context, "search"):
                raise AssertionError("the block was entered")
        ledger.room = 1
        async with agent_run(context, "search") as run:
            pass
        assert not run.context.is_open
        assert "could not be recorded" in caplog.text

    async def test_under_no_manager_it_runs_all_the_same(self) -> None:
        context = create_isolated_execution_context("alice")
        async with agent_run(context, "search") as run:
            assert run.context.is_open
        assert not run.context.is_open


class TestReports:
    @pytest.mark.parametrize("event", ["event_sent", "agent_run", "transaction"])
    def test_what_an_adapter_reports_is_on_record(
        self, manager: UserContextManager, ledger: RecordingLedger, event: Any
    ) -> None:
        context = manager.create_isolated_context("alice")
        context.record(event, outcome="failed", reason="timeout", seconds=2, data={"to": 3, "api_key": SECRET})
        record, data = only(ledger, event)
        assert (record.outcome, record.reason, record.seconds) == ("failed", "timeout", 2.0)
        assert data == {"to": 3, "api_key": "<redacted>"}
        assert within(context, record)
        context.record(event)
        record = ledger.select(event)[-1]
        assert (record.outcome, record.reason, record.seconds, record.data) == ("ok", None, None, ())

    @pytest.mark.parametrize(
        ("field", "given"),
        [
            ("event", {"event": "closed"}),
            ("event", {"event": "else"}),
            ("event", {"event": None}),
            ("outcome", {"outcome": "fine"}),
            ("reason", {"reason": " "}),
            ("reason", {"reason": 7}),
            ("seconds", {"seconds": float("nan")}),
            ("seconds", {"seconds": -1}),
            ("seconds", {"seconds": True}),
            ("seconds", {"seconds": "1"}),
            ("data", {"data": [("a", 1)]}),
            ("data", {"data": {1: 2}}),
            ("data", {"data": {"": 2}}),
            ("data", {"data": {"a\n": 2}}),
            ("data['user_id']", {"data": {"user_id": "bob"}}),
            ("data['context_id']", {"data": {"context_id": "x"}}),
        ],
    )
    def test_what_breaks_a_rule_is_refused(
        self, manager: UserContextManager, ledger: RecordingLedger, field: str, given: Any
    ) -> None:
        context = manager.create_isolated_context("alice")
        with pytest.raises(InvalidContextError) as refused:
            context.record(given.pop("event", "event_sent"), **given)
        assert refused.value.field == field
        assert brief(ledger) == [("opened", None)]

    def test_it_is_bounded_like_metadata(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        context = manager.create_isolated_context("alice")
        context.record("event_sent", reason="r" * 5000, data={f"{n}": "x" * 5000 for n in range(100)})
        [record] = ledger.select("event_sent")
        assert len(json.dumps(dict(record.data))) <= 8192
        assert len(record.reason or "") < 1100

    def test_nobody_reports_for_another_user(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        bob = manager.create_isolated_context("bob")
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            bob.record("event_sent")
        assert ledger.select("event_sent") == []
        assert only(ledger, "denied")[1] == {"action": "record", "asked_for": "bob"}

    def test_after_the_end_it_is_refused_except_in_releases(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = manager.create_isolated_context("alice")
        context.callback(context.record, "transaction", outcome="ok")
        context.close()
        with pytest.raises(ContextClosedError):
            context.record("transaction")
        assert [event for event, _ in brief(ledger)][2:] == ["transaction", "resource_exited", "closed"]

    def test_under_no_manager_nothing_is_recorded(self) -> None:
        create_isolated_execution_context("alice").record("event_sent")


class TestDenialsAndRefusals:
    def test_a_second_identity_is_denied_in_the_first_ones_trail(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        context = visitor(manager)
        context.bind("alice")
        with pytest.raises(IdentityConflictError):
            context.bind("bob")
        record, data = only(ledger, "denied")
        assert within(context, record)
        assert data == {"action": "bind", "asked_for": "bob"}
        assert isinstance(data["asked_for"], UserMention)
        assert ledger.select(user="bob") == []

    def test_a_flood_of_visitors_does_not_hide_what_a_user_is_denied(
        self, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        manager = make_manager(ledger=ledger, max_anonymous_contexts=5000)

        def deny(context: UserExecutionContext) -> None:
            with managed_user_context(context), pytest.raises(CrossUserAccessError):
                manager.get_context("bob")

        for _ in range(KINDS + 10):
            deny(visitor(manager))
        deny(manager.create_isolated_context("mallory"))
        [record] = ledger.select("denied", user="mallory")
        assert dict(record.data)["asked_for"] == "bob"
        manager.get_system_trail()
        manager._trail.tell_counted()
        [counted] = ledger.select("denied", user=None)
        assert (counted.actor_id, dict(counted.data)["of"]) == (None, "anonymous users")
        assert dict(counted.data)["count"] == KINDS + 10 - EACH

    @pytest.mark.parametrize("use", ["resource", "key"])
    def test_so_is_an_identity_for_a_settled_visitor(
        self, manager: UserContextManager, ledger: RecordingLedger, use: str
    ) -> None:
        context = visitor(manager)
        if use == "key":
            context.derive_key("thread", "t-1")
        else:
            context.callback(int)
        with pytest.raises(IdentityConflictError):
            context.bind("bob")
        assert only(ledger, "denied", context.user_id)[1] == {"action": "bind", "asked_for": "bob"}

    def test_what_was_asked_for_is_said_for_what_it_is(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        asks: list[Callable[[], object]] = [
            lambda: manager.get_context("bob"),
            lambda: manager.get_context(("bob", "r-1")),
            manager.cleanup_all_contexts,
            lambda: alice.check_key("thread", "t-1", None),
        ]
        with running_as(manager, "alice") as alice:
            for ask in asks:
                with pytest.raises(CrossUserAccessError):
                    ask()
        text, pair, everyone, key = (dict(one.data) for one in ledger.select("denied"))
        assert (text["asked_for"], type(text["asked_for"])) == ("bob", UserMention)
        assert (pair["asked_for"], type(pair["asked_for"])) == ("bob", UserMention)
        assert pair["asked_for_request"] == "r-1"
        assert (everyone["asked_for"], type(everyone["asked_for"])) == ("everyone", str)
        assert str(key["asked_for"]).startswith("thread ucm1_")
        assert type(key["asked_for"]) is str

    def test_a_limit_is_in_the_trail_of_the_user_and_a_visitors_in_nobodys(
        self, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        manager = make_manager(max_contexts_per_user=1, max_anonymous_contexts=1, ledger=ledger)
        manager.create_isolated_context("alice")
        visitor(manager)
        with pytest.raises(ContextLimitError) as refused:
            manager.create_isolated_context("alice")
        with pytest.raises(ContextLimitError):
            visitor(manager)
        record, data = only(ledger, "refused")
        assert (record.outcome, record.reason, data) == ("denied", "limit", {"detail": str(refused.value)})
        assert [one.reason for one in ledger.select("refused", user=None)] == ["limit"]

    @pytest.mark.parametrize(
        ("found", "status", "reason"),
        [
            ("a b\n", 400, "invalid"),
            (None, 401, "unauthenticated"),
            (UnauthenticatedError("expired"), 401, "unauthenticated"),
            (HTTPException(418, SECRET), 418, "resolver"),
            (CrossUserAccessError("no"), 403, "foreign"),
            (IdentityConflictError("no"), 409, "conflict"),
            (ContextClosedError("r-1", "it", "shutdown"), 503, "resolver"),
        ],
    )
    async def test_a_connection_that_is_refused_has_one_record_that_says_why(
        self, manager: UserContextManager, ledger: RecordingLedger, found: Any, status: int, reason: str
    ) -> None:
        def identify(connection: HTTPConnection) -> str | None:
            if isinstance(found, Exception):
                raise found
            return cast("str | None", found)

        app = UserContextMiddleware(unreached, manager=manager, identify=identify, require_identity=True)
        assert status_of(await exchange(app, http_scope())) == status
        [record] = ledger.records
        assert (record.event, record.user_id, record.outcome, record.reason) == ("refused", None, "denied", reason)
        assert SECRET not in str(tuple(record))

    async def test_who_comes_while_draining_has_one_record_too(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        app = UserContextMiddleware(unreached, manager=manager, identify=lambda connection: "alice")
        await manager.drain(0)
        assert status_of(await exchange(app, http_scope())) == 503
        [record] = ledger.records
        assert (record.event, record.user_id, record.reason) == ("refused", "alice", "draining")


async def unreached(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the app was reached")


class TestMetadata:
    def test_secrets_are_in_no_record_and_no_trail(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        context = manager.create_isolated_context("alice", audit_metadata={"ticket": 7, "api_key": SECRET})
        context.audit_metadata["deep"] = [{"sessionId": SECRET}]
        context.close()
        assert SECRET not in str([tuple(record) for record in ledger.records])
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        assert (trail["ticket"], trail["api_key"]) == (7, "<redacted>")
        assert trail["deep"] == [{"sessionId": "<redacted>"}]

    def test_whatever_the_application_says_can_be_written(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        bad = "a\ud800" * 4000
        context = manager.create_isolated_context("alice", audit_metadata={bad: bad, "nan": float("nan"), "o": b"x"})
        context.callback(int)
        context.closing(Session(), name=bad)
        with managed_user_context(context), manager.privileged(reason=bad, users=["alice"]):
            pass
        manager.record_refusal(InvalidContextError("user_id", bad, bad), bad)
        for record in ledger.records:
            written = json.dumps(dict(record.data), allow_nan=False, ensure_ascii=False)
            assert len(written.encode()) < 10_000
            assert len((record.reason or "").encode()) < 10_000


ELSEWHERE = {"answered", "cluster", "egress", "erased", "outlived"}
"""What strict mode, the guard, the erasing of a user and the census write, which are tested there."""


async def everything(ledger: RecordingLedger) -> None:
    """Each event once, at least."""
    manager = UserContextManager(max_contexts_per_user=1, ledger=ledger)
    context = visitor(manager)
    context.bind("alice")
    bob = manager.create_isolated_context("bob")
    with suppress(ExceptionGroup), managed_user_context(context):
        with pytest.raises(IdentityConflictError):
            context.bind("bob")
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context("alice")
        bob.__dict__["shared"] = context.__dict__["shared"] = SimpleNamespace(rows=[1])
        with manager.privileged(reason="audit", users=EVERYONE):
            assert not manager.validate_isolation()
        with manager.privileged(reason="support", users=["bob"]):
            pass
        async with agent_run(context, "search") as run:
            run.thinking("of what it was asked")
            with run.tool("look_up", "call-1"), pytest.raises(OSError, match="gone"), run.tool("read"):
                raise OSError("gone")
            run.context.record("event_sent")
            run.context.record("transaction")
        context.callback(int)
        context.callback(int, "no number")
    bob.close("expired")
    bob = manager.create_isolated_context("bob")
    bob.refresh("bob")
    bob.close("revoked")


SEQUENCE: list[tuple[Event, str | None]] = [
    ("opened", "a visitor"),
    ("opened", "alice"),
    ("bound", "alice"),
    ("bound", "a visitor"),
    ("opened", "bob"),
    ("denied", "alice"),
    ("refused", "alice"),
    ("privileged", "alice"),
    ("isolation_violated", None),
    ("isolation_violated", "bob"),
    ("isolation_violated", "alice"),
    ("privileged", "alice"),
    ("privileged", "bob"),
    ("child_opened", "alice"),
    ("agent_run", "alice"),
    ("agent_run", "alice"),
    ("agent_run", "alice"),
    ("agent_run", "alice"),
    ("agent_run", "alice"),
    ("agent_run", "alice"),
    ("event_sent", "alice"),
    ("transaction", "alice"),
    ("agent_run", "alice"),
    ("closed", "alice"),
    ("resource_entered", "alice"),
    ("resource_entered", "alice"),
    ("resource_failed", "alice"),
    ("resource_exited", "alice"),
    ("closed", "alice"),
    ("expired", "bob"),
    ("closed", "bob"),
    ("opened", "bob"),
    ("refreshed", "bob"),
    ("revoked", "bob"),
    ("closed", "bob"),
]


class TestPage:
    @pytest.fixture
    def rows(self) -> dict[str, str]:
        text = PAGE.read_text(encoding="utf-8").split("## The events")[1].split("\n## ")[0]
        return dict(re.findall(r"^\| `(\w+)` (\|.*)$", text, re.MULTILINE))

    def test_each_event_is_on_the_page_and_no_other(self, rows: dict[str, str]) -> None:
        assert list(rows) == list(get_args(Event))

    @pytest.mark.ucm_leaks("it is about what is not released, too")
    async def test_each_event_happens_and_has_only_what_the_page_says(
        self, rows: dict[str, str], ledger: RecordingLedger
    ) -> None:
        await everything(ledger)
        found = [(record.event, record.user_id) for record in ledger.records]
        assert [(event, user if user in ("alice", "bob", None) else "a visitor") for event, user in found] == SEQUENCE
        assert {record.event for record in ledger.records} == set(get_args(Event)) - ELSEWHERE
        for record in ledger.records:
            row = rows[record.event]
            for name, _ in record.data:
                assert f"`{name}`" in row, (record.event, name)
            if record.event not in ("event_sent", "transaction"):
                assert f"`{record.outcome}`" in row, record.event
            if record.reason is not None and record.event != "privileged":
                assert f"`{record.reason}`" in row, (record.event, record.reason)

    def test_each_field_is_on_the_page(self) -> None:
        text = PAGE.read_text(encoding="utf-8").split("## The events")[0]
        named = {
            "context": "context_id",
            "request": "request_id",
            "given_thread_id": "thread_id",
            "given_run_id": "run_id",
        }
        for field in AuditRecord._fields:
            assert f"`{named.get(field, field)}`" in text
