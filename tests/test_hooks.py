"""Calling the hooks: in which order, with which arguments, and what becomes of errors and wrong results."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from support.asgi import http_scope
from ucm_middleware import (
    IsolatedEnvironment,
    PluginError,
    Principal,
    UnauthenticatedError,
    UserExecutionContext,
    create_isolated_execution_context,
    hookimpl,
    hooks,
)
from ucm_middleware.dispatch import Hooks
from ucm_middleware.plugins import load_hooks


def plugin(**functions: Any) -> SimpleNamespace:
    """A plugin with these implementations."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})


def loaded(*plugins: object) -> Hooks:
    return load_hooks(plugins, IsolatedEnvironment(environ={}))


@pytest.fixture
def connection() -> HTTPConnection:
    return HTTPConnection(http_scope())


@pytest.fixture
def context() -> Iterator[UserExecutionContext]:
    context = create_isolated_execution_context("alice", "r-1")
    yield context
    context.close()


def test_each_specification_has_its_field_and_each_field_its_specification() -> None:
    specified = {name for name, value in vars(hooks).items() if hasattr(value, "ucm_middleware_spec")}
    assert specified == {f"ucm_{field.name}" for field in fields(Hooks)}
    assert all(inspect.getdoc(getattr(hooks, name)) for name in specified)


def test_a_hook_that_nobody_implements_is_false_and_harmless(context: UserExecutionContext) -> None:
    none = loaded()
    assert [field.name for field in fields(none) if getattr(none, field.name)] == []
    assert none.around_context(context) == []
    assert none.derive_key(context, "thread", "1") is None
    none.bind_session(context, object())
    none.context_opened(context)


class TestArguments:
    def test_an_implementation_gets_the_arguments_that_it_names(self, context: UserExecutionContext) -> None:
        seen: list[Any] = []

        class Every:
            @hookimpl
            def ucm_context_bound(self, anonymous_id: str) -> None:
                seen.append(anonymous_id)

            @hookimpl
            def ucm_context_opened(self) -> None:
                seen.append("nothing")

            @hookimpl
            def ucm_access_denied(self, action: str, user_id: str | None) -> None:
                seen.append((action, user_id))

            @hookimpl
            def ucm_derive_key(self, kind: str, client_id: str = "missing", of_another_version: int = 7) -> None:
                seen.append((kind, client_id, of_another_version))

        found = loaded(Every())
        found.context_bound(context, "anonymous_1")
        found.context_opened(context)
        found.access_denied("alice", "get_context")
        found.derive_key(context, "thread", "t-1")
        assert seen == ["anonymous_1", "nothing", ("get_context", "alice"), ("thread", "t-1", 7)]

    def test_a_function_of_another_name_says_which_hook_it_is(self, context: UserExecutionContext) -> None:
        seen: list[str] = []

        class Renamed:
            @hookimpl(specname="ucm_context_opened")
            def note(self, context: UserExecutionContext) -> None:
                seen.append(context.user_id)

        loaded(Renamed()).context_opened(context)
        assert seen == ["alice"]

    def test_static_and_class_methods_are_implementations(self, context: UserExecutionContext) -> None:
        seen: list[object] = []

        class Mixed:
            @hookimpl
            @staticmethod
            def ucm_context_opened(context: UserExecutionContext) -> None:
                seen.append(context)

            @classmethod
            @hookimpl
            def ucm_context_closed(cls, reason: str) -> None:
                seen.append((cls, reason))

        found = loaded(Mixed())
        found.context_opened(context)
        found.context_closed(context, "finished")
        assert seen == [context, (Mixed, "finished")]


class TestOrder:
    @pytest.fixture
    def called(self) -> list[str]:
        return []

    def teller(self, called: list[str], name: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(ucm_context_opened=hookimpl(lambda: called.append(name), **options))

    def test_the_plugin_that_was_named_first_comes_first(
        self, context: UserExecutionContext, called: list[str]
    ) -> None:
        loaded(*(self.teller(called, name) for name in "abc")).context_opened(context)
        assert called == ["a", "b", "c"]

    def test_unless_one_asks_to_be_first_or_last(self, context: UserExecutionContext, called: list[str]) -> None:
        loaded(
            self.teller(called, "a", trylast=True), self.teller(called, "b"), self.teller(called, "c", tryfirst=True)
        ).context_opened(context)
        assert called == ["c", "b", "a"]

    def test_two_instances_of_one_class_are_two_plugins(self, context: UserExecutionContext, called: list[str]) -> None:
        class Teller:
            def __init__(self, name: str) -> None:
                self.name = name

            @hookimpl
            def ucm_context_opened(self) -> None:
                called.append(self.name)

        loaded(Teller("a"), Teller("b")).context_opened(context)
        assert called == ["a", "b"]


class TestIdentify:
    async def test_the_first_that_knows_decides_and_the_rest_are_not_asked(self, connection: HTTPConnection) -> None:
        asked: list[str] = []

        def nobody() -> None:
            asked.append("nobody")

        async def someone(connection: HTTPConnection) -> Principal:
            asked.append(f"someone at {connection.url.path}")
            await asyncio.sleep(0)
            return Principal("alice")

        def another() -> str:
            asked.append("another")
            return "bob"

        found = loaded(plugin(ucm_identify=nobody), plugin(ucm_identify=someone), plugin(ucm_identify=another))
        assert await found.identify(connection) == Principal("alice")
        assert asked == ["nobody", "someone at /"]

    async def test_implementations_run_in_the_asker_s_own_context(self, connection: HTTPConnection) -> None:
        """Awaited one after another: a task for each would hide from one what the one before it has set."""
        variable = ContextVar("variable", default="")

        async def first() -> None:
            variable.set("set")

        async def second() -> str:
            return variable.get()

        found = loaded(plugin(ucm_identify=first), plugin(ucm_identify=second))
        assert await found.identify(connection) == "set"
        assert variable.get() == "set"

    async def test_an_error_goes_to_the_asker_and_names_the_plugin(self, connection: HTTPConnection) -> None:
        async def refuses() -> None:
            raise UnauthenticatedError("no")

        found = loaded(plugin(ucm_identify=refuses), plugin(ucm_identify=lambda: "mallory"))
        with pytest.raises(UnauthenticatedError) as raised:
            await found.identify(connection)
        (note,) = raised.value.__notes__
        assert note.startswith("raised by ucm_identify of plugin 'types.SimpleNamespace'")

    @pytest.mark.parametrize("wrong", [7, b"alice", ["alice"], {"user": "alice"}, True])
    async def test_what_is_no_user_is_refused(self, connection: HTTPConnection, wrong: object) -> None:
        found = loaded(plugin(ucm_identify=lambda: wrong), plugin(ucm_identify=lambda: "mallory"))
        with pytest.raises(PluginError, match=f"ucm_identify returned a {type(wrong).__name__}; it returns a Princ"):
            await found.identify(connection)


class TestDeriveKey:
    def test_the_first_key_decides(self, context: UserExecutionContext) -> None:
        found = loaded(
            plugin(ucm_derive_key=lambda kind: None if kind == "thread" else "mine"),
            plugin(ucm_derive_key=lambda client_id: f"other-{client_id}"),
        )
        assert found.derive_key(context, "thread", "1") == "other-1"
        assert found.derive_key(context, "session", "1") == "mine"

    @pytest.mark.parametrize("wrong", [7, b"key", "", 0, False])
    def test_what_is_no_key_is_refused(self, context: UserExecutionContext, wrong: object) -> None:
        found = loaded(plugin(ucm_derive_key=lambda: wrong), plugin(ucm_derive_key=lambda: "other"))
        with pytest.raises(PluginError, match=f"ucm_derive_key returned a {type(wrong).__name__}"):
            found.derive_key(context, "thread", "1")

    def test_a_coroutine_is_refused_and_closed(self, context: UserExecutionContext) -> None:
        async def late() -> str:
            return "key"

        found = loaded(plugin(ucm_derive_key=lambda: late()))
        with pytest.raises(PluginError, match="ucm_derive_key returned a coroutine"):
            found.derive_key(context, "thread", "1")


class TestAround:
    def test_what_to_enter_is_named_and_in_order(self, context: UserExecutionContext) -> None:
        @asynccontextmanager
        async def around() -> AsyncIterator[None]:
            yield

        class Named:
            @hookimpl
            def ucm_around_resource(self, name: str) -> AbstractAsyncContextManager[None] | None:
                return around() if name == "db" else None

        found = loaded(Named(), plugin(ucm_around_resource=around))
        assert [implementation.hook for implementation, _ in found.around_resource(context, "db")] == [
            "ucm_around_resource",
            "ucm_around_resource",
        ]
        assert len(found.around_resource(context, "cache")) == 1

    @pytest.mark.parametrize("wrong", [7, "text", False])
    def test_what_cannot_be_entered_is_refused(self, context: UserExecutionContext, wrong: object) -> None:
        found = loaded(plugin(ucm_around_context=lambda: wrong))
        with pytest.raises(
            PluginError, match=f"ucm_around_context returned a {type(wrong).__name__}; it returns an as"
        ):
            found.around_context(context)

    def test_a_synchronous_context_manager_is_refused(self, context: UserExecutionContext) -> None:
        found = loaded(plugin(ucm_around_message=lambda: memoryview(b"")))
        with pytest.raises(PluginError, match="ucm_around_message returned a memoryview"):
            found.around_message(context, {})

    def test_an_error_names_the_plugin(self, context: UserExecutionContext) -> None:
        def fails() -> None:
            raise OSError("down")

        with pytest.raises(OSError, match="down") as raised:
            loaded(plugin(ucm_around_agent_run=fails)).around_agent_run(context, "agent", {})
        assert "raised by ucm_around_agent_run of plugin" in raised.value.__notes__[0]


class TestBindSession:
    def test_all_bind_in_order_in_a_thread_without_a_loop(self, context: UserExecutionContext) -> None:
        bound: list[tuple[str, object]] = []
        found = loaded(
            plugin(ucm_bind_session=lambda session, context: bound.append((context.user_id, session))),
            plugin(ucm_bind_session=lambda session: bound.append(("second", session))),
        )
        found.bind_session(context, "session")
        assert bound == [("alice", "session"), ("second", "session")]

    def test_the_first_error_is_raised_and_nobody_binds_after_it(self, context: UserExecutionContext) -> None:
        bound: list[object] = []

        def refuses() -> None:
            raise PermissionError("not this user")

        found = loaded(plugin(ucm_bind_session=refuses), plugin(ucm_bind_session=lambda session: bound.append(session)))
        with pytest.raises(PermissionError) as raised:
            found.bind_session(context, "session")
        assert "raised by ucm_bind_session of plugin" in raised.value.__notes__[0]
        assert bound == []

    @pytest.mark.parametrize("wrong", [False, True, "done", 0])
    def test_an_answer_is_refused(self, context: UserExecutionContext, wrong: object) -> None:
        """False may be meant as a refusal, and would not be one."""
        with pytest.raises(PluginError, match=f"ucm_bind_session returned a {type(wrong).__name__}"):
            loaded(plugin(ucm_bind_session=lambda: wrong)).bind_session(context, object())

    def test_a_binding_that_would_come_later_is_refused(self, context: UserExecutionContext) -> None:
        async def late() -> None:
            pass

        with pytest.raises(PluginError, match="returned a coroutine; it returns None, at once"):
            loaded(plugin(ucm_bind_session=lambda: late())).bind_session(context, object())


class TestNotify:
    @pytest.mark.parametrize("error", [OSError("down"), asyncio.CancelledError()])
    def test_an_error_is_logged_with_its_plugin_and_the_others_are_told(
        self, context: UserExecutionContext, caplog: pytest.LogCaptureFixture, error: BaseException
    ) -> None:
        told: list[str] = []

        def fails() -> None:
            raise error

        loaded(
            plugin(ucm_context_closed=fails), plugin(ucm_context_closed=lambda reason: told.append(reason))
        ).context_closed(context, "expired")
        assert told == ["expired"]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage().startswith("ucm_context_closed of plugin 'types.SimpleNamespace' (")
        assert record.exc_info is not None
        assert record.exc_info[1] is error

    def test_a_coroutine_is_logged_and_closed(
        self, context: UserExecutionContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def late() -> None:
            pass

        loaded(plugin(ucm_context_opened=lambda: late())).context_opened(context)
        assert "returned a coroutine" in caplog.text

    def test_the_end_of_the_interpreter_is_not_held_up(self, context: UserExecutionContext) -> None:
        def stops() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loaded(plugin(ucm_context_opened=stops)).context_opened(context)
