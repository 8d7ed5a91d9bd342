"""What a plugin can do to a manager, a middleware and a context, and what its faults may not do."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import Context, ContextVar
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from support.asgi import exchange, http_scope, status_of, websocket_scope
from support.clock import Clock
from support.contexts import MakeManager, events, running_as, visitor
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    IsolatedEnvironment,
    PluginError,
    Principal,
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    agent_run,
    create_isolated_execution_context,
    current_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.refusal import refusal_for
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

Journal = list[Any]

variable: ContextVar[str] = ContextVar("variable", default="unset")


@pytest.fixture
def journal() -> Journal:
    return []


class Base:
    """A plugin that writes down what happens."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    @asynccontextmanager
    async def around(self, *what: object) -> AsyncIterator[None]:
        """Notes its entering and leaving, and sets a ContextVar in between."""
        self.journal.append(("enter", *what))
        await asyncio.sleep(0)
        variable.set(str(what[0]))
        try:
            yield
        except BaseException as error:
            self.journal.append((type(error).__name__, *what))
            raise
        finally:
            variable.set("unset")
            await asyncio.sleep(0)
            self.journal.append(("leave", *what))


class Contexts(Base):
    @hookimpl
    def ucm_around_context(self, context: UserExecutionContext) -> AbstractAsyncContextManager[None]:
        return self.around("context", context.user_id)


class Messages(Base):
    @hookimpl
    def ucm_around_message(
        self, context: UserExecutionContext, message: Message
    ) -> AbstractAsyncContextManager[None] | None:
        return None if message.get("text") == "plain" else self.around("message", message.get("text"))


class Resources(Base):
    @hookimpl
    def ucm_around_resource(self, name: str) -> AbstractAsyncContextManager[None] | None:
        return None if name == "plain" else self.around("around", name)


class AgentRuns(Base):
    @hookimpl
    def ucm_around_agent_run(
        self, context: UserExecutionContext, agent_name: str, parameters: dict[str, Any]
    ) -> AbstractAsyncContextManager[None]:
        return self.around("run", context.user_id, agent_name, dict(parameters))


class Sessions(Base):
    @hookimpl
    def ucm_bind_session(self, context: UserExecutionContext, session: Any) -> None:
        if session == "bad":
            raise PermissionError("not this one")
        self.journal.append(("bind", context.user_id, session))


class Told(Base):
    @hookimpl
    def ucm_context_opened(self, context: UserExecutionContext) -> None:
        self.journal.append(("opened", context.user_id))

    @hookimpl
    def ucm_context_bound(self, context: UserExecutionContext, anonymous_id: str) -> None:
        self.journal.append(("bound", context.user_id, anonymous_id))

    @hookimpl
    def ucm_context_closed(self, context: UserExecutionContext, reason: str) -> None:
        self.journal.append(("closed", context.user_id, reason))

    @hookimpl
    def ucm_access_denied(self, user_id: str | None, action: str) -> None:
        self.journal.append(("denied", user_id, action))


class Identifies:
    """Knows whoever says who they are."""

    @hookimpl
    async def ucm_identify(self, connection: HTTPConnection) -> Principal | None:
        await asyncio.sleep(0)
        user = connection.headers.get("i-am")
        if user == "mallory":
            raise UnauthenticatedError("no")
        return None if user is None else Principal(user)


def alice(connection: HTTPConnection) -> str:
    return "alice"


def noting(journal: Journal, what: Callable[[], object] = lambda: current_context().user_id) -> ASGIApp:
    """An app that notes something, and answers 200."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal.append(("app", what()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


class TestIdentify:
    async def served(self, journal: Journal, identify: Any, *headers: tuple[str, str]) -> int:
        manager = UserContextManager(plugins=[Identifies()])
        return status_of(
            await exchange(
                UserContextMiddleware(noting(journal), manager=manager, identify=identify), http_scope(headers=headers)
            )
        )

    @pytest.mark.parametrize("identify", [None, lambda connection: None])
    async def test_a_plugin_is_asked_when_the_app_does_not_know(self, journal: Journal, identify: Any) -> None:
        assert await self.served(journal, identify, ("i-am", "bob")) == 200
        assert journal == [("app", "bob")]

    async def test_the_app_s_own_answer_stands(self, journal: Journal) -> None:
        assert await self.served(journal, alice, ("i-am", "bob")) == 200
        assert journal == [("app", "alice")]

    async def test_nobody_knows(self, journal: Journal) -> None:
        assert await self.served(journal, None) == 200
        assert journal[0][1].startswith("anonymous_")

    @pytest.mark.parametrize(("user", "status"), [("mallory", 401), ("undefined", 400)])
    async def test_a_refusal_is_answered_like_the_app_s_own(self, journal: Journal, user: str, status: int) -> None:
        assert await self.served(journal, None, ("i-am", user)) == status
        assert journal == []

    async def test_a_plugin_is_enough_to_require_identity(self, journal: Journal) -> None:
        app = UserContextMiddleware(
            noting(journal), manager=UserContextManager(plugins=[Identifies()]), require_identity=True
        )
        assert status_of(await exchange(app, http_scope(headers=[("i-am", "bob")]))) == 200
        assert status_of(await exchange(app, http_scope())) == 401

    def test_without_one_identity_cannot_be_required(self, journal: Journal) -> None:
        with pytest.raises(ConfigurationError, match="require_identity needs identify, or a plugin"):
            UserContextMiddleware(noting(journal), manager=UserContextManager(), require_identity=True)

    @pytest.mark.security
    async def test_an_answer_of_the_wrong_kind_serves_nobody(self, journal: Journal) -> None:
        class Wrong:
            @hookimpl
            def ucm_identify(self) -> int:
                return 7

        app = UserContextMiddleware(noting(journal), manager=UserContextManager(plugins=[Wrong()]))
        with pytest.raises(PluginError, match="ucm_identify returned a int"):
            await exchange(app, http_scope())
        assert journal == []


class TestAroundContext:
    async def test_it_wraps_the_app_and_the_app_sees_what_it_sets(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Contexts(journal), Contexts(journal)])
        app = UserContextMiddleware(noting(journal, variable.get), manager=manager, identify=alice)
        assert status_of(await exchange(app, http_scope())) == 200
        wraps = [("enter", "context", "alice"), ("leave", "context", "alice")]
        assert journal == [wraps[0], wraps[0], ("app", "context"), wraps[1], wraps[1]]
        assert variable.get() == "unset"

    async def test_what_the_app_opened_is_released_before_it_is_left(self, journal: Journal) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().callback(journal.append, "released")
            await noting(journal)(scope, receive, send)

        manager = UserContextManager(plugins=[Contexts(journal)])
        await exchange(UserContextMiddleware(app, manager=manager, identify=alice), http_scope())
        assert journal[1:] == [("app", "alice"), "released", ("leave", "context", "alice")]

    async def test_it_is_left_when_the_request_is_cancelled_over_and_over(self, journal: Journal) -> None:
        started = asyncio.Event()

        async def hangs(scope: Scope, receive: Receive, send: Send) -> None:
            started.set()
            await asyncio.Event().wait()

        manager = UserContextManager(plugins=[Contexts(journal)])
        task = asyncio.create_task(
            exchange(UserContextMiddleware(hangs, manager=manager, identify=alice), http_scope())
        )
        await started.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert journal == [
            ("enter", "context", "alice"),
            ("CancelledError", "context", "alice"),
            ("leave", "context", "alice"),
        ]

    async def test_a_visitor_may_still_log_in(self, journal: Journal) -> None:
        """What plugins wrap with is no use of the context as an anonymous one."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().bind("alice")
            await noting(journal)(scope, receive, send)

        manager = UserContextManager(plugins=[Contexts(journal)])
        assert status_of(await exchange(UserContextMiddleware(app, manager=manager), http_scope())) == 200
        assert ("app", "alice") in journal

    async def test_a_resource_of_a_plugin_is_one(self, journal: Journal) -> None:
        class Opens:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self, context: UserExecutionContext) -> AsyncIterator[None]:
                context.callback(journal.append, "released")
                yield

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().bind("alice")

        manager = UserContextManager(plugins=[Opens()])
        assert status_of(await exchange(UserContextMiddleware(app, manager=manager), http_scope())) == 409

    async def test_one_that_cannot_be_entered_fails_the_request_and_the_others_are_left(self, journal: Journal) -> None:
        class Fails:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self) -> AsyncIterator[None]:
                raise UnauthenticatedError("revoked")
                yield

        manager = UserContextManager(plugins=[Contexts(journal), Fails(), Contexts(journal)])
        app = UserContextMiddleware(noting(journal), manager=manager, identify=alice)
        assert status_of(await exchange(app, http_scope())) == 401
        assert journal == [
            ("enter", "context", "alice"),
            ("UnauthenticatedError", "context", "alice"),
            ("leave", "context", "alice"),
        ]

    @pytest.mark.parametrize("when", ["entering", "leaving"])
    async def test_what_it_raises_says_whose_it_is(self, when: str, make_manager: MakeManager) -> None:
        class Fails:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self) -> AsyncIterator[None]:
                if when == "entering":
                    raise failure
                yield
                if when == "leaving":
                    raise failure

            @hookimpl
            @asynccontextmanager
            async def ucm_around_agent_run(self) -> AsyncIterator[None]:
                async with self.ucm_around_context():
                    yield

        failure = OSError("down")
        manager = make_manager(plugins=[Fails()], guard="open")
        for _ in range(2):
            with pytest.raises((OSError, ExceptionGroup)):
                async with agent_run(manager.create_isolated_context("alice"), "search"):
                    pass
        [note] = [note for note in failure.__notes__ if note.startswith("raised by")]
        assert "raised by ucm_around_agent_run of plugin 'tests.test_plugin_integration.TestAroundContext" in note
        assert note.endswith("Fails' (of no distribution)")

    async def test_it_cannot_swallow_an_error(self) -> None:
        class Swallows:
            @hookimpl(specname="ucm_around_context")
            @asynccontextmanager
            async def around(self) -> AsyncIterator[None]:
                with suppress(OSError):
                    yield

            @hookimpl(specname="ucm_around_agent_run")
            def run(self) -> AbstractAsyncContextManager[None]:
                return self.around()

            @hookimpl(specname="ucm_around_resource")
            def resource(self) -> AbstractAsyncContextManager[None]:
                return self.around()

        async def fails(scope: Scope, receive: Receive, send: Send) -> None:
            raise OSError("the app's")

        @asynccontextmanager
        async def resource() -> AsyncIterator[None]:
            raise OSError("the resource's")
            yield

        manager = UserContextManager(plugins=[Swallows()], guard="open")
        with pytest.raises(OSError, match="the app's"):
            await exchange(UserContextMiddleware(fails, manager=manager, identify=alice), http_scope())
        async with managed_user_context(manager.create_isolated_context("alice")) as context:
            with pytest.raises(OSError, match="the agent's"):
                async with agent_run(context, "search"):
                    raise OSError("the agent's")
            with pytest.raises(OSError, match="the resource's"):
                await context.enter_async_context(resource())

    async def test_what_it_passes_on_is_not_its_own(self, make_manager: MakeManager) -> None:
        class Raises(AbstractAsyncContextManager[None]):
            async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
                if error is not None:
                    raise error

        class Passes:
            @hookimpl
            def ucm_around_agent_run(self) -> AbstractAsyncContextManager[None]:
                return Raises()

        with pytest.raises(OSError, match="the app's") as raised:
            async with agent_run(make_manager(plugins=[Passes()]).create_isolated_context("alice"), "search"):
                raise OSError("the app's")
        assert not hasattr(raised.value, "__notes__")

    async def test_an_answer_of_the_wrong_kind_fails_the_request(self, journal: Journal) -> None:
        class Wrong:
            @hookimpl
            def ucm_around_context(self) -> int:
                return 7

        manager = UserContextManager(plugins=[Contexts(journal), Wrong()])
        app = UserContextMiddleware(noting(journal), manager=manager, identify=alice)
        with pytest.raises(PluginError, match="ucm_around_context returned a int"):
            await exchange(app, http_scope())
        assert journal == []
        with manager.privileged(reason="the test counts", users=["alice"]):
            assert manager.get_active_contexts() == {}

    async def test_a_failing_exit_is_recorded_by_name(self, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
        class Fails:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_context(self) -> AsyncIterator[None]:
                yield
                raise OSError("down")

        manager = UserContextManager(plugins=[Contexts(journal), Fails()], guard="open")
        app = UserContextMiddleware(noting(journal), manager=manager, identify=alice)
        assert status_of(await exchange(app, http_scope())) == 200
        assert journal[-1] == ("leave", "context", "alice")
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        (unreleased,) = trail["events"][-1]["unreleased"]
        assert unreleased.startswith("ucm_around_context of tests.test_plugin_integration.TestAroundContext")
        assert "resource not released: ucm_around_context of" in caplog.text


RECEIVED = [{"type": "websocket.connect"}, *({"type": "websocket.receive", "text": text} for text in ("a", "b"))]


class TestAroundMessage:
    async def conversation(self, journal: Journal, *plugins: object, app: ASGIApp | None = None) -> list[Message]:
        async def chat(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                journal.append(("app", message["text"], variable.get()))

        middleware = UserContextMiddleware(app or chat, manager=UserContextManager(plugins=plugins), identify=alice)
        return await exchange(middleware, websocket_scope(), *RECEIVED, {"type": "websocket.disconnect", "code": 1000})

    async def test_a_message_is_wrapped_until_the_next_is_asked_for(self, journal: Journal) -> None:
        await self.conversation(journal, Messages(journal))
        assert journal == [
            ("enter", "message", "a"),
            ("app", "a", "message"),
            ("leave", "message", "a"),
            ("enter", "message", "b"),
            ("app", "b", "message"),
            ("leave", "message", "b"),
        ]

    async def test_several_wrap_it_in_order_and_leave_in_reverse(self, journal: Journal) -> None:
        class Named(Base):
            def __init__(self, journal: Journal, name: str) -> None:
                super().__init__(journal)
                self.name = name

            @hookimpl
            def ucm_around_message(self, message: Message) -> AbstractAsyncContextManager[None] | None:
                return self.around(self.name) if message["text"] == "a" else None

        await self.conversation(journal, Named(journal, "outer"), Named(journal, "inner"))
        assert journal[:-1] == [
            ("enter", "outer"),
            ("enter", "inner"),
            ("app", "a", "inner"),
            ("leave", "inner"),
            ("leave", "outer"),
        ]

    async def test_the_last_message_ends_with_the_handler_and_its_error(self, journal: Journal) -> None:
        async def fails(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            raise OSError("the handler fails")

        with pytest.raises(OSError, match="the handler fails"):
            await self.conversation(journal, Messages(journal), app=fails)
        assert journal == [("enter", "message", "a"), ("OSError", "message", "a"), ("leave", "message", "a")]

    async def test_a_message_that_a_plugin_refuses_is_not_handled(self, journal: Journal) -> None:
        class Refuses:
            @hookimpl
            def ucm_around_message(self, message: Message) -> None:
                if message["text"] == "b":
                    raise UnauthenticatedError("revoked")

        sent = await self.conversation(journal, Refuses())
        assert journal == [("app", "a", "unset")]
        assert sent[-1]["code"] == 1008

    async def test_a_failing_exit_ends_the_conversation(self, journal: Journal) -> None:
        class Fails:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_message(self) -> AsyncIterator[None]:
                yield
                raise OSError("down")

        with pytest.raises(OSError, match="down"):
            await self.conversation(journal, Fails())
        assert journal == [("app", "a", "unset")]

    async def test_a_message_is_not_lost_to_who_stops_waiting_for_it(self, journal: Journal) -> None:
        entering = asyncio.Event()

        class Slow(Base):
            @hookimpl
            @asynccontextmanager
            async def ucm_around_message(self, message: Message) -> AsyncIterator[None]:
                if not entering.is_set():
                    entering.set()
                    await asyncio.Event().wait()
                async with self.around("message", message["text"]):
                    yield

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            waiting = asyncio.ensure_future(receive())
            await entering.wait()
            waiting.cancel()
            await asyncio.wait([waiting])
            while (message := await receive())["type"] == "websocket.receive":
                journal.append(("app", message["text"]))

        await self.conversation(journal, Slow(journal), app=app)
        assert [entry for entry in journal if entry[0] == "app"] == [("app", "a"), ("app", "b")]

    async def test_what_wrapped_the_last_one_is_left_before_the_next_also_by_who_stops_waiting(
        self, journal: Journal
    ) -> None:
        leaving, go_on = asyncio.Event(), asyncio.Event()

        class Slow:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_message(self) -> AsyncIterator[None]:
                yield
                leaving.set()
                await go_on.wait()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            waiting = asyncio.ensure_future(receive())
            await leaving.wait()
            waiting.cancel()
            go_on.set()
            await asyncio.wait([waiting])
            journal.append(("app", (await receive())["text"]))

        await self.conversation(journal, Messages(journal), Slow(), app=app)
        assert journal[:4] == [
            ("enter", "message", "a"),
            ("leave", "message", "a"),
            ("enter", "message", "b"),
            ("app", "b"),
        ]

    async def test_a_message_that_was_cut_off_is_left_with_an_error(self, journal: Journal) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            threading.Thread(target=current_context().close, args=("revoked",)).start()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.Event().wait()
            await receive()

        await self.conversation(journal, Messages(journal), app=app)
        assert journal[:2] == [("enter", "message", "a"), ("ContextClosedError", "message", "a")]

    async def test_http_has_no_messages(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Messages(journal)])
        await exchange(UserContextMiddleware(noting(journal), manager=manager, identify=alice), http_scope())
        assert journal == [("app", "alice")]


class TestAroundResource:
    async def test_it_is_entered_before_the_resource_and_left_after_it(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Resources(journal)])
        base = Base(journal)
        async with managed_user_context(manager.create_isolated_context("alice")) as context:
            await context.enter_async_context(base.around("db"), name="db")
            await context.enter_async_context(base.around("plain"), name="plain")
            await context.enter_async_context(base.around("owned"), name="owned", owner_task=True)
        assert [entry[:3] for entry in journal if entry[1] == "around" or entry[0] in ("enter", "leave")] == [
            ("enter", "around", "db"),
            ("enter", "db"),
            ("enter", "plain"),
            ("enter", "around", "owned"),
            ("enter", "owned"),
            ("leave", "owned"),
            ("leave", "around", "owned"),
            ("leave", "plain"),
            ("leave", "db"),
            ("leave", "around", "db"),
        ]

    async def test_one_without_a_name_is_called_what_it_is(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Resources(journal)])
        context = manager.create_isolated_context("alice")
        await context.enter_async_context(Base(journal).around("db"))
        assert journal[0] == ("enter", "around", "Base.around")
        await context.aclose()

    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_it_is_left_at_once_when_the_resource_cannot_be_entered(
        self, journal: Journal, owner_task: bool
    ) -> None:
        @asynccontextmanager
        async def fails() -> AsyncIterator[None]:
            raise OSError("down")
            yield

        manager = UserContextManager(plugins=[Resources(journal)])
        context = manager.create_isolated_context("alice")
        with pytest.raises(OSError, match="down"):
            await context.enter_async_context(fails(), name="db", owner_task=owner_task)
        assert [entry[0] for entry in journal] == ["enter", "OSError", "leave"]
        assert not context.lifetime.has_resources
        assert await context.aclose() == ()

    async def test_it_is_left_at_once_when_another_plugin_s_cannot_be_entered(
        self, journal: Journal, make_manager: MakeManager
    ) -> None:
        class Fails:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_resource(self) -> AsyncIterator[None]:
                raise OSError("down")
                yield

        context = make_manager(plugins=[Resources(journal), Fails()]).create_isolated_context("alice")
        with pytest.raises(OSError, match="down"):
            await context.enter_async_context(Base(journal).around("db"), name="db")
        assert [entry[:2] for entry in journal] == [("enter", "around"), ("OSError", "around"), ("leave", "around")]
        assert not context.lifetime.has_resources

    async def test_synchronous_resources_are_not_wrapped(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Resources(journal)])
        with running_as(manager, "alice") as context:
            context.enter_context(memoryview(b""))
            context.callback(str)
        assert journal == []

    async def test_what_plugins_wrap_with_is_not_wrapped_again(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[Resources(journal), Contexts(journal)])
        await exchange(UserContextMiddleware(noting(journal), manager=manager, identify=alice), http_scope())
        assert journal == [("enter", "context", "alice"), ("app", "alice"), ("leave", "context", "alice")]

    async def test_an_answer_of_the_wrong_kind_keeps_the_resource_from_being_entered(
        self, journal: Journal, make_manager: MakeManager
    ) -> None:
        class Wrong:
            @hookimpl
            def ucm_around_resource(self) -> str:
                return "wrong"

        context = make_manager(plugins=[Wrong()]).create_isolated_context("alice")
        with pytest.raises(PluginError, match="ucm_around_resource returned a str"):
            await context.enter_async_context(Base(journal).around("db"))
        assert journal == []


class TestAgentRun:
    async def test_the_run_has_a_child_context_of_its_own_and_is_wrapped(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[AgentRuns(journal)])
        async with managed_user_context(manager.create_isolated_context("alice")) as context:
            async with agent_run(context, "search", {"query": "x"}) as run:
                assert current_context() is run.context
                assert run.context.parent_request_id == context.request_id
                journal.append(("agent", run.context.user_id))
            assert not run.context.is_open
            assert current_context() is context
        assert journal == [
            ("enter", "run", "alice", "search", {"query": "x"}),
            ("agent", "alice"),
            ("leave", "run", "alice", "search", {"query": "x"}),
        ]

    async def test_in_a_request_what_it_sets_is_seen_and_undone(self, journal: Journal) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with agent_run(current_context(), "search"):
                journal.append(("agent", variable.get()))
            await noting(journal, variable.get)(scope, receive, send)

        manager = UserContextManager(plugins=[AgentRuns(journal)])
        await exchange(UserContextMiddleware(app, manager=manager, identify=alice), http_scope())
        assert journal == [
            ("enter", "run", "alice", "search", {}),
            ("agent", "run"),
            ("leave", "run", "alice", "search", {}),
            ("app", "unset"),
        ]

    async def test_in_a_task_of_the_request_s_it_does_not_touch_the_request_s_own(self, journal: Journal) -> None:
        async def work() -> str:
            async with agent_run(current_context(), "search"):
                return variable.get()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            journal.append(("seen", await asyncio.create_task(work())))
            await noting(journal, variable.get)(scope, receive, send)

        class Sets:
            @hookimpl
            @asynccontextmanager
            async def ucm_around_agent_run(self) -> AsyncIterator[None]:
                variable.set("in the run")
                yield
                variable.set("left")

        manager = UserContextManager(plugins=[Sets()])
        await exchange(UserContextMiddleware(app, manager=manager, identify=alice), http_scope())
        assert journal == [("seen", "in the run"), ("app", "unset")]

    async def test_in_the_request_s_own_task_exits_may_reset_what_they_set(self, journal: Journal) -> None:
        class Resets:
            @hookimpl(specname="ucm_around_agent_run")
            @asynccontextmanager
            async def run(self) -> AsyncIterator[None]:
                token = variable.set("run")
                yield
                variable.reset(token)

            @hookimpl(specname="ucm_around_message")
            @asynccontextmanager
            async def message(self) -> AsyncIterator[None]:
                token = variable.set("message")
                yield
                variable.reset(token)

            @hookimpl(specname="ucm_around_context")
            @asynccontextmanager
            async def context(self) -> AsyncIterator[None]:
                token = variable.set("context")
                yield
                variable.reset(token)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            journal.append(variable.get())
            async with agent_run(current_context(), "search"):
                journal.append(variable.get())
            journal.append(variable.get())
            await receive()
            journal.append(variable.get())

        manager = UserContextManager(plugins=[Resets()], guard="open")
        end = {"type": "websocket.disconnect", "code": 1000}
        middleware = UserContextMiddleware(app, manager=manager, identify=alice)
        await exchange(middleware, websocket_scope(), *RECEIVED[:2], end)
        assert journal == ["message", "run", "message", "context"]
        assert [event["outcome"] for event in events(manager, "alice", "closed")] == ["ok", "ok"]

    def test_on_another_event_loop_it_leaves_the_request_s_context_alone(
        self, journal: Journal, make_manager: MakeManager
    ) -> None:
        """The request's own loop may be running in its Context at any moment, and two threads cannot."""
        manager = make_manager(plugins=[AgentRuns(journal)])
        context = manager.create_isolated_context("alice")

        async def work() -> None:
            async with agent_run(context, "search"):
                journal.append("ran")

        variables = context.lifetime.variables = Context()
        thread = threading.Thread(target=asyncio.run, args=(work(),))
        thread.start()
        variables.run(thread.join)
        assert [entry[0] for entry in journal if entry != "ran"] == ["enter", "leave"]
        [closed] = events(manager, "alice", "closed")
        assert closed["outcome"] == "ok"

    async def test_one_that_outlives_its_run_is_told_where_the_run_began(self) -> None:
        context = create_isolated_execution_context("alice")
        async with agent_run(context, "search") as run:
            pass
        with pytest.raises(ContextClosedError, match=r"test_plugin_integration\.py:\d+"):
            run.context.require_usable()

    async def test_without_a_plugin_and_without_a_manager(self) -> None:
        context = create_isolated_execution_context("alice")
        async with agent_run(context, "search") as run:
            assert current_context() is run.context

    async def test_an_agent_that_fails_or_is_cancelled_is_seen_to(self, journal: Journal) -> None:
        manager = UserContextManager(plugins=[AgentRuns(journal)])
        context = manager.create_isolated_context("alice")
        with pytest.raises(OSError, match="fails"):
            async with agent_run(context, "search"):
                raise OSError("fails")
        assert [entry[0] for entry in journal] == ["enter", "OSError", "leave"]
        journal.clear()

        started = asyncio.Event()

        async def hangs() -> None:
            async with agent_run(context, "search"):
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hangs())
        await started.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert [entry[0] for entry in journal] == ["enter", "CancelledError", "leave"]
        await context.aclose()

    async def test_a_visitor_with_an_agent_gets_no_user(self, journal: Journal, make_manager: MakeManager) -> None:
        manager = make_manager(plugins=[AgentRuns(journal)])
        stranger = visitor(manager)
        async with agent_run(stranger, "search"):
            with pytest.raises(IdentityConflictError):
                stranger.bind("alice")

    @pytest.mark.security
    async def test_no_run_in_another_user_s_context(self, journal: Journal, make_manager: MakeManager) -> None:
        manager = make_manager(plugins=[AgentRuns(journal)])
        other = manager.create_isolated_context("bob")
        with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
            async with agent_run(other, "search"):
                pass
        assert journal == []
        assert not other.needs_waiting  # no child is left open either

    async def test_a_plugin_that_fails_stops_the_run_before_it_begins(
        self, journal: Journal, make_manager: MakeManager
    ) -> None:
        class Fails:
            @hookimpl
            def ucm_around_agent_run(self) -> None:
                raise PermissionError("not this agent")

        context = make_manager(plugins=[AgentRuns(journal), Fails()]).create_isolated_context("alice")
        with pytest.raises(PermissionError, match="not this agent"):
            async with agent_run(context, "search"):
                journal.append("ran")
        assert journal == []
        assert not context.needs_waiting


class TestBindSession:
    @pytest.fixture
    def manager(self, journal: Journal, make_manager: MakeManager) -> UserContextManager:
        return make_manager(plugins=[Sessions(journal)])

    def test_a_session_given_to_a_context_is_bound_once(self, manager: UserContextManager, journal: Journal) -> None:
        context = manager.create_isolated_context("alice", db_session="session")
        assert context.db_session == "session"
        manager.set_context("alice", context)
        assert context.create_child_context("part").db_session == "session"
        assert journal == [("bind", "alice", "session")]

    def test_a_context_made_by_hand_is_bound_when_it_comes_under_the_manager(
        self, manager: UserContextManager, journal: Journal
    ) -> None:
        context = create_isolated_execution_context("alice", db_session="session")
        assert journal == []
        manager.set_context("alice", context)
        assert journal == [("bind", "alice", "session")]

    @pytest.mark.security
    def test_a_session_that_cannot_be_bound_is_not_handed_out(
        self, manager: UserContextManager, journal: Journal
    ) -> None:
        with pytest.raises(PermissionError, match="not this one"):
            manager.create_isolated_context("alice", db_session="bad")
        made = create_isolated_execution_context("alice", db_session="bad")
        with pytest.raises(PermissionError):
            manager.set_context("alice", made)
        assert manager.get_active_contexts() == {}
        with pytest.raises(PermissionError):
            manager.create_isolated_context("alice").bind_session("bad")

    @pytest.mark.parametrize("made", ["by the manager", "by hand"])
    def test_the_context_is_the_manager_s_when_its_session_is_bound(
        self, journal: Journal, made: str, make_manager: MakeManager
    ) -> None:
        class Reads:
            @hookimpl
            def ucm_bind_session(self, context: UserExecutionContext, session: Any) -> None:
                if session == "bad":
                    raise PermissionError("not this one")
                journal.append((context.environment.get("TENANT"), context.derive_key("thread", "7")))

        settings = IsolatedEnvironment(environ={"TENANT": "blue", "UCM_ENVIRONMENT": "testing"})
        manager = make_manager(plugins=[Reads()], environment=settings, secret="q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6")
        if made == "by the manager":
            context = manager.create_isolated_context("alice", db_session="good")
        else:
            context = create_isolated_execution_context("alice", db_session="good")
            manager.set_context("alice", context)
            refused = create_isolated_execution_context("alice", db_session="bad")
            with pytest.raises(PermissionError):
                manager.set_context("alice", refused)
            assert refused.is_open
            assert refused.host is None
        assert journal == [("blue", context.derive_key("thread", "7"))]
        assert context.environment.get("TENANT") == "blue"

    async def test_it_works_in_a_thread(self, manager: UserContextManager, journal: Journal) -> None:
        context = manager.create_isolated_context("alice")
        assert await asyncio.to_thread(context.bind_session, "session") == "session"
        assert journal == [("bind", "alice", "session")]

    @pytest.mark.security
    def test_after_teardown_no_session_is_bound(self, manager: UserContextManager, journal: Journal) -> None:
        context = manager.create_isolated_context("alice")
        context.close()
        with pytest.raises(ContextClosedError):
            context.bind_session("session")
        assert journal == []

    @pytest.mark.security
    def test_a_visitor_with_a_bound_session_gets_no_user(self, manager: UserContextManager) -> None:
        stranger = visitor(manager)
        stranger.bind_session("session")
        with pytest.raises(IdentityConflictError):
            stranger.bind("alice")

    def test_without_a_plugin_nothing_is_bound(self, make_manager: MakeManager) -> None:
        stranger = visitor(make_manager())
        assert stranger.bind_session("session") == "session"
        stranger.bind("alice")
        assert create_isolated_execution_context("alice").bind_session("session") == "session"


class TestNotify:
    @pytest.fixture
    def manager(self, journal: Journal, make_manager: MakeManager) -> UserContextManager:
        return make_manager(plugins=[Told(journal)])

    def test_a_life(self, manager: UserContextManager, journal: Journal) -> None:
        context = manager.create_isolated_context("alice", "r-1")
        manager.set_context("alice", context)  # the same context under another key is no second one
        child = context.create_child_context("part")
        child.close()
        manager.clear_context("alice")
        assert journal == [
            ("opened", "alice"),
            ("opened", "alice"),
            ("closed", "alice", "closed"),
            ("closed", "alice", "cleared"),
        ]

    def test_a_late_identity(self, manager: UserContextManager, journal: Journal) -> None:
        stranger = visitor(manager)
        anonymous_id = stranger.user_id
        stranger.bind("alice")
        assert journal == [("opened", anonymous_id), ("bound", "alice", anonymous_id)]

    def test_an_expiry(self, journal: Journal) -> None:
        clock = Clock()
        manager = UserContextManager(plugins=[Told(journal)], ttl=5, clock=clock)
        manager.create_isolated_context("alice")
        clock.advance(6)
        manager.sweep()
        assert journal[-1] == ("closed", "alice", "expired")

    @pytest.mark.security
    def test_a_denial_names_neither_the_other_user_nor_the_key(
        self, manager: UserContextManager, journal: Journal
    ) -> None:
        manager.create_isolated_context("bob")
        with running_as(manager, "alice"):
            journal.clear()
            for key in ("bob", ("bob", "r-1"), "carol"):
                with pytest.raises(CrossUserAccessError):
                    manager.get_context(key)
            assert journal == [("denied", "alice", "get_context")] * 3
        manager.serve()
        journal.clear()
        with pytest.raises(CrossUserAccessError):
            manager.clear_context("bob")
        assert journal == [("denied", None, "clear_context")]

    def test_a_revocation_is_told_also_of_who_is_not_there(self, journal: Journal) -> None:
        class Ends:
            @hookimpl
            def ucm_user_revoked(self, user_id: str, reason: str) -> None:
                journal.append(("revoked", user_id, reason, len(manager.get_active_contexts())))
                raise OSError("down")

        manager = UserContextManager(plugins=[Ends()])
        manager.create_isolated_context("alice")
        assert manager.revoke("alice", "left") == 1
        assert manager.revoke("bob", "fired") == 0
        assert journal == [("revoked", "alice", "left", 0), ("revoked", "bob", "fired", 0)]

    def test_a_plugin_that_fails_breaks_nothing(self, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
        class Fails:
            @hookimpl
            def ucm_context_opened(self) -> None:
                raise OSError("down")

            @hookimpl
            def ucm_context_bound(self) -> None:
                raise OSError("down")

            @hookimpl
            def ucm_context_closed(self) -> None:
                raise OSError("down")

            @hookimpl
            def ucm_access_denied(self) -> None:
                raise OSError("down")

        manager = UserContextManager(plugins=[Fails(), Told(journal)])
        stranger = visitor(manager)
        with managed_user_context(stranger):
            stranger.bind("alice")
            with pytest.raises(CrossUserAccessError):
                manager.get_context("bob")
        assert [entry[0] for entry in journal] == ["opened", "bound", "denied", "closed"]
        assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == [
            "ucm_context_opened",
            "ucm_context_bound",
            "ucm_access_denied",
            "ucm_context_closed",
        ]
        assert {record.levelno for record in caplog.records} == {logging.ERROR}
        assert manager.get_active_contexts() == {}

    def test_what_stops_the_interpreter_leaves_no_context_open(self) -> None:
        class Stops:
            @hookimpl
            def ucm_context_opened(self) -> None:
                raise KeyboardInterrupt

        manager = UserContextManager(plugins=[Stops()])
        with pytest.raises(KeyboardInterrupt):
            manager.create_isolated_context("alice")
        assert manager.get_active_contexts() == {}


class TestManager:
    def test_the_deployment_names_plugins_too(self) -> None:
        with pytest.raises(PluginError, match="'journal'"):
            UserContextManager(environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "journal"}))

    def test_the_process_s_environment_is_the_usual_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCM_PLUGINS", "journal")
        with pytest.raises(PluginError, match="'journal'"):
            UserContextManager()


class Derives(Base):
    """Makes the keys of threads, and leaves other kinds to the secret."""

    def __init__(self, journal: Journal, key: Any = None) -> None:
        super().__init__(journal)
        self.key = key

    @hookimpl
    def ucm_derive_key(self, context: UserExecutionContext, kind: str, client_id: str) -> Any:
        self.journal.append((context.user_id, kind, client_id))
        return self.key or f"{context.user_id}.{client_id}" if kind == "thread" else None


class TestDeriveKey:
    @pytest.fixture
    def manager(self, journal: Journal, make_manager: MakeManager) -> UserContextManager:
        return make_manager(plugins=[Derives(journal)], secret="q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6")

    def test_a_context_s_keys_are_the_plugin_s(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        assert context.derive_key("thread", "7") == "alice.7"
        assert context.candidate_keys("thread", "7") == ("alice.7",)
        assert context.check_key("thread", "7", "alice.7") == "alice.7"

    def test_what_the_plugin_leaves_is_derived_with_the_secret(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("alice")
        assert context.derive_key("file", "7").startswith("ucm1_")

    @pytest.mark.security
    @pytest.mark.parametrize("found", ["bob.7", None, "alice.8", "", "alice.7 ", "\0lice.7"])
    def test_another_s_record_and_none_are_refused_alike(self, manager: UserContextManager, found: str | None) -> None:
        context = manager.create_isolated_context("alice")
        with managed_user_context(context):
            with pytest.raises(CrossUserAccessError) as refused:
                context.check_key("thread", "7", found)
            with pytest.raises(CrossUserAccessError) as missing:
                context.check_key("thread", "7", None)
        assert str(refused.value) == str(missing.value)
        first, second = events(manager, "alice", "denied")
        assert {**first, "at": None} == {**second, "at": None}

    @pytest.mark.security
    def test_it_is_not_asked_by_whom_the_context_is_not_for(
        self, manager: UserContextManager, journal: Journal
    ) -> None:
        context = manager.create_isolated_context("alice")
        with running_as(manager, "bob"):
            for ask in (context.derive_key, context.candidate_keys):
                with pytest.raises(CrossUserAccessError):
                    ask("thread", "7")
            with pytest.raises(CrossUserAccessError):
                context.check_key("thread", "7", "alice.7")
        with pytest.raises(InvalidContextError):
            context.derive_key("thread", "a\nb")
        context.close()
        with pytest.raises(ContextClosedError):
            context.derive_key("thread", "7")
        assert journal == []

    def test_a_visitor_s_keys_settle_it_too(self, manager: UserContextManager) -> None:
        stranger = visitor(manager)
        assert stranger.derive_key("thread", "7") == f"{stranger.user_id}.7"
        with pytest.raises(IdentityConflictError):
            stranger.bind("alice")

    def test_ids_as_long_as_they_may_be_make_a_key(self, manager: UserContextManager) -> None:
        context = manager.create_isolated_context("a" * 256)
        key = context.derive_key("thread", "b" * 256)
        assert context.check_key("thread", "b" * 256, key) == key

    @pytest.mark.parametrize("wrong", [b"key", 7, "\0", "a\nb", "\ud800", "\u202e"])
    def test_what_is_no_key_is_the_plugin_s_fault_and_not_the_client_s(
        self, journal: Journal, wrong: object, make_manager: MakeManager
    ) -> None:
        context = make_manager(plugins=[Derives(journal, wrong)]).create_isolated_context("alice")
        with pytest.raises(PluginError, match=r"Derives.*ucm_derive_key returned a") as refused:
            context.derive_key("thread", "7")
        assert refusal_for(refused.value) is None

    def test_an_error_of_the_plugin_s_names_it(self, journal: Journal, make_manager: MakeManager) -> None:
        class Fails:
            @hookimpl
            def ucm_derive_key(self) -> str:
                raise OSError("no vault")

        context = make_manager(plugins=[Fails()]).create_isolated_context("alice")
        with pytest.raises(OSError, match="no vault") as refused:
            context.derive_key("thread", "7")
        assert "raised by ucm_derive_key of plugin" in refused.value.__notes__[0]
