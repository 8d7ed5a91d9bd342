"""UserContextMiddleware: what runs in the context, from when until when, and what it leaves alone."""

import asyncio
import contextvars
import gc
import json
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from support.clock import Clock
from support.contexts import MakeManager, events
from ucm_middleware import (
    EVERYONE,
    ConfigurationError,
    ContextClosedError,
    ContextFirewall,
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    Principal,
    UnifiedIDManager,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
    user_context,
)
from ucm_middleware.types import Message, Receive, Scope, Send


class Remembering:
    """An app that keeps the context that it ran in."""

    def __init__(self) -> None:
        self.contexts: list[UserExecutionContext] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current_context()
        assert context.is_open
        assert scope["state"]["user_context"] is context
        assert user_context(HTTPConnection(scope)) is context
        self.contexts.append(context)
        await PlainTextResponse(context.user_id)(scope, receive, send) if scope["type"] == "http" else None


def alice(connection: HTTPConnection) -> str:
    return "alice"


class TestLife:
    async def test_a_child_that_the_app_left_open_closes_with_it(self) -> None:
        children: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            children.append(current_context().create_child_context("search"))
            children[0].callback(children.append, children[0])
            await PlainTextResponse("found")(scope, receive, send)

        await exchange(UserContextMiddleware(app, identify=alice), http_scope())
        assert not children[0].is_open
        assert len(children) == 2, "what the child held was not released"

    async def test_the_app_runs_in_a_context_that_closes_after_it(self) -> None:
        app = Remembering()
        sent = await exchange(UserContextMiddleware(app, identify=alice), http_scope())
        [context] = app.contexts
        assert (context.user_id, context.is_anonymous) == ("alice", False)
        assert status_of(sent) == 200
        with pytest.raises(ContextClosedError, match="opened by an HTTP request"):
            context.agent_context.clear()
        with pytest.raises(ContextNotFoundError):
            current_context()

    async def test_each_request_has_one_of_its_own(self) -> None:
        app = Remembering()
        middleware = UserContextMiddleware(app, identify=alice)
        for scope in (http_scope(), http_scope(), websocket_scope()):
            await exchange(middleware, scope)
        assert len({context.request_id for context in app.contexts}) == 3
        *plain, websocket = app.contexts
        assert [context.websocket_client_id for context in plain] == [None, None]
        assert UnifiedIDManager().validate(websocket.websocket_client_id, "websocket")

    async def test_ids_are_held_to_the_rules_however_often_they_come(self) -> None:
        ids = ["alice", "undefined", "alice", "undefined", "a\x00b", "alice", "a\x00b"]
        coming = iter(ids)
        middleware = UserContextMiddleware(Remembering(), identify=lambda connection: next(coming))
        answers = [status_of(await exchange(middleware, http_scope())) for _ in ids]
        assert answers == [200, 400, 200, 400, 400, 200, 400]

    async def test_a_text_of_another_class_does_not_pass_for_one_that_was_seen(self) -> None:
        class Passing(str):
            __slots__ = ()

            def __hash__(self) -> int:
                return hash("alice")

        coming = iter(["alice", Passing("undefined"), Passing("bob")])
        app = Remembering()
        middleware = UserContextMiddleware(app, identify=lambda connection: next(coming))
        assert [status_of(await exchange(middleware, http_scope())) for _ in range(3)] == [200, 400, 200]
        assert [type(context._user_id) for context in app.contexts] == [str, str]  # pyright: ignore[reportPrivateUsage]

    async def test_a_response_that_a_task_is_about_to_begin_is_not_begun_twice(self) -> None:
        sending: list[asyncio.Future[None]] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            sending.append(asyncio.ensure_future(send({"type": "http.response.start", "status": 200})))
            raise CrossUserAccessError("the table of another user")

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            raise AssertionError("nothing is asked for")

        with pytest.raises(CrossUserAccessError):
            await UserContextMiddleware(app, identify=alice)(http_scope(), receive, send)
        await sending[0]
        assert [message["type"] for message in sent] == ["http.response.start"]

    async def test_a_fault_of_the_resolver_leaves_nothing_to_the_collector(self) -> None:
        class Kept(dict[str, Any]):
            """A scope that can be referred to weakly."""

        def identify(connection: HTTPConnection) -> str:
            raise InvalidContextError("agent_context", "is shared", "copy it")

        middleware = UserContextMiddleware(Remembering(), identify=identify)
        scope = Kept(http_scope())
        gone = weakref.ref(scope)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(InvalidContextError) as caught:
                await exchange(middleware, scope)
            del caught, scope
            assert gone() is None
        finally:
            gc.enable()

    def test_who_comes_while_another_cannot_be_closed_is_not_left_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        manager = UserContextManager(max_contexts=1, clock=clock)
        expired = manager.create_isolated_context("bob", ttl_seconds=1000.0)
        expired.callback(list)
        clock.advance(1000.0)

        def no_thread(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start"):
                asyncio.run(
                    exchange(UserContextMiddleware(Remembering(), manager=manager, identify=alice), http_scope())
                )
        assert "alice" not in {context.user_id for _, context in manager._registry.live()}
        expired.close()

    async def test_the_last_byte_and_the_background_task_are_inside(self) -> None:
        seen: list[str] = []
        left: list[str] = []

        def note(where: str) -> None:
            assert current_context().is_open
            seen.append(where)

        async def stream() -> AsyncIterator[bytes]:
            for part in ("first byte", "last byte"):
                await asyncio.sleep(0)
                note(part)
                yield part.encode()

        async def background() -> None:
            await asyncio.sleep(0)
            note("background task")

        async def handler(request: Request) -> Response:
            current_context().callback(left.extend, seen)
            return StreamingResponse(stream(), background=BackgroundTask(background))

        app = Starlette(routes=[Route("/", handler)], middleware=[Middleware(UserContextMiddleware)])
        assert TestClient(app).get("/").text == "first bytelast byte"
        assert left == ["first byte", "last byte", "background task"]

    async def test_a_websocket_has_one_from_the_handshake_to_the_end(self) -> None:
        seen: list[UserExecutionContext] = []

        async def echo(scope: Scope, receive: Receive, send: Send) -> None:
            while (message := await receive())["type"] != "websocket.disconnect":
                seen.append(current_context())
                if message["type"] == "websocket.connect":
                    await send({"type": "websocket.accept"})
                else:
                    await send({"type": "websocket.send", "text": message["text"]})

        messages: list[Message] = [{"type": "websocket.connect"}]
        messages += [{"type": "websocket.receive", "text": text} for text in "ab"]
        sent = await exchange(
            UserContextMiddleware(echo), websocket_scope(), *messages, {"type": "websocket.disconnect"}
        )
        assert [message.get("text") for message in sent] == [None, "a", "b"]
        assert len(seen) == 3
        assert len(set(seen)) == 1
        assert seen[0].is_open is False

    @pytest.mark.parametrize("error", [LookupError("of the app"), asyncio.CancelledError()], ids=["error", "cancelled"])
    async def test_however_the_app_ends_the_context_does_too(self, error: BaseException) -> None:
        manager = UserContextManager()
        released: list[str] = []

        async def release() -> None:
            await asyncio.sleep(0)
            released.append("it")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().callback(release)
            raise error

        with pytest.raises(type(error)) as caught:
            await exchange(UserContextMiddleware(app, manager=manager, identify=alice), http_scope())
        assert caught.value is error
        assert released == ["it"]
        with manager.privileged(reason="test", users=["alice"]):
            [end] = events(manager, "alice", "closed")
        assert end["reason"] == ("failed" if isinstance(error, LookupError) else "cancelled")

    async def test_a_coroutine_that_the_server_drops_takes_its_context_along(self) -> None:
        opened: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            opened.append(current_context())
            await asyncio.Event().wait()

        serving = exchange(UserContextMiddleware(app), http_scope())
        serving.send(None)
        assert opened[0].is_open
        serving.close()
        assert opened[0].is_open is False

    async def test_a_client_that_leaves_stops_the_handler_where_that_was_asked_for(self) -> None:
        opened: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            opened.append(current_context())
            await asyncio.Event().wait()

        body, gone = {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}
        sent = await exchange(UserContextMiddleware(app, cancel_on_disconnect=True), http_scope(), body, gone)
        assert sent == []
        with pytest.raises(ContextClosedError, match="disconnected"):
            opened[0].agent_context.clear()

        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_elsewhere_nothing_is_read_that_the_app_does_not_ask_for(self) -> None:
        read: list[str] = []

        async def receive() -> Message:
            read.append("something")
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None: ...

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            assert current_context().user_id

        await UserContextMiddleware(app)(http_scope(), receive, send)
        await UserContextMiddleware(app, cancel_on_disconnect=True)(websocket_scope(), receive, send)
        assert read == []

    async def test_whoever_reads_ahead_ends_with_the_request(self) -> None:
        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("nothing was ever set")

        async def send(message: Message) -> None: ...

        await UserContextMiddleware(Remembering(), cancel_on_disconnect=True)(http_scope(), receive, send)
        for _ in range(5):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_what_stops_the_interpreter_goes_through(self) -> None:
        class Stop(BaseException): ...

        app = Remembering()

        async def stop(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, send)
            raise Stop

        with pytest.raises(Stop):
            await exchange(UserContextMiddleware(stop), http_scope())
        assert app.contexts[0].is_open is False

    async def test_a_handler_that_does_not_mind_being_stopped_leaves_no_trace_in_the_servers_task(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            asyncio.get_running_loop().call_soon(current_context().close, "expired")
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await PlainTextResponse("done all the same")(scope, receive, send)

        task = asyncio.current_task()
        assert task is not None
        assert status_of(await exchange(UserContextMiddleware(app), http_scope())) == 200
        assert task.cancelling() == 0

    async def test_an_error_of_a_handler_that_was_stopped_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            asyncio.get_running_loop().call_soon(current_context().close, "expired")
            try:
                await asyncio.Event().wait()
            finally:
                raise LookupError("while it was tidying up")

        assert status_of(await exchange(UserContextMiddleware(app), http_scope())) == 504
        assert "while it was tidying up" in caplog.text

    @pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "10", None, True])
    def test_a_drain_timeout_is_a_number_of_seconds(self, timeout: Any) -> None:
        with pytest.raises(ConfigurationError, match="drain_timeout"):
            UserContextMiddleware(Remembering(), drain_timeout=timeout)

    @pytest.mark.parametrize(
        ("of_the_manager", "of_the_middleware", "of_the_credentials", "expected"),
        [(60, None, None, 60), (600, 60, None, 60), (60, None, 50, 50), (20, None, 50, 20), (None, None, 50, 50)],
    )
    async def test_it_lives_no_longer_than_any_of_them_allows(
        self,
        of_the_manager: float | None,
        of_the_middleware: float | None,
        of_the_credentials: float | None,
        expected: float,
    ) -> None:
        manager = UserContextManager(ttl=of_the_manager)
        lives: list[float] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            lives.extend(shown["expires_in_seconds"] for shown in manager.get_active_contexts().values())

        def identify(connection: HTTPConnection) -> Principal:
            seconds = of_the_credentials
            return Principal("alice", None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds))

        middleware = UserContextMiddleware(app, manager=manager, identify=identify, ttl=of_the_middleware)
        await exchange(middleware, http_scope())
        assert expected - 5 < lives[0] <= expected

    @pytest.mark.parametrize("ttl", [0, -1, float("nan"), "60"])
    def test_a_life_that_makes_no_sense_is_refused_at_the_start(self, ttl: Any) -> None:
        with pytest.raises(ConfigurationError, match="ttl is"):
            UserContextMiddleware(Remembering(), ttl=ttl)


class TestIdentity:
    @pytest.mark.parametrize("found", [None, "alice", Principal("alice")], ids=repr)
    @pytest.mark.parametrize("awaited", [True, False])
    async def test_a_resolver_answers_at_once_or_later(self, found: Principal | str | None, awaited: bool) -> None:
        async def later(connection: HTTPConnection) -> Principal | str | None:
            await asyncio.sleep(0)
            return found

        app = Remembering()
        identify: Callable[[HTTPConnection], Any] = later if awaited else lambda connection: found
        await exchange(UserContextMiddleware(app, identify=identify), http_scope())
        [context] = app.contexts
        assert context.is_anonymous is (found is None)
        assert context.user_id == "alice" or found is None

    async def test_without_one_everybody_is_anonymous_and_a_stranger_to_the_next(self) -> None:
        app = Remembering()
        middleware = UserContextMiddleware(app)
        for _ in range(2):
            await exchange(middleware, http_scope(headers=[("x-user-id", "alice"), ("baggage", "user_id=alice")]))
        first, second = app.contexts
        assert first.is_anonymous
        assert second.is_anonymous
        assert first.user_id != second.user_id

    def test_requiring_an_identity_that_nobody_resolves_is_a_mistake(self) -> None:
        with pytest.raises(ConfigurationError, match="identify"):
            UserContextMiddleware(Remembering(), require_identity=True)

    async def test_the_resolver_sees_the_connection(self) -> None:
        async def by_path(connection: HTTPConnection) -> str:
            return connection.url.path.strip("/")

        app = Remembering()
        await exchange(UserContextMiddleware(app, identify=by_path), http_scope("/bob"))
        assert app.contexts[0].user_id == "bob"

    @pytest.mark.parametrize("detail", ["Pay first", {"code": "pay"}])
    async def test_an_http_exception_of_the_resolver_is_an_answer(self, detail: Any) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise HTTPException(402, detail, {"X-Price": "7"})

        middleware = UserContextMiddleware(Remembering(), identify=refuse)
        sent = await exchange(middleware, http_scope())
        assert status_of(sent) == 402
        assert (b"x-price", b"7") in sent[0]["headers"]
        with middleware.manager.privileged(reason="test", users=EVERYONE):
            [refusal, _] = middleware.manager.get_system_trail()
        assert (refusal["event"], refusal["outcome"]) == ("refused", "denied")
        assert status_of(await exchange(middleware, websocket_scope(extensions=DENIAL))) == 402
        [close] = await exchange(middleware, websocket_scope())
        assert close["code"] == 1008
        assert isinstance(close["reason"], str)

    @pytest.mark.parametrize("detail", ["Pay first", {"code": "pay"}])
    async def test_its_detail_is_said_as_it_is(self, detail: Any) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise HTTPException(402, detail)

        sent = await exchange(UserContextMiddleware(Remembering(), identify=refuse), http_scope())
        assert json.loads(sent[1]["body"]) == {"detail": detail}

    @pytest.mark.parametrize("status", [204, 205, 304])
    async def test_nothing_is_said_with_a_status_that_has_no_body(self, status: int) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise HTTPException(status)

        start, body = await exchange(UserContextMiddleware(Remembering(), identify=refuse), http_scope())
        assert start["status"] == status
        assert b"content-length" not in dict(start["headers"])
        assert body["body"] == b""

    async def test_a_websocket_exception_of_the_resolver_is_an_answer(self) -> None:
        def refuse(connection: HTTPConnection) -> str:
            raise WebSocketException(4001, "pay first")

        middleware = UserContextMiddleware(Remembering(), identify=refuse)
        assert status_of(await exchange(middleware, websocket_scope(extensions=DENIAL))) == 403
        [close] = await exchange(middleware, websocket_scope())
        assert (close["type"], close["code"], close["reason"]) == ("websocket.close", 4001, "pay first")

    def test_a_manager_that_serves_one_trusts_no_code_outside_of_requests(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        manager.create_isolated_context("alice")
        UserContextMiddleware(Remembering(), manager=manager)
        with pytest.raises(CrossUserAccessError):
            manager.create_isolated_context("alice")

    async def test_what_else_a_resolver_raises_is_the_applications(self) -> None:
        def broken(connection: HTTPConnection) -> str:
            raise LookupError("no key server")

        middleware = UserContextMiddleware(Remembering(), identify=broken)
        with pytest.raises(LookupError, match="no key server"):
            await exchange(middleware, http_scope())
        with middleware.manager.privileged(reason="test", users=[]):
            assert middleware.manager.get_active_contexts() == {}

    async def test_a_refusal_is_on_record_and_in_the_log_and_no_alarm(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "ucm_middleware.admission")
        manager = UserContextManager(guard="open")
        middleware = UserContextMiddleware(
            Remembering(), manager=manager, identify=lambda _: None, require_identity=True
        )
        await exchange(middleware, http_scope())
        [record] = manager.get_system_trail()
        assert (record["event"], record["outcome"]) == ("refused", "denied")
        [line] = caplog.records
        assert line.levelno == logging.INFO
        assert "401" in line.getMessage()

    async def test_a_denial_inside_the_app_is_no_alarm_either(self, caplog: pytest.LogCaptureFixture) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise CrossUserAccessError("not yours")

        caplog.set_level(logging.INFO, "ucm_middleware.middleware")
        assert status_of(await exchange(UserContextMiddleware(app), http_scope())) == 403
        [line] = caplog.records
        assert (line.levelno, line.getMessage()) == (logging.INFO, "answered with 403: not yours")


class TestScope:
    async def test_other_kinds_of_scope_pass_through(self) -> None:
        reached: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            reached.append(scope)

        scope: Scope = {"type": "a kind of the future"}
        await exchange(UserContextMiddleware(app), scope, {"type": "x"})
        assert reached == [{"type": "a kind of the future"}]
        assert reached[0] is scope

    async def test_the_servers_state_is_not_written_to(self) -> None:
        state = {"pool": object()}
        app = Remembering()
        await exchange(UserContextMiddleware(app), http_scope(state=state))
        assert list(state) == ["pool"]

    async def test_one_inside_another_with_the_same_manager_does_nothing(self) -> None:
        app = Remembering()
        manager = UserContextManager(max_contexts_per_user=1)
        inner = UserContextMiddleware(app, manager=manager, identify=alice)
        await exchange(UserContextMiddleware(inner, manager=manager, identify=alice), http_scope())
        assert [context.user_id for context in app.contexts] == ["alice"]

    async def test_another_manager_opens_another_and_gives_the_outer_one_back(self) -> None:
        app = Remembering()
        inner = UserContextMiddleware(app, identify=lambda connection: "alice")
        between: list[tuple[UserExecutionContext, ...]] = []

        async def look_around(scope: Scope, receive: Receive, send: Send) -> None:
            for serve in (inner, Remembering()):
                between.append((current_context(), scope["state"]["user_context"], user_context(HTTPConnection(scope))))
                await serve(scope, receive, send)

        await exchange(UserContextMiddleware(look_around, identify=lambda connection: "bob"), http_scope())
        assert [context.user_id for context in app.contexts] == ["alice"]
        before, after = between
        assert before == after
        assert {context.user_id for context in before} == {"bob"}

    async def test_inside_a_firewall_it_enters_no_second_one(self) -> None:
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

        async def set_and_serve(scope: Scope, receive: Receive, send: Send) -> None:
            variable.set("set between the two")
            await UserContextMiddleware(look)(scope, receive, send)

        async def look(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(variable.get("nothing"))

        seen: list[str] = []
        variable.set("set by the server")
        await exchange(ContextFirewall(set_and_serve), http_scope())
        await exchange(UserContextMiddleware(look), http_scope())
        assert seen == ["set between the two", "nothing"]

    async def test_what_is_kept_is_seen(self) -> None:
        kept: contextvars.ContextVar[str] = contextvars.ContextVar("kept")
        kept.set("by an outer middleware")
        seen: list[str] = []

        async def look(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(kept.get("nothing"))

        await exchange(UserContextMiddleware(look, keep=[kept]), http_scope())
        assert seen == ["by an outer middleware"]

    @pytest.mark.parametrize(
        ("every_request", "firewall_outermost", "second"),
        [(False, False, "span of 1"), (True, False, "span of 2"), (False, True, "nothing")],
    )
    async def test_what_is_kept_may_be_an_earlier_requests(
        self, every_request: bool, firewall_outermost: bool, second: str
    ) -> None:
        """Unless it is set in each, or a firewall is around who sets it: what README and docstrings say of ``keep``."""
        kept: contextvars.ContextVar[str] = contextvars.ContextVar("kept", default="nothing")
        seen: list[str] = []

        async def look(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(kept.get())

        inner = UserContextMiddleware(look, keep=[kept])

        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            if every_request or not seen:
                kept.set(f"span of {len(seen) + 1}")
            await inner(scope, receive, send)

        app = ContextFirewall(outer) if firewall_outermost else outer
        for _ in range(2):  # in one Context, as a server runs pipelined requests
            await exchange(app, http_scope())
        assert seen == ["span of 1", second]

    @pytest.mark.parametrize("order", ["above", "below", "both"])
    def test_starlettes_base_middleware_may_stand_above_and_below(self, order: str) -> None:
        class Looking(BaseHTTPMiddleware):
            async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
                before = getattr(request.state, "user_context", None)
                response = await call_next(request)
                assert before is None or request.state.user_context is before
                return response

        async def handler(request: Request) -> Response:
            assert request.state.user_context is current_context()
            return PlainTextResponse(current_context().user_id)

        ours = Middleware(UserContextMiddleware, identify=alice)
        stack = {"above": [Middleware(Looking), ours], "below": [ours, Middleware(Looking)]}
        stack["both"] = [Middleware(Looking), ours, Middleware(Looking)]
        app = Starlette(routes=[Route("/", handler)], middleware=stack[order])
        assert [TestClient(app).get("/").text for _ in range(2)] == ["alice", "alice"]


class TestLifespan:
    """The app's own lifespan runs as ever; open requests end before it hears of the shutdown."""

    async def test_startup_and_shutdown_reach_the_app_in_order(self) -> None:
        log: list[object] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"]["pool"] = "made by the app"
            log.append((await receive())["type"])
            await send({"type": "lifespan.startup.complete"})
            log.append((await receive())["type"])
            log.append(context.is_open)
            await send({"type": "lifespan.shutdown.complete"})

        middleware = UserContextMiddleware(app, drain_timeout=0)
        with middleware.manager.privileged(reason="test", users=["alice"]):
            context = middleware.manager.create_isolated_context("alice")
        scope: Scope = {"type": "lifespan", "state": {}}
        sent = await exchange(middleware, scope, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
        assert log == ["lifespan.startup", "lifespan.shutdown", False]
        assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert scope["state"] == {"pool": "made by the app"}
        assert middleware.manager.is_healthy() is False

    async def test_a_startup_after_a_shutdown_serves_again(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()

        middleware = UserContextMiddleware(app)
        for message, healthy in (("startup", True), ("shutdown", False), ("startup", True)):
            await exchange(middleware, {"type": "lifespan"}, {"type": f"lifespan.{message}"})
            assert middleware.manager.is_healthy() is healthy

    async def test_an_app_without_one_says_so_itself(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert scope["type"] == "http"

        with pytest.raises(AssertionError):
            await exchange(UserContextMiddleware(app), {"type": "lifespan"}, {"type": "lifespan.startup"})

    def test_starlette_runs_its_own(self) -> None:
        log: list[str] = []

        class Lifespan:
            def __init__(self, app: Starlette) -> None: ...

            async def __aenter__(self) -> dict[str, str]:
                log.append("up")
                return {"pool": "shared"}

            async def __aexit__(self, *exc_info: object) -> None:
                log.append("down")

        async def handler(request: Request) -> Response:
            return PlainTextResponse(request.state.pool)

        app = Starlette(routes=[Route("/", handler)], lifespan=Lifespan, middleware=[Middleware(UserContextMiddleware)])
        with TestClient(app) as client:
            assert client.get("/").text == "shared"
        assert log == ["up", "down"]
