"""Spans carry the records of the ledger: each record on one span, below the right one, and no identity but a hash."""

import asyncio
import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry import baggage, trace
from opentelemetry.context import attach, get_current
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from starlette.requests import HTTPConnection

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from support.contexts import MakeManager
from support.tracing import Sdk, about, carried, context_of, installed, written
from ucm_middleware import (
    ContextFirewall,
    ContextLimitError,
    CrossUserAccessError,
    UserContextManager,
    UserContextMiddleware,
    agent_run,
    current_context,
    managed_user_context,
)
from ucm_middleware.audit import AuditRecord, SQLiteLedger
from ucm_middleware.ids import core_text
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

SECRET = "y7J3kq0Zt5vW8xB2nM4pL6sD9fG1hQeR"  # of these tests alone
USER = "alice@example.com"


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    with installed(Sdk()) as sdk:
        yield sdk


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(make_manager: MakeManager, sdk: Sdk, ledger: RecordingLedger) -> UserContextManager:
    return make_manager(ledger=ledger, secret=SECRET)


def identify(connection: HTTPConnection) -> str | None:
    """The user that the header names."""
    return connection.headers.get("x-user")


def request(user: str | None = USER, **more: Any) -> Scope:
    return http_scope(headers=[] if user is None else [("x-user", user)], **more)


Handler = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """A handler that does nothing."""


def serving(manager: UserContextManager, handler: Handler = nothing, **settings: Any) -> UserContextMiddleware:
    """An app around a handler, in the middleware."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return UserContextMiddleware(app, manager=manager, identify=identify, **settings)


def with_current(span: trace.Span, app: ASGIApp) -> ASGIApp:
    """Run an app where this is the current span, and a baggage of the client's."""

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        attach(baggage.set_baggage("enduser.id", "mallory", set_span_in_context(span)))
        await app(scope, receive, send)

    return around


class Server:
    """Stands for the instrumentation of the server, with a span for each request."""

    def __init__(self, sdk: Sdk, app: ASGIApp) -> None:
        self.sdk = sdk
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.sdk.tracer.start_as_current_span("GET", kind=SpanKind.SERVER):
            await self.app(scope, receive, send)


def is_below(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Whether a span is a child of another, in the same trace."""
    return (
        span.parent is not None
        and span.parent.span_id == context_of(parent).span_id
        and context_of(span).trace_id == context_of(parent).trace_id
    )


class TestRecords:
    async def test_a_request_is_one_span_with_the_records_of_its_opening_and_its_end(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        await exchange(serving(manager), request())
        span = sdk.one("ucm context")
        opened, closed = ledger.records
        assert about(span)["ucm.record.id"] == core_text(opened.record_id)
        assert about(span)["ucm.record.closed_id"] == core_text(closed.record_id)
        assert about(span)["ucm.event"] == "opened"
        assert (about(span)["ucm.outcome"], about(span)["ucm.reason"]) == ("ok", "finished")
        assert about(span)["ucm.context.id"] == opened.context_id
        assert about(span)["ucm.request.id"] == opened.request_id
        assert about(span)["ucm.thread.id"] == opened.thread_id
        assert about(span)["ucm.run.id"] == opened.run_id
        assert (span.start_time, span.end_time) == (int(opened.at * 1e9), int(closed.at * 1e9))
        assert not span.events

    async def test_every_record_is_on_one_span_and_every_span_has_a_record(
        self, sdk: Sdk, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        manager = make_manager(ledger=ledger, secret=SECRET, max_contexts_per_user=2)
        manager.serve()

        async def handler() -> None:
            context = current_context()
            if context.is_anonymous:
                context.bind("carol")
            with suppress(CrossUserAccessError):
                manager.get_context("bob")
            context.create_child_context("search").close()
            async with agent_run(context, "planner"):
                pass
            manager.set_context(context.user_id, context)  # under another key: a record more
            manager.create_isolated_context(context.user_id)
            with pytest.raises(ContextLimitError):
                manager.create_isolated_context(context.user_id)
            with manager.privileged(reason="audit", users=["bob", USER]):
                manager.clear_context("bob")

        app = Server(sdk, serving(manager, handler, require_identity=False))
        strict = Server(sdk, serving(manager, require_identity=True))
        for user in (USER, None):
            assert status_of(await exchange(app, request(user))) == 200
        assert status_of(await exchange(strict, request(None))) == 401
        assert status_of(await exchange(app, request("mallory\x07"))) == 400
        for _, context in manager._registry.live():
            context.close("expired")
        kinds = {record.event for record in ledger.records}
        assert {"opened", "closed", "child_opened", "bound", "denied", "refused", "privileged"} <= kinds
        assert written(ledger.records) == carried(sdk.spans)
        assert all(record.trace_id and record.span_id for record in ledger.records)
        of_ours = [span for span in sdk.spans if span.name != "GET"]
        assert all("ucm.record.id" in about(span) for span in of_ours)
        assert {span.kind for span in of_ours} == {SpanKind.INTERNAL}

    async def test_the_records_of_a_file_have_the_ids_of_their_spans(
        self, sdk: Sdk, make_manager: MakeManager, tmp_path: Path
    ) -> None:
        ledger = SQLiteLedger(tmp_path / "audit.db", keys=tmp_path / "keys.db")
        manager = make_manager(ledger=ledger, secret=SECRET, audit="strict")
        await exchange(serving(manager), request())
        trail = ledger.trail(USER)
        assert trail is not None
        assert [record.event for record in trail.records] == ["opened", "answered", "closed"]
        assert written(trail.records) == carried(sdk.spans)

    async def test_what_happens_in_a_context_is_a_span_of_no_length_below_its_own(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def handler() -> None:
            with suppress(CrossUserAccessError):
                manager.get_context("bob")

        await exchange(serving(manager, handler), request())
        denied = sdk.one("ucm denied")
        assert is_below(denied, sdk.one("ucm context"))
        assert denied.start_time == denied.end_time
        assert about(denied)["ucm.outcome"] == "denied"
        assert "bob" not in str(dict(about(denied)))

    def test_a_transaction_is_a_span_as_long(self, sdk: Sdk, manager: UserContextManager) -> None:
        context = manager.create_isolated_context(USER)
        spans = manager.telemetry.spans
        assert spans is not None
        spans.carry(AuditRecord("transaction", 1000.0, USER, context=context._core, seconds=0.5))
        spans.carry(AuditRecord("expired", 1000.0, USER, context=context._core, seconds=0.5))
        context.close()
        span = sdk.one("ucm transaction")
        assert (span.start_time, span.end_time) == (999_500_000_000, 1_000_000_000_000)
        assert is_below(span, sdk.one("ucm context"))
        assert sdk.one("ucm expired").start_time == sdk.one("ucm expired").end_time  # the context's life has its own

    async def test_an_agent_run_and_a_child_are_spans_below_their_context(
        self, sdk: Sdk, manager: UserContextManager
    ) -> None:
        async def handler() -> None:
            async with agent_run(current_context(), "planner") as run:
                with sdk.tracer.start_as_current_span("chat"):
                    async with managed_user_context(run.context.create_child_context("look up")):
                        pass
            with sdk.tracer.start_as_current_span("after"):
                pass

        await exchange(serving(manager, handler), request())
        run, child, context = sdk.one("invoke_agent planner"), sdk.one("ucm child"), sdk.one("ucm context")
        assert is_below(run, context)
        assert about(run)["gen_ai.operation.name"] == "invoke_agent"
        assert about(run)["gen_ai.agent.name"] == "planner"
        assert about(run)["gen_ai.conversation.id"] == about(context)["ucm.thread.id"]
        assert is_below(sdk.one("chat"), run)
        assert is_below(child, sdk.one("chat"))
        assert about(child)["ucm.operation"] == "look up"
        assert is_below(sdk.one("after"), context)

    async def test_a_child_opened_where_nothing_is_current_is_below_its_parent(
        self, sdk: Sdk, manager: UserContextManager
    ) -> None:
        parent = manager.create_isolated_context(USER)
        parent.create_child_context("search").close()
        parent.close()
        assert is_below(sdk.one("ucm child"), sdk.one("ucm context"))

    @pytest.mark.security
    def test_what_happens_in_another_s_context_is_below_that_one(self, sdk: Sdk, manager: UserContextManager) -> None:
        bobs = manager.create_isolated_context("bob")
        with (
            managed_user_context(manager.create_isolated_context(USER)),
            manager.privileged(reason="support", users=["bob"]),
        ):
            bobs.create_child_context("search").close()
            bobs.close()
        alices, of_bob = sorted(sdk.named("ucm context"), key=lambda span: span.start_time or 0, reverse=True)
        assert is_below(sdk.one("ucm child"), of_bob)
        assert all(is_below(span, alices) for span in sdk.named("ucm privileged"))

    async def test_a_failure_is_an_error(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def handler() -> None:
            raise ValueError("the secret of alice")

        with pytest.raises(ValueError, match="the secret"):
            await exchange(serving(manager, handler), request())
        span = sdk.one("ucm context")
        assert span.status.status_code is trace.StatusCode.ERROR
        assert about(span)["ucm.reason"] == "failed"
        assert "secret" not in span.to_json()

    async def test_a_refusal_says_why_in_a_word(self, sdk: Sdk, manager: UserContextManager) -> None:
        app = Server(sdk, serving(manager, require_identity=True))
        await exchange(app, request(None))
        refused = sdk.one("ucm refused")
        assert about(refused)["ucm.reason"] == "unauthenticated"
        assert "required" not in refused.to_json()
        assert is_below(refused, sdk.one("GET"))

    async def test_texts_and_data_of_the_application_stay_out(self, sdk: Sdk, manager: UserContextManager) -> None:
        context = manager.create_isolated_context(USER, audit_metadata={"ward": "oncology"})
        with managed_user_context(context), manager.privileged(reason="bob called about oncology", users=["bob"]):
            context.audit_metadata["more"] = "oncology"
        assert len(sdk.spans) == 2
        for span in sdk.spans:
            assert "oncology" not in span.to_json()
            assert "bob" not in span.to_json()


class TestIdentity:
    async def test_it_is_a_pseudonym_and_never_the_user(
        self, sdk: Sdk, manager: UserContextManager, make_manager: MakeManager
    ) -> None:
        await exchange(serving(manager), request())
        await exchange(serving(make_manager(secret=SECRET)), request())
        await exchange(serving(manager), request("bob"))
        await exchange(serving(make_manager(secret=SECRET[::-1])), request())
        again, alike, bobs, others = (about(span)["enduser.pseudo.id"] for span in sdk.named("ucm context"))
        assert again == alike
        assert len({again, bobs, others}) == 3
        assert again.rpartition("_")[2] != others.rpartition("_")[2]
        assert again.startswith("ucmp1_")
        assert len(again) == 55
        assert all(USER not in span.to_json() for span in sdk.spans)

    async def test_an_anonymous_visitor_has_none_until_bound(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def handler() -> None:
            current_context().bind(USER)

        await exchange(serving(manager), request(None))
        assert "enduser.pseudo.id" not in about(sdk.one("ucm context"))
        await exchange(serving(manager, handler), request(None))
        assert "enduser.pseudo.id" in about(sdk.named("ucm context")[1])

    async def test_who_acts_on_another_is_who_did_it(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        manager.create_isolated_context("bob").close()
        with (
            managed_user_context(manager.create_isolated_context(USER)),
            manager.privileged(reason="support", users=["bob"]),
        ):
            pass
        bobs, alices = (about(span)["enduser.pseudo.id"] for span in sdk.named("ucm context"))
        [of_bob] = ledger.select("privileged", user="bob")
        [span] = [span for span in sdk.named("ucm privileged") if context_of(span).span_id == of_bob.span_id]
        assert about(span)["enduser.pseudo.id"] == alices
        assert about(span)["ucm.subject.pseudo.id"] == bobs

    async def test_it_survives_whatever_the_application_sets(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def handler() -> None:
            span = trace.get_current_span()
            for number in range(200):
                span.set_attribute(f"app.{number}", number)
            span.set_attribute("enduser.pseudo.id", "mallory")

        await exchange(serving(manager), request())
        await exchange(serving(manager, handler), request())
        plain, full = (about(span) for span in sdk.named("ucm context"))
        assert len(full) == 128
        assert full["enduser.pseudo.id"] == plain["enduser.pseudo.id"]
        assert set(plain) <= set(full)

    async def test_it_is_never_in_the_baggage(self, sdk: Sdk, manager: UserContextManager) -> None:
        seen: list[object] = []

        async def handler() -> None:
            seen.append(dict(baggage.get_all()))
            async with agent_run(current_context(), "planner"):
                seen.append(dict(baggage.get_all()))

        app = serving(manager, handler)
        server = sdk.tracer.start_span("GET", kind=SpanKind.SERVER)
        await exchange(with_current(server, app), request())
        await exchange(ContextFirewall(with_current(server, app)), request())
        assert seen == [{}] * 4

    def test_without_a_secret_in_production_it_is_told_and_served(
        self, sdk: Sdk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make_manager: MakeManager
    ) -> None:
        monkeypatch.delenv("UCM_ENVIRONMENT")
        make_manager().create_isolated_context(USER).close()
        assert about(sdk.one("ucm context"))["enduser.pseudo.id"].startswith("ucmp1_")
        [told] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert "UCM_SECRET is not set" in told


class TestParent:
    async def test_it_is_the_server_s_span(self, sdk: Sdk, manager: UserContextManager) -> None:
        await exchange(Server(sdk, serving(manager)), request())
        assert is_below(sdk.one("ucm context"), sdk.one("GET"))
        assert sdk.one("ucm context").kind is SpanKind.INTERNAL

    async def test_it_is_the_server_s_span_outside_of_a_firewall_or_within(
        self, sdk: Sdk, manager: UserContextManager
    ) -> None:
        await exchange(Server(sdk, ContextFirewall(serving(manager))), request())
        await exchange(ContextFirewall(Server(sdk, serving(manager))), request())
        for context, server in zip(sdk.named("ucm context"), sdk.named("GET"), strict=True):
            assert is_below(context, server)

    async def test_it_is_fastapi_s_own(self, sdk: Sdk, manager: UserContextManager) -> None:
        app = FastAPI()
        app.add_middleware(UserContextMiddleware, manager=manager, identify=identify)
        await exchange(app, request(server=("127.0.0.1", 80), scheme="http", http_version="1.1"))
        [server] = [span for span in sdk.spans if span.kind is SpanKind.SERVER]
        assert is_below(sdk.one("ucm context"), server)

    async def test_what_the_resolver_does_is_below_it_too(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def resolver(connection: HTTPConnection) -> str:
            with sdk.tracer.start_as_current_span("look up the session"):
                await asyncio.sleep(0)
            return USER

        app = serving(manager)
        app.identify = resolver
        await exchange(Server(sdk, app), request())
        assert is_below(sdk.one("look up the session"), sdk.one("GET"))
        assert is_below(sdk.one("ucm context"), sdk.one("GET"))

    @pytest.mark.security
    async def test_a_span_that_another_request_left_behind_is_none(self, sdk: Sdk, manager: UserContextManager) -> None:
        left_open = sdk.tracer.start_span("of another request")
        await exchange(with_current(left_open, serving(manager)), request())
        ended = sdk.tracer.start_span("GET", kind=SpanKind.SERVER)
        ended.end()
        await exchange(with_current(ended, serving(manager)), request())
        assert [span.parent for span in sdk.named("ucm context")] == [None, None]

    async def test_a_caller_that_is_not_sampled_is(self, sdk: Sdk, manager: UserContextManager) -> None:
        remote = NonRecordingSpan(SpanContext(1 << 100, 1 << 50, is_remote=True, trace_flags=TraceFlags(0)))
        current: list[SpanContext] = []

        async def handler() -> None:
            current.append(trace.get_current_span().get_span_context())

        await exchange(with_current(remote, serving(manager, handler)), request())
        assert current[0].trace_id == 1 << 100

    async def test_the_application_s_spans_are_below_the_context_s(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def handler() -> None:
            with sdk.tracer.start_as_current_span("query"):
                await asyncio.create_task(deeper())

        async def deeper() -> None:
            with sdk.tracer.start_as_current_span("fetch"):
                pass

        await exchange(Server(sdk, serving(manager, handler)), request())
        assert is_below(sdk.one("query"), sdk.one("ucm context"))
        assert is_below(sdk.one("fetch"), sdk.one("query"))

    def test_a_block_gives_back_what_was_current(self, sdk: Sdk, manager: UserContextManager) -> None:
        before = get_current()
        with managed_user_context(manager.create_isolated_context(USER)):
            assert get_current() is not before
        assert get_current() is before


class TestWebSockets:
    @staticmethod
    def chat(manager: UserContextManager, *, accept: bool = True) -> UserContextMiddleware:
        """An app that looks for bob's context with each message."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            if not accept:
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                with trace.get_tracer("app").start_as_current_span("answer"), suppress(CrossUserAccessError):
                    manager.get_context("bob")

        return UserContextMiddleware(app, manager=manager, identify=identify)

    @staticmethod
    def messages(*texts: str) -> list[Message]:
        received = [{"type": "websocket.receive", "text": text} for text in texts]
        return [{"type": "websocket.connect"}, *received, {"type": "websocket.disconnect", "code": 1000}]

    async def test_the_connection_ends_at_accept_and_each_message_is_a_trace(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        scope = websocket_scope(headers=[("x-user", USER)])
        await exchange(Server(sdk, self.chat(manager)), scope, *self.messages("one", "two"))
        connection, close = sdk.one("ucm connection"), sdk.one("ucm close")
        first, second = sdk.named("ucm message")
        assert is_below(connection, sdk.one("GET"))
        for span in (first, second, close):
            assert span.parent is None
            assert [link.context.span_id for link in span.links] == [context_of(connection).span_id]
        assert first.kind is SpanKind.CONSUMER
        assert is_below(sdk.named("answer")[0], first)
        assert is_below(sdk.named("ucm denied")[1], sdk.named("answer")[1])
        ended = [span.end_time for span in (connection, first, second, close)]
        assert ended == sorted(ended, key=lambda time: time or 0)
        assert (connection.end_time or 0) <= (first.start_time or 0)
        assert written(ledger.records) == carried(sdk.spans)
        assert about(close)["ucm.event"] == "closed"
        assert len({about(span)["enduser.pseudo.id"] for span in (connection, first, second, close)}) == 1
        assert "ucm.record.id" not in about(first)

    async def test_what_the_server_pushes_is_a_trace_of_its_own_linked_to_the_connection(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        is_asked = asyncio.Event()

        async def push_when_asked() -> None:
            await is_asked.wait()
            current_context().record("event_sent", data={"during": "a message"})
            with sdk.tracer.start_as_current_span("tick"):
                current_context().record("transaction")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            context = current_context()
            await receive()
            context.record("transaction", data={"before": "the answer"})
            await send({"type": "websocket.accept"})
            context.record("event_sent", data={"before": "any message"})
            async with agent_run(context, "planner"):
                pass
            pushing = asyncio.create_task(push_when_asked())
            await receive()
            context.record("event_sent", data={"because of": "a message"})
            is_asked.set()
            await pushing
            await receive()
            context.record("event_sent", data={"after": "the last message"})

        middleware = UserContextMiddleware(app, manager=manager, identify=identify)
        await exchange(middleware, websocket_scope(headers=[("x-user", USER)]), *self.messages("one"))
        connection, message, run = sdk.one("ucm connection"), sdk.one("ucm message"), sdk.one("invoke_agent planner")
        by_id = {core_text(record.record_id): record.data for record in ledger.select("event_sent")}
        sent = {by_id[about(span)["ucm.record.id"]][0][0]: span for span in sdk.named("ucm event_sent")}
        before, in_tick = sdk.named("ucm transaction")
        assert is_below(before, connection)
        assert is_below(sent.pop("because of"), message)
        assert is_below(in_tick, sdk.one("tick"))
        pushed = *sent.values(), run
        assert len(pushed) == 4
        assert [span.parent for span in pushed] == [None] * 4
        assert all([link.context for link in span.links] == [connection.context] for span in pushed)
        assert len({context_of(span).trace_id for span in (connection, message, *pushed)}) == 6
        assert all(is_below(span, run) for span in sdk.named("ucm agent_run"))
        assert written(ledger.records) == carried(sdk.spans)

    async def test_who_logs_in_on_a_connection_is_on_its_messages(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                current_context().bind(USER)

        middleware = UserContextMiddleware(app, manager=manager)
        await exchange(middleware, websocket_scope(), *self.messages("login", "hello"))
        login, hello = (about(span).get("enduser.pseudo.id") for span in sdk.named("ucm message"))
        assert login is None
        assert hello is not None
        assert hello == about(sdk.one("ucm close"))["enduser.pseudo.id"]

    @pytest.mark.parametrize("extensions", [{}, DENIAL], ids=["close", "denial"])
    async def test_a_refused_connection_has_ended(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger, extensions: dict[str, Any]
    ) -> None:
        scope = websocket_scope(headers=[("x-user", USER)], extensions=extensions)
        await exchange(self.chat(manager, accept=False), scope, {"type": "websocket.connect"})
        assert about(sdk.one("ucm connection"))["ucm.record.id"] == core_text(ledger.records[0].record_id)
        assert written(ledger.records) == carried(sdk.spans)

    async def test_a_message_ends_with_its_connection(self, sdk: Sdk, manager: UserContextManager) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            raise ValueError("the app fails while it handles the message")

        middleware = UserContextMiddleware(app, manager=manager, identify=identify)
        with pytest.raises(ValueError, match="the app fails"):
            await exchange(middleware, websocket_scope(headers=[("x-user", USER)]), *self.messages("one"))
        assert sdk.one("ucm message").end_time
        assert sdk.one("ucm close").status.status_code is trace.StatusCode.ERROR


class Broken(SpanProcessor):
    """Fails whatever it is asked; not for the application's own span, which is not guarded."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if span.name != "answer":
            raise RuntimeError("the processor fails at the start")

    def on_end(self, span: ReadableSpan) -> None:
        if span.name != "answer":
            raise RuntimeError("the processor fails at the end")


class BrokenAtTheEnd(Broken):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        pass


class TestFaults:
    @pytest.mark.parametrize("processor", [Broken(), BrokenAtTheEnd()], ids=["start", "end"])
    async def test_a_processor_that_raises_breaks_no_request_and_is_logged_once(
        self,
        sdk: Sdk,
        manager: UserContextManager,
        ledger: RecordingLedger,
        processor: SpanProcessor,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        sdk.add(processor)

        async def handler() -> None:
            async with agent_run(current_context(), "planner"):
                pass

        for _ in range(3):
            assert status_of(await exchange(serving(manager, handler), request())) == 200
        scope = websocket_scope(headers=[("x-user", USER)])
        await exchange(TestWebSockets.chat(manager), scope, *TestWebSockets.messages("one"))
        assert [record.event for record in ledger.records].count("closed") == 7
        told = [record for record in caplog.records if record.name.startswith("ucm_middleware")]
        assert [record.levelname for record in told] == ["ERROR"]

    async def test_nothing_is_left_of_a_context(self, sdk: Sdk, manager: UserContextManager) -> None:
        app = Server(sdk, serving(manager))
        spans = manager.telemetry.spans
        assert spans is not None
        seen: list[weakref.ref[Any]] = []

        async def handler() -> None:
            seen.append(weakref.ref(trace.get_current_span()))
            seen.append(weakref.ref(current_context()))

        app.app = serving(manager, handler)
        await exchange(app, request())
        seen.clear()
        gc.collect()
        gc.disable()
        try:
            await exchange(app, request())
            assert [reference() for reference in seen] == [None, None]
        finally:
            gc.enable()
        assert not spans._open

    def test_a_forked_child_has_spans_of_its_own(self) -> None:
        script = """
import os, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from ucm_middleware import UserContextManager
from ucm_middleware.testing import RecordingLedger
ledger = RecordingLedger()
manager = UserContextManager(ledger=ledger)
context = manager.create_isolated_context("alice")
child = os.fork()
if child == 0:
    context.close()
    manager.create_isolated_context("bob").close()
    spans = [record.span_id for record in ledger.records]
    assert len(spans) == 3 and spans[1] == spans[2] not in (0, spans[0]), spans  # the context is the parent's
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
context.close()
assert ledger.records[0].span_id == ledger.records[1].span_id != 0
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


class TestWhetherItIsOn:
    async def test_without_an_sdk_records_have_no_span(self, make_manager: MakeManager) -> None:
        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)
        await exchange(serving(manager), request())
        assert manager.telemetry.spans is None
        assert manager.telemetry.metrics is None
        assert [(record.trace_id, record.span_id) for record in ledger.records] == [(0, 0), (0, 0)]

    async def test_without_an_sdk_a_request_looks_twice_and_a_record_not_at_all(
        self, make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[str] = []

        class Watched:
            def __getattr__(self, name: str) -> None:
                looks.append(name)

        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)
        app, chat = serving(manager), TestWebSockets.chat(manager)
        await exchange(app, request())
        monkeypatch.setattr(manager, "telemetry", Watched())
        await exchange(app, request())
        assert looks == ["spans"] * 2  # as many as benchmarks/tracing.py times
        looks.clear()
        await exchange(chat, websocket_scope(headers=[("x-user", USER)]), *TestWebSockets.messages("one", "two"))
        assert looks == ["spans"] * 2
        assert manager._trail._append == ledger.append

    async def test_it_can_be_switched_off(self, sdk: Sdk, make_manager: MakeManager) -> None:
        await exchange(serving(make_manager(telemetry=False)), request())
        assert sdk.spans == ()
        assert sdk.metric("ucm.context.opened") == 0

    async def test_a_disabled_sdk_is_none(self, monkeypatch: pytest.MonkeyPatch, make_manager: MakeManager) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        with installed(Sdk()):
            manager = make_manager()
            await exchange(serving(manager), request())
            assert (manager.telemetry.spans, manager.telemetry.metrics) == (None, None)

    async def test_a_provider_that_does_nothing_is_none(
        self, monkeypatch: pytest.MonkeyPatch, make_manager: MakeManager
    ) -> None:
        monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", trace.NoOpTracerProvider())
        manager = make_manager()
        await exchange(serving(manager), request())
        assert manager.telemetry.spans is None

    async def test_an_sdk_that_is_set_up_in_the_lifespan_is_found(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        sdk = Sdk()
        with pytest.MonkeyPatch.context() as patch:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await receive()
                patch.setattr("opentelemetry.trace._TRACER_PROVIDER", sdk.provider)
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})

            middleware = UserContextMiddleware(app, manager=manager)
            startup: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
            await exchange(middleware, {"type": "lifespan"}, *startup)
            assert manager.telemetry.spans is not None
        sdk.provider.shutdown()

    def test_an_sdk_that_is_set_up_before_the_first_record_is_found(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        with installed(Sdk()) as sdk:
            manager.create_isolated_context(USER).close()
            assert len(sdk.spans) == 1

    def test_a_context_of_before_ends_in_a_span_of_its_own(self, make_manager: MakeManager) -> None:
        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)
        context = manager.create_isolated_context(USER)
        with installed(Sdk()) as sdk:
            manager.serve()
            context.close()
            assert written(ledger.records[1:]) == carried([sdk.one("ucm closed")])

    def test_opentelemetry_is_imported_only_where_the_application_does(self) -> None:
        script = """
import asyncio, sys
from ucm_middleware import UserContextManager, UserContextMiddleware
async def app(scope, receive, send): ...
async def main():
    await UserContextMiddleware(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, None)
asyncio.run(main())
UserContextManager().create_isolated_context("alice").close()
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True, env=environment
        )
        assert done.stdout.strip() == "[]"


class TestMetrics:
    async def test_contexts_are_counted(self, sdk: Sdk, make_manager: MakeManager) -> None:
        manager = make_manager(max_contexts_per_user=1, secret=SECRET)
        manager.create_isolated_context(USER).close()
        context = manager.create_isolated_context(USER)
        manager.set_context(USER, context)
        assert sdk.metric("ucm.context.live") == 1
        with pytest.raises(ContextLimitError):
            manager.create_isolated_context(USER)
        await exchange(serving(manager, require_identity=True), request(None))
        context.close("expired")
        assert sdk.metric("ucm.context.live") == 0
        assert sdk.metric("ucm.context.opened") == 2
        assert sdk.metric("ucm.context.expired") == 1
        assert sdk.metric("ucm.context.refused") == 2
        assert sdk.metric("ucm.context.refused", ucm_reason="limit") == 1
        assert sdk.metric("ucm.context.refused", ucm_reason="unauthenticated") == 1

    def test_each_refusal_of_a_flood_is_counted(self, sdk: Sdk, make_manager: MakeManager) -> None:
        ledger = RecordingLedger()
        manager = make_manager(max_contexts_per_user=1, ledger=ledger)
        manager.create_isolated_context(USER)
        for _ in range(200):
            with pytest.raises(ContextLimitError):
                manager.create_isolated_context(USER)
        manager._trail.tell_counted()
        assert len(ledger.select("refused")) < 200
        assert sdk.metric("ucm.context.refused") == 200

    def test_teardowns_are_timed(self, sdk: Sdk, manager: UserContextManager) -> None:
        class Session:
            def close(self) -> None: ...

        manager.create_isolated_context(USER, db_session=Session()).close()
        assert sdk.metric("ucm.context.teardown.duration", ucm_outcome="ok") == 1

    def test_the_lag_of_a_ledger_is_seen(self, sdk: Sdk, make_manager: MakeManager) -> None:
        class Slow(RecordingLedger):
            lag = 7
            problem = None
            has_room = True

            def start(self, secrets: object) -> None: ...
            async def durable(self) -> None: ...
            def flush(self, timeout: float) -> None: ...

        manager = make_manager(ledger=Slow())
        manager.create_isolated_context(USER).close()
        assert sdk.metric("ucm.ledger.lag") == 7

    async def test_records_whose_span_goes_nowhere_are_counted(self, make_manager: MakeManager) -> None:
        ledger = RecordingLedger()
        with installed(Sdk(sampler=ParentBased(TraceIdRatioBased(0.01)))) as sdk:
            manager = make_manager(ledger=ledger, secret=SECRET)
            app = serving(manager)
            for _ in range(200):
                await exchange(app, request())
            exported = carried(sdk.spans)
            assert len(ledger.records) == 400
            assert set(exported) <= set(written(ledger.records))
            assert sdk.metric("ucm.record.unexported") == 400 - len(exported)

    async def test_a_caller_that_is_not_sampled_loses_no_record_and_is_counted(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        remote = NonRecordingSpan(SpanContext(1 << 100, 1 << 50, is_remote=True, trace_flags=TraceFlags(0)))

        async def handler() -> None:
            with suppress(CrossUserAccessError):
                manager.get_context("bob")

        await exchange(with_current(remote, serving(manager, handler)), request())
        assert [record.event for record in ledger.records] == ["opened", "denied", "closed"]
        assert [record.trace_id for record in ledger.records] == [1 << 100] * 3
        assert sdk.spans == ()
        assert sdk.metric("ucm.record.unexported") == 3
        assert sdk.metric("ucm.record.unexported", ucm_event="denied") == 1

    async def test_without_a_tracer_provider_no_record_has_an_exported_span(self, make_manager: MakeManager) -> None:
        with installed(Sdk()) as sdk, pytest.MonkeyPatch.context() as patch:  # undone before what it lies on
            patch.setattr("opentelemetry.trace._TRACER_PROVIDER", trace.NoOpTracerProvider())
            await exchange(serving(make_manager()), request())
            assert sdk.metric("ucm.record.unexported") == 2
            assert sdk.metric("ucm.record.unexported", ucm_event="closed") == 1

    @pytest.mark.parametrize("processor", [Broken(), BrokenAtTheEnd()], ids=["start", "end"])
    async def test_what_the_sdk_fails_at_is_counted(
        self, sdk: Sdk, manager: UserContextManager, ledger: RecordingLedger, processor: SpanProcessor
    ) -> None:
        sdk.add(processor)

        async def handler() -> None:
            with suppress(CrossUserAccessError):
                manager.get_context("bob")

        await exchange(serving(manager, handler), request())
        scope = websocket_scope(headers=[("x-user", USER)])
        await exchange(TestWebSockets.chat(manager), scope, *TestWebSockets.messages("one"))
        await exchange(TestWebSockets.chat(manager, accept=False), scope, {"type": "websocket.connect"})
        events = [record.event for record in ledger.records]
        assert events == ["opened", "denied", "closed"] * 2 + ["opened", "closed"]
        assert sdk.metric("ucm.record.unexported") == len(events)
        assert sdk.metric("ucm.record.unexported", ucm_event="opened") == 3
        assert sdk.metric("ucm.record.unexported", ucm_event="closed") == 3

    def test_a_failure_in_the_middle_is_counted(
        self, sdk: Sdk, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = manager.create_isolated_context(USER)

        def fail(span: object) -> bool:
            raise RuntimeError("the span fails")

        with monkeypatch.context() as patch:
            patch.setattr("opentelemetry.sdk.trace.Span.get_span_context", fail)
            context.record("event_sent")
        context.close()
        assert sdk.metric("ucm.record.unexported") == 1
        assert sdk.metric("ucm.record.unexported", ucm_event="event_sent") == 1

    def test_a_span_that_an_exporter_gets_is_not_counted(self, sdk: Sdk, manager: UserContextManager) -> None:
        context = manager.create_isolated_context(USER)
        context.record("event_sent")
        context.close()
        assert len(carried(sdk.spans)) == 3
        assert sdk.metric("ucm.record.unexported") == 0

    def test_a_manager_is_not_kept_by_what_is_observed(self, sdk: Sdk) -> None:
        manager = UserContextManager()
        manager.serve()
        gone = weakref.ref(manager)
        del manager
        gc.collect()
        assert gone() is None
        assert sdk.metric("ucm.context.live") == 0
