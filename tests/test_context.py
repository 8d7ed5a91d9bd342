"""UserExecutionContext: its ids, its data, its children, its resources and what it shows of itself."""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any
from unittest import mock

import pytest
from starlette.requests import HTTPConnection

from support.asgi import http_scope, websocket_scope
from support.contexts import MakeManager, visitor
from support.waiting import wait_until
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextIsolationError,
    ContextLimitError,
    ContextNotFoundError,
    IdentityConflictError,
    InvalidContextError,
    Principal,
    Shared,
    UnauthenticatedError,
    UnifiedIDManager,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
)
from ucm_middleware.lifetime import Lifetime


@pytest.fixture
def context() -> Iterator[UserExecutionContext]:
    context = create_isolated_execution_context(
        "alice", "r-1", agent_context={"plan": ["look"]}, audit_metadata={"ticket": 7}
    )
    yield context
    context.close()


class TestIdentity:
    def test_from_request_takes_ids(self) -> None:
        context = UserExecutionContext.from_request(
            user_id="alice", thread_id="t-1", run_id="run-1", request_id="r-1", websocket_client_id="w-1"
        )
        ids = (context.user_id, context.thread_id, context.run_id, context.request_id, context.websocket_client_id)
        assert ids == ("alice", "t-1", "run-1", "r-1", "w-1")
        assert (context.operation_depth, context.parent_request_id, context.is_anonymous) == (0, None, False)

    def test_a_request_id_that_is_not_given_is_made(self) -> None:
        made = {UserExecutionContext.from_request(user_id="alice", thread_id="t", run_id="r").request_id for _ in "12"}
        assert len(made) == 2
        assert all(UnifiedIDManager().validate(request_id, "request") for request_id in made)

    @pytest.mark.parametrize("missing", ["user_id", "thread_id", "run_id"])
    def test_the_other_ids_are_required(self, missing: str) -> None:
        given = {"user_id": "alice", "thread_id": "t-1", "run_id": "run-1"}
        del given[missing]
        with pytest.raises(TypeError, match=missing):
            UserExecutionContext.from_request(**given)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("make", "kind"), [(http_scope, None), (websocket_scope, "websocket")])
    def test_from_connection_believes_no_header(self, make: Callable[..., Any], kind: str | None) -> None:
        headers = [("x-user-id", "bob"), ("x-request-id", "r-of-bob"), ("baggage", "user_id=bob")]
        context = UserExecutionContext.from_connection(HTTPConnection(make(headers=headers)), user_id="alice")
        ids = UnifiedIDManager()
        assert context.user_id == "alice"
        assert ids.validate(context.request_id, "request")
        assert ids.extract_thread_id(context.run_id) == context.thread_id
        assert (context.websocket_client_id and ids.parse(context.websocket_client_id).kind) == kind

    def test_its_age_is_known_in_utc(self, context: UserExecutionContext) -> None:
        assert context.created_at.utcoffset() == timedelta()
        assert timedelta() <= datetime.now(UTC) - context.created_at < timedelta(minutes=1)

    def test_what_is_not_given_is_stable(self, make_manager: MakeManager) -> None:
        stranger = visitor(make_manager())
        assert (stranger.thread_id, stranger.run_id) == (stranger.thread_id, stranger.run_id)
        assert UnifiedIDManager().extract_thread_id(stranger.run_id) == stranger.thread_id
        assert stranger.is_anonymous

    def test_no_subclass_makes_two_of_them_one(self) -> None:
        def define(**methods: object) -> type:
            return type("Ours", (UserExecutionContext,), methods)

        for methods in ({"__eq__": object.__eq__}, {"__hash__": object.__hash__}):
            with pytest.raises(TypeError, match="Ours"):
                define(**methods)
        ours = define(tool="hammer")(user_id="alice", thread_id="t-1", run_id="r-1")
        assert ours.tool == "hammer"

    def test_contexts_are_equal_to_themselves_only(self) -> None:
        one, other = (UserExecutionContext(user_id="a", thread_id="t", run_id="r", request_id="q") for _ in "12")
        assert one != other
        assert len({one, other}) == 2

    def test_it_is_not_ambient_by_being_made(self, context: UserExecutionContext) -> None:
        with pytest.raises(ContextNotFoundError, match="UserContextMiddleware"):
            current_context()


class Gate:
    """A lock that counts who comes for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting = threading.Semaphore(0)

    def __enter__(self) -> None:
        self.waiting.release()
        self.lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.lock.release()


class TestData:
    def test_a_session_is_the_very_object(self) -> None:
        session = object()
        assert create_isolated_execution_context("alice", db_session=session).db_session is session

    def test_data_is_there_to_be_written(self, context: UserExecutionContext) -> None:
        context.agent_context["answer"] = 42
        context.audit_metadata["step"] = 2
        assert context.agent_context == {"plan": ["look"], "answer": 42}
        assert context.audit_metadata == {"ticket": 7, "step": 2}

    @pytest.mark.parametrize("name", ["agent_context", "audit_metadata", "environment"])
    def test_two_threads_that_ask_first_get_the_same(
        self, monkeypatch: pytest.MonkeyPatch, name: str, make_manager: MakeManager
    ) -> None:
        stranger = visitor(make_manager())
        gate = Gate()
        monkeypatch.setattr(Lifetime, "transition", gate)
        with ThreadPoolExecutor(2) as pool, gate.lock:
            asked = [pool.submit(getattr, stranger, name) for _ in range(2)]
            for _ in asked:
                assert gate.waiting.acquire(timeout=10), "nobody waits for the lock"
        first, second = [future.result(10) for future in asked]
        assert first is second

    def test_settings_are_its_own(self, context: UserExecutionContext, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REGION", "eu")
        context = create_isolated_execution_context("alice")
        context.environment.set("REGION", "us")
        assert context.environment.get("REGION") == "us"
        assert create_isolated_execution_context("alice").environment.get("REGION") == "eu"

    def test_settings_are_gone_with_it_for_whoever_kept_them(self) -> None:
        context = create_isolated_execution_context("alice")
        settings = context.environment
        settings.set("API_KEY", "secret")
        context.close()
        assert settings.get("API_KEY") is None


class TestBinding:
    def test_it_stays_the_same_object_with_the_same_ids(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        stranger = visitor(manager)
        request_id, thread_id = stranger.request_id, stranger.thread_id
        stranger.bind("alice")
        assert (stranger.user_id, stranger.is_anonymous) == ("alice", False)
        assert (stranger.request_id, stranger.thread_id) == (request_id, thread_id)
        assert manager.get_context(("alice", request_id)) is stranger

    def test_data_of_before_is_kept(self, make_manager: MakeManager) -> None:
        stranger = visitor(make_manager())
        stranger.agent_context["cart"] = ["tea"]
        stranger.bind("alice")
        assert stranger.agent_context == {"cart": ["tea"]}

    def test_expired_credentials_bind_nobody(self, make_manager: MakeManager) -> None:
        stranger = visitor(make_manager())
        with pytest.raises(UnauthenticatedError):
            stranger.bind(Principal("alice", datetime.now(UTC) - timedelta(seconds=1)))
        assert stranger.is_anonymous

    def test_what_is_opened_at_the_same_moment_keeps_the_stranger_a_stranger(
        self, monkeypatch: pytest.MonkeyPatch, make_manager: MakeManager
    ) -> None:
        stranger = visitor(make_manager())
        become = UserExecutionContext._become

        def after_a_child(context: UserExecutionContext, user_id: str) -> bool:
            context.create_child_context("of another thread")
            return become(context, user_id)

        monkeypatch.setattr(UserExecutionContext, "_become", after_a_child)
        with pytest.raises(IdentityConflictError):
            stranger.bind("alice")
        assert stranger.is_anonymous

    def test_what_does_not_vouch_for_itself_is_not_bound(self, make_manager: MakeManager) -> None:
        # The record of the binding says that it was verified.
        stranger = visitor(make_manager())
        refusing = mock.patch.object(stranger, "verify_isolation", side_effect=ContextIsolationError("x", []))
        with refusing, pytest.raises(ContextIsolationError):
            stranger.bind("alice")
        assert stranger.is_anonymous

    def test_credentials_that_are_said_later_end_it_too(self) -> None:
        manager = UserContextManager()
        known, by_hand = manager.create_isolated_context("alice"), create_isolated_execution_context("alice")
        for context in (known, by_hand):
            context.bind(Principal("alice", datetime.now(UTC) + timedelta(hours=1)))
            assert context.is_open
            context.bind(Principal("alice", datetime.now(UTC) + timedelta(seconds=0.05)))
            wait_until(lambda context=context: is_over(context), "the credentials have ended")  # type: ignore[misc]

    def test_a_child_of_a_user_has_that_user(self, make_manager: MakeManager) -> None:
        stranger = visitor(make_manager())
        stranger.bind("alice")
        child = stranger.create_child_context("part")
        child.bind("alice")
        with pytest.raises(IdentityConflictError):
            child.bind("bob")


class TestChildren:
    def test_a_child_has_the_ids_and_the_session_of_its_parent(self) -> None:
        session = object()
        parent = create_isolated_execution_context("alice", db_session=session, websocket_client_id="w-1")
        child = parent.create_child_context("search")
        assert child.db_session is session
        assert (child.user_id, child.thread_id, child.run_id) == ("alice", parent.thread_id, parent.run_id)
        assert child.websocket_client_id == "w-1"
        assert child.request_id != parent.request_id
        assert (child.parent_request_id, child.operation_depth) == (parent.request_id, 1)
        parent.close()

    def test_it_has_a_copy_of_the_data_and_gives_nothing_back(self, context: UserExecutionContext) -> None:
        child = context.create_child_context("search", agent_context={"extra": 1}, audit_metadata={"ticket": 8})
        assert (child.agent_context, child.audit_metadata) == ({"plan": ["look"], "extra": 1}, {"ticket": 8})
        child.agent_context["plan"].append("search")
        assert (context.agent_context, context.audit_metadata) == ({"plan": ["look"]}, {"ticket": 7})

    def test_it_says_when_it_shares_with_its_parent(self, context: UserExecutionContext) -> None:
        child = context.create_child_context("search")
        assert child.verify_isolation() is True
        child.agent_context["mine"] = context.agent_context["mine"] = []
        with pytest.raises(ContextIsolationError, match="mine") as caught:
            child.verify_isolation()
        assert len(caught.value.findings) == 1
        child.agent_context["mine"] = context.agent_context["mine"] = Shared([])
        assert child.verify_isolation() is True

    def test_one_that_another_thread_closes_while_it_is_looked_at_is_no_fault(self) -> None:
        child = create_isolated_execution_context("alice").create_child_context("search")

        def close(frame: FrameType, event: str, function: object) -> None:
            if event == "c_return" and function is isinstance and frame.f_code.co_name == "verify_isolation":
                child.close()  # at a moment at which another thread may run, and close it

        sys.setprofile(close)
        try:
            assert child.verify_isolation() is True
        finally:
            sys.setprofile(None)
        assert not child.is_open

    def test_it_closes_with_its_parent_at_the_latest_and_leaves_the_session_to_it(self) -> None:
        session = mock.Mock(spec=["close"])
        parent = create_isolated_execution_context("alice", db_session=session)
        child, other = parent.create_child_context("search"), parent.create_child_context("write")
        released: list[str] = []
        other.callback(released.append, "of the child")
        parent.callback(released.append, "of the parent")
        child.close()
        session.close.assert_not_called()
        parent.close()
        assert (child.is_open, other.is_open) == (False, False)
        assert released == ["of the child", "of the parent"]
        session.close.assert_called_once_with()

    def test_a_hundred_live_ones_at_a_time_and_ten_deep(self, context: UserExecutionContext) -> None:
        children = [context.create_child_context("part") for _ in range(100)]
        with pytest.raises(ContextLimitError) as caught:
            context.create_child_context("one too many")
        assert (caught.value.scope, caught.value.limit) == ("children", 100)
        children[50].close()
        deep = context.create_child_context("again")
        for _ in range(9):
            deep = deep.create_child_context("deeper")
        with pytest.raises(ContextLimitError) as caught:
            deep.create_child_context("too deep")
        assert (caught.value.scope, caught.value.limit) == ("depth", 10)

    @pytest.mark.parametrize("name", ["", " ", "a\nb", "a" * 300, None, 7], ids=lambda name: repr(name)[:8])
    def test_an_operation_needs_a_name_for_the_record(self, context: UserExecutionContext, name: Any) -> None:
        with pytest.raises(InvalidContextError, match="operation_name"):
            context.create_child_context(name)
        for fine in ("test", "a" * 256, "Suche nach Büchern"):
            assert context.create_child_context(fine).is_open


def is_over(context: UserExecutionContext) -> bool:
    try:
        context.require_usable()
    except ContextClosedError as error:
        return error.reason == "expired"
    return False


class Resource:
    """Can be entered in both ways, and notes how it was left."""

    def __init__(self) -> None:
        self.left_with: list[object] = []

    def __enter__(self) -> str:
        return "entered"

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.left_with.append(error)

    async def __aenter__(self) -> str:
        return "entered in a loop"

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await asyncio.sleep(0)
        self.left_with.append(error)


class TestResources:
    def test_entering_gives_the_value_and_closing_leaves(self, context: UserExecutionContext) -> None:
        resource = Resource()
        assert context.enter_context(resource) == "entered"
        assert resource.left_with == []
        context.close()
        assert resource.left_with == [None]

    async def test_the_same_in_a_loop(self, context: UserExecutionContext) -> None:
        resource = Resource()
        assert await context.enter_async_context(resource) == "entered in a loop"
        assert await context.aclose() == ()
        assert resource.left_with == [None]

    @pytest.mark.parametrize("owner_task", [True, False])
    async def test_what_cannot_be_entered_is_not_left(self, context: UserExecutionContext, owner_task: bool) -> None:
        @asynccontextmanager
        async def broken() -> AsyncIterator[None]:
            raise LookupError("no such thing")
            yield

        with pytest.raises(LookupError, match="no such thing"):
            await context.enter_async_context(broken(), owner_task=owner_task)
        with pytest.raises(LookupError, match="no such thing"):
            context.enter_context(broken_here())
        assert await context.aclose() == ()

    async def test_what_is_entered_the_other_way_is_told_how(self, context: UserExecutionContext) -> None:
        asynchronous: Any = asyncio.timeout(1)
        synchronous: Any = broken_here()
        neither: Any = broken_here
        with pytest.raises(ConfigurationError) as raised:
            context.enter_context(asynchronous)
        assert str(raised.value) == (
            "Timeout is an asynchronous context manager: await context.enter_async_context(...)"
        )
        with pytest.raises(ConfigurationError) as raised:
            await context.enter_async_context(synchronous)
        assert str(raised.value).endswith(" is a synchronous context manager: context.enter_context(...)")
        for entered in (lambda: context.enter_context(neither), lambda: context.enter_async_context(neither)):
            with pytest.raises(ConfigurationError, match="broken_here is no context manager"):
                await entered()
        assert await context.aclose() == ()

    async def test_what_fails_on_its_way_in_is_not_taken_for_that(self, context: UserExecutionContext) -> None:
        @contextmanager
        def failing() -> Iterator[None]:
            raise AttributeError("of its own")
            yield

        with pytest.raises(AttributeError, match="of its own"):
            context.enter_context(failing())

    def test_a_callback_gets_its_arguments(self, context: UserExecutionContext) -> None:
        callback = mock.Mock()
        context.callback(callback, 1, key="word")
        context.close()
        callback.assert_called_once_with(1, key="word")

    async def test_aclose_goes_before_close(self, context: UserExecutionContext) -> None:
        both = mock.Mock(spec=["close", "aclose"], aclose=mock.AsyncMock())
        assert context.closing(both) is both
        await context.aclose()
        both.aclose.assert_awaited_once_with()
        both.close.assert_not_called()

    async def test_a_close_that_returns_an_awaitable_is_awaited(self, context: UserExecutionContext) -> None:
        closed: list[str] = []

        async def close() -> None:
            await asyncio.sleep(0)
            closed.append("it")

        context.closing(mock.Mock(spec=["close"], close=mock.Mock(side_effect=close)))
        assert await context.aclose() == ()
        assert closed == ["it"]

    def test_what_cannot_be_closed_is_refused(self, context: UserExecutionContext) -> None:
        with pytest.raises(ConfigurationError, match="object has neither"):
            context.closing(object())

    def test_what_comes_too_late_is_let_go_of_at_once(self, context: UserExecutionContext) -> None:
        late = mock.Mock(spec=["close"])

        class Slow(Resource):
            def __enter__(self) -> str:
                context.close()  # as another thread may, meanwhile
                return "entered"

        slow = Slow()
        with pytest.raises(ContextClosedError):
            context.enter_context(slow)
        assert len(slow.left_with) == 1
        with pytest.raises(ContextClosedError):
            context.closing(late)
        late.close.assert_called_once_with()

    def test_a_resource_sees_an_error_when_the_work_was_cut_off(self, context: UserExecutionContext) -> None:
        resource = Resource()
        context.enter_context(resource)
        context.close("expired")
        [error] = resource.left_with
        assert isinstance(error, ContextClosedError)
        assert error.reason == "expired"

    async def test_failures_are_returned_and_named(
        self, context: UserExecutionContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        @contextmanager
        def stubborn() -> Iterator[None]:
            yield
            raise LookupError("no way out")

        context.enter_context(stubborn(), name="the door")
        [failure] = await context.aclose()
        assert (failure.name, failure.outcome) == ("the door", "failed")
        assert isinstance(failure.error, LookupError)
        assert "the door" in caplog.text

    def test_closing_again_changes_nothing(self, context: UserExecutionContext) -> None:
        context.close("cleared")
        context.close("expired")
        with pytest.raises(ContextClosedError, match="cleared"):
            context.verify_isolation()


def broken_here() -> AbstractContextManager[None]:
    @contextmanager
    def broken() -> Iterator[None]:
        raise LookupError("no such thing")
        yield

    return broken()


class TestViews:
    def test_a_dict_has_identity_metadata_and_the_names_of_the_data(self, context: UserExecutionContext) -> None:
        shown = context.to_dict()
        assert json.loads(json.dumps(shown)) == shown
        assert shown == {
            "user_id": "alice",
            "thread_id": context.thread_id,
            "run_id": context.run_id,
            "request_id": "r-1",
            "websocket_client_id": None,
            "created_at": context.created_at.isoformat(),
            "operation_depth": 0,
            "parent_request_id": None,
            "is_anonymous": False,
            "state": "open",
            "has_db_session": False,
            "agent_context_keys": ["plan"],
            "audit_metadata": {"ticket": 7},
        }

    def test_a_trail_has_identity_age_and_metadata(self, context: UserExecutionContext) -> None:
        trail = context.get_audit_trail()
        assert trail["context_age_seconds"] >= 0
        assert (trail["user_id"], trail["request_id"], trail["ticket"]) == ("alice", "r-1", 7)
        assert "plan" not in repr(trail)

    def test_they_are_copies(self, context: UserExecutionContext) -> None:
        context.to_dict()["audit_metadata"]["ticket"] = 8
        assert context.audit_metadata == {"ticket": 7}

    def test_identity_wins_over_metadata_put_in_later(self, context: UserExecutionContext) -> None:
        context.audit_metadata.update({"user_id": "bob", "request_id": "forged"})
        for view in (context.to_dict(), context.get_audit_trail()):
            assert (view["user_id"], view["request_id"]) == ("alice", "r-1")

    def test_no_data_makes_them_fail(self, context: UserExecutionContext) -> None:
        context.audit_metadata["lock"] = threading.Lock()
        odd: dict[Any, Any] = context.agent_context
        odd[7] = None
        assert "lock" in context.to_dict()["audit_metadata"]["lock"]
        assert "lock" in context.get_audit_trail()["lock"]

    def test_they_answer_after_the_end(self, context: UserExecutionContext) -> None:
        context.close()
        assert context.to_dict()["state"] == context.get_audit_trail()["state"] == "closed"
        assert context.to_dict()["audit_metadata"] == {}
        assert "closed" in repr(context)

    def test_a_patch_survives_the_end_of_the_context(self, context: UserExecutionContext) -> None:
        with mock.patch.object(context, "get_audit_trail", return_value={}):
            context.close()
        assert context.get_audit_trail()["user_id"] == "alice"

    def test_no_metadata_breaks_a_rule_unnoticed(self) -> None:
        with pytest.raises(InvalidContextError) as caught:
            create_isolated_execution_context("alice", audit_metadata={"a": {"b": [threading.Lock()]}})
        assert caught.value.field == "audit_metadata['a']['b'][0]"


def test_what_has_closed_gets_no_identity_any_more() -> None:
    # A bind that was on its way when the context closed.
    context = visitor(UserContextManager())
    anonymous_id = context.user_id
    context.close()
    assert context._become("alice") is False
    assert (context.user_id, context.is_open) == (anonymous_id, False)
