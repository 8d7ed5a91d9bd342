"""Owned handles: who may use them, until when, and what passes through them."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import pytest

from support.clock import Clock
from support.contexts import events, running_as, visitor
from ucm_middleware import (
    EVERYONE,
    ContextClosedError,
    CrossUserAccessError,
    HandleRevokedError,
    IdentityConflictError,
    InvalidContextError,
    Shared,
    UserContextManager,
    UserExecutionContext,
    create_isolated_execution_context,
    hookimpl,
    managed_user_context,
    revoke_handle,
)

pytestmark = pytest.mark.security


class Session:
    """What an adapter would give out, and notes each call that reaches it."""

    secret = "hunter2"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __repr__(self) -> str:
        return f"Session({self.secret})"

    def call(self, text: str) -> str:
        self.calls.append(text)
        return text.upper()

    async def acall(self, text: str) -> str:
        self.calls.append(text)
        await asyncio.sleep(0)
        return text.upper()

    def later(self, text: str) -> Any:
        return self.acall(text)

    def itself(self) -> "Session":
        return self

    async def aitself(self) -> "Session":
        return self

    def later_itself(self) -> Any:
        return self.aitself()

    def itself_in_the_end(self) -> Generator[int, None, "Session"]:
        yield 1
        return self

    def rows(self) -> Iterator[int]:
        for row in range(3):
            self.calls.append(f"row {row}")
            yield row

    async def arows(self) -> AsyncIterator[int]:
        for row in range(3):
            self.calls.append(f"row {row}")
            yield row

    @contextmanager
    def begin(self) -> Iterator["Session"]:
        self.calls.append("begin")
        try:
            yield self
        except BaseException as error:
            self.calls.append(f"rollback {type(error).__name__}")
            raise
        self.calls.append("commit")

    @property
    def last(self) -> str:
        self.calls.append("property")
        return self.calls[-1]

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *error: object) -> None:
        self.calls.append("closed")


USES: dict[str, Callable[[Session], Any]] = {
    "method": lambda handle: handle.call("a"),
    "attribute": lambda handle: handle.calls,
    "property": lambda handle: handle.last,
    "assignment": lambda handle: setattr(handle, "secret", "x"),
    "deletion": lambda handle: delattr(handle, "calls"),
    "async method": lambda handle: handle.acall("a"),
    "iterator": lambda handle: handle.rows(),
    "context manager": lambda handle: handle.begin(),
    "by name": lambda handle: vars(handle),
}
uses = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager()


@pytest.fixture
def alice(manager: UserContextManager) -> Iterator[UserExecutionContext]:
    context = manager.create_isolated_context("alice")
    yield context
    context.close()


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def handle(alice: UserExecutionContext, session: Session) -> Session:
    return alice.own(session)


class TestWhoMayUseIt:
    def test_its_own_context(self, alice: UserExecutionContext, handle: Session) -> None:
        with managed_user_context(alice):
            assert handle.call("a") == "A"
            assert handle.last == "property"
            handle.secret = "b"
            assert handle.secret == "b"
            del handle.secret
            assert handle.secret == "hunter2"

    @uses
    def test_another_users_code_is_refused_and_recorded(
        self, manager: UserContextManager, handle: Session, session: Session, use: Callable[[Session], Any]
    ) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError) as refused:
            use(handle)
        assert session.calls == []
        assert session.secret == "hunter2"
        assert "alice" not in str(refused.value)
        [denied] = events(manager, "bob", "denied")
        assert (denied["action"], denied["asked_for"]) == ("handle Session", "alice")

    @uses
    def test_refused_in_the_same_words_when_it_is_closed(
        self,
        manager: UserContextManager,
        alice: UserExecutionContext,
        handle: Session,
        use: Callable[[Session], Any],
    ) -> None:
        with running_as(manager, "bob"):
            with pytest.raises(CrossUserAccessError) as before:
                use(handle)
            with manager.privileged(reason="a test", users=["alice"]):
                alice.close()
            with pytest.raises(CrossUserAccessError) as after:
                use(handle)
        assert str(before.value) == str(after.value)
        assert len(events(manager, "bob", "denied")) == 2

    def test_another_context_of_the_user_and_a_child_are_fine(
        self, manager: UserContextManager, alice: UserExecutionContext, handle: Session
    ) -> None:
        with running_as(manager, "alice"):
            assert handle.call("a") == "A"
        with managed_user_context(alice.create_child_context("a part")):
            assert handle.call("a") == "A"

    def test_code_that_outlived_its_own_context_is_refused(self, manager: UserContextManager, handle: Session) -> None:
        with running_as(manager, "alice"):
            inherited = copy_context()
        with pytest.raises(ContextClosedError):
            inherited.run(handle.call, "a")

    def test_nor_does_it_leave_a_block_for_the_owner(
        self, manager: UserContextManager, handle: Session, session: Session
    ) -> None:
        with running_as(manager, "bob"):
            inherited = copy_context()
        block = handle.begin()
        block.__enter__()
        with pytest.raises(ContextClosedError):
            inherited.run(block.__exit__, None, None, None)
        assert session.calls == ["begin"]
        block.__exit__(None, None, None)

    def test_a_grant_that_names_the_user(self, manager: UserContextManager, handle: Session) -> None:
        with running_as(manager, "bob"):
            with manager.privileged(reason="a test", users=["carol"]), pytest.raises(CrossUserAccessError):
                handle.call("a")
            with manager.privileged(reason="a test", users=["alice"]):
                assert handle.call("a") == "A"
            with pytest.raises(CrossUserAccessError):
                handle.call("a")

    def test_code_in_no_context_was_given_the_handle(
        self, manager: UserContextManager, handle: Session, session: Session
    ) -> None:
        manager.serve()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(handle.call, "a").result() == "A"
        assert session.calls == ["a"]

    def test_contexts_under_no_manager(self, session: Session) -> None:
        alice, bob = create_isolated_execution_context("alice"), create_isolated_execution_context("bob")
        handle = alice.own(session)
        assert handle.call("a") == "A"
        with managed_user_context(bob), pytest.raises(CrossUserAccessError):
            handle.call("a")
        with managed_user_context(alice):
            assert handle.call("a") == "A"

    def test_a_context_made_by_hand_is_refused_and_recorded_before_and_after_the_teardown(
        self, manager: UserContextManager, alice: UserExecutionContext, handle: Session
    ) -> None:
        manager.serve()
        bob = create_isolated_execution_context("bob")
        with managed_user_context(bob):
            with pytest.raises(CrossUserAccessError):
                handle.call("a")
            Context().run(alice.close)
            with pytest.raises(CrossUserAccessError):
                handle.call("a")
        with manager.privileged(reason="a test", users=EVERYONE):
            trail = manager.get_system_trail()
        assert [record["asked_for"] for record in trail if record["event"] == "denied"] == ["alice", "alice"]

    def test_what_was_given_to_a_visitor_cannot_change_hands(self, manager: UserContextManager) -> None:
        anonymous = visitor(manager)
        anonymous.own(Session())
        with pytest.raises(IdentityConflictError):
            anonymous.bind("alice")
        anonymous.close()


class TestUntilWhen:
    @uses
    def test_after_the_teardown_it_names_where_it_was_made(
        self, alice: UserExecutionContext, session: Session, use: Callable[[Session], Any]
    ) -> None:
        handle = alice.own(session, name="the database")
        alice.close()
        with pytest.raises(ContextClosedError) as refused:
            use(handle)
        assert session.calls == []
        assert refused.value.request_id == alice.request_id
        assert refused.value.handle is not None
        assert refused.value.handle.startswith(f"the database, made at {__file__}:")
        assert refused.value.handle in str(refused.value)

    def test_from_the_deadline_on(self) -> None:
        clock = Clock()
        manager = UserContextManager(clock=clock)
        context = create_isolated_execution_context("alice")
        manager.set_context("alice", context, 10)
        handle, child = context.own(Session()), context.create_child_context("a part")
        childs = child.own(Session())
        with managed_user_context(context):
            handle.call("a")
            with managed_user_context(child):
                childs.call("a")
                clock.advance(10)
                for expired in (handle, childs):
                    with pytest.raises(ContextClosedError):
                        expired.call("a")

    def test_its_releases_may_use_it(self, alice: UserExecutionContext, session: Session) -> None:
        seen: list[Session] = []
        alice.callback(lambda: seen[0].call("entered before"))
        seen.append(alice.own(session))
        child = alice.create_child_context("a part")
        child.callback(lambda: seen[0].call("the child's"))
        alice.callback(lambda: seen[0].call("entered after"))
        alice.close()
        assert session.calls == ["the child's", "entered after", "entered before"]
        assert alice.lifetime.failures == ()

    async def test_its_asynchronous_releases_may_use_it(self, alice: UserExecutionContext, session: Session) -> None:
        handle = alice.own(session)
        alice.callback(handle.acall, "released")
        await alice.aclose()
        assert session.calls == ["released"]

    def test_other_code_may_not_while_it_is_closing(self, alice: UserExecutionContext, handle: Session) -> None:
        refused: list[Exception] = []

        def elsewhere() -> None:
            try:
                handle.call("a")
            except ContextClosedError as error:
                refused.append(error)

        def release() -> None:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

        alice.callback(release)
        alice.close()
        assert len(refused) == 1

    @pytest.mark.parametrize("obeys", [True, False])
    async def test_a_block_can_be_left_while_it_closes_and_does_not_commit(
        self, alice: UserExecutionContext, handle: Session, session: Session, obeys: bool
    ) -> None:
        async def close() -> None:
            alice.close("revoked")

        closing: list[asyncio.Task[None]] = []
        with pytest.raises(ContextClosedError):
            async with managed_user_context(alice):
                closing.append(asyncio.create_task(close(), context=Context()))
                with handle.begin():
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        if obeys:
                            raise
        await closing[0]
        assert session.calls == ["begin", f"rollback {'CancelledError' if obeys else 'ContextClosedError'}"]

    def test_a_thread_that_outlives_the_request(self, alice: UserExecutionContext, handle: Session) -> None:
        closed = threading.Event()

        def tool() -> None:
            assert closed.wait(10)
            handle.call("a")

        with ThreadPoolExecutor(1) as pool, managed_user_context(alice):
            running = pool.submit(copy_context().run, tool)
            alice.close()
            closed.set()
            with pytest.raises(ContextClosedError):
                running.result()

    def test_it_keeps_nothing_alive_after_the_teardown(self, alice: UserExecutionContext) -> None:
        session = Session()
        gone = weakref.ref(session)
        handle = alice.own(session)
        kept = (handle, handle.call, handle.rows(), handle.begin())
        del session
        assert gone() is not None
        alice.close()
        assert gone() is None
        assert len(kept) == 4

    def test_a_context_remembers_no_handle_that_is_gone(self, alice: UserExecutionContext) -> None:
        session = Session()
        gone = weakref.ref(session)
        handle = alice.own(session)
        del session
        rows = handle.rows()
        del handle
        assert list(rows) == [0, 1, 2]
        del rows
        assert gone() is None
        assert alice._handles == {}

    def test_it_leaves_nothing_for_the_cycle_collector(self, manager: UserContextManager) -> None:
        def request() -> None:
            context = manager.create_isolated_context("alice")
            with managed_user_context(context):
                handle = context.own(Session())
                context.agent_context["tools"] = {"session": handle, "call": handle.call, "rows": handle.rows()}
                handle.call("a")
                with handle.begin() as entered:
                    entered.call("b")

        request()
        gc.collect()
        gc.disable()
        try:
            request()
            assert gc.collect() == 0
        finally:
            gc.enable()


class TestRevoked:
    @uses
    def test_at_once_with_all_that_came_out_of_it(
        self, alice: UserExecutionContext, handle: Session, session: Session, use: Callable[[Session], Any]
    ) -> None:
        method, rows = handle.call, handle.rows()
        other = alice.own(session)
        revoke_handle(handle)
        revoke_handle(handle)
        for used in (lambda: use(handle), lambda: method("a"), lambda: next(rows)):
            with pytest.raises(HandleRevokedError, match=r"Session, made at .*test_handles.py:\d+"):
                used()
        assert session.calls == []
        assert other.call("a") == "A"

    @uses
    def test_in_its_own_context_too(
        self, alice: UserExecutionContext, handle: Session, session: Session, use: Callable[[Session], Any]
    ) -> None:
        with managed_user_context(alice):
            method, rows = handle.call, handle.rows()
            revoke_handle(handle)
            for used in (lambda: use(handle), lambda: method("a"), lambda: next(rows)):
                with pytest.raises(HandleRevokedError):
                    used()
        assert session.calls == []

    def test_in_a_thread_that_is_using_it(self, handle: Session) -> None:
        started, outcome = threading.Event(), []

        def tool() -> None:
            try:
                while True:
                    handle.call("a")
                    started.set()
            except HandleRevokedError as error:
                outcome.append(error)

        thread = threading.Thread(target=tool)
        thread.start()
        assert started.wait(10)
        revoke_handle(handle)
        thread.join(10)
        assert len(outcome) == 1

    def test_a_block_can_be_left_and_does_not_commit(self, handle: Session, session: Session) -> None:
        with pytest.raises(HandleRevokedError), handle.begin():
            revoke_handle(handle)
        assert session.calls == ["begin", "rollback HandleRevokedError"]

    def test_not_by_another_user(self, manager: UserContextManager, handle: Session) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            revoke_handle(handle)
        assert handle.call("a") == "A"

    def test_only_handles(self, session: Session) -> None:
        with pytest.raises(InvalidContextError, match="Session, not owned"):
            revoke_handle(session)


class TestWhatComesOut:
    def test_the_target_comes_out_as_the_handle(self, handle: Session) -> None:
        assert handle.itself() is handle
        with handle.begin() as entered:
            assert entered is handle

    async def test_also_where_it_is_awaited(self, handle: Session) -> None:
        assert await handle.aitself() is handle
        assert await asyncio.create_task(handle.aitself()) is handle
        assert await handle.later_itself() is handle
        assert await asyncio.create_task(handle.later_itself()) is handle
        async with handle as entered:
            assert entered is handle

    def test_also_where_a_generator_returns_it(self, handle: Session) -> None:
        for step in (next, lambda generator: generator.send(None)):
            steps = handle.itself_in_the_end()
            assert step(steps) == 1
            with pytest.raises(StopIteration) as stop:
                step(steps)
            assert stop.value.value is handle

    def test_a_method_is_checked_when_it_is_called(self, manager: UserContextManager, handle: Session) -> None:
        method = handle.call
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            method("a")

    @pytest.mark.parametrize("name", ["acall", "later"])
    async def test_a_coroutine_is_checked_when_it_is_awaited(
        self, manager: UserContextManager, handle: Session, session: Session, name: str
    ) -> None:
        awaitable = getattr(handle, name)("a")
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await awaitable
        assert session.calls == []
        assert await getattr(handle, name)("a") == "A"
        assert await asyncio.create_task(getattr(handle, name)("a")) == "A"

    async def test_a_coroutine_that_is_never_started_leaves_no_warning(self, handle: Session) -> None:
        task = asyncio.create_task(handle.acall("a"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        handle.acall("a").close()

    def test_a_generator_is_checked_at_each_step(self, manager: UserContextManager, handle: Session) -> None:
        rows = handle.rows()
        assert next(rows) == 0
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            next(rows)
        assert list(rows) == [1, 2]

    async def test_an_async_generator_is_checked_at_each_step(
        self, manager: UserContextManager, handle: Session, session: Session
    ) -> None:
        rows = handle.arows()
        assert await anext(rows) == 0
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await anext(rows)
        step = anext(rows)
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await step
        assert session.calls == ["row 0"]
        assert [row async for row in rows] == [1, 2]

    def test_a_context_manager_is_checked_when_it_is_entered(
        self, manager: UserContextManager, handle: Session, session: Session
    ) -> None:
        begun = handle.begin()
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError), begun:
            pass
        assert session.calls == []
        with handle.begin():
            pass
        assert session.calls == ["begin", "commit"]

    def test_what_is_entered_is_owned(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        @contextmanager
        def connect(given: Any) -> Iterator[Any]:
            yield given

        pool = alice.own(connect)

        class Connection:
            def run(self) -> str:
                return "ran"

        with pool(Connection()) as connection, pool([1]) as rows:
            assert connection.run() == "ran"
            assert type(rows) is list
            with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
                connection.run()

    def test_what_a_plugin_names_is_owned(self) -> None:
        class Statement:
            def run(self) -> str:
                return "ran"

        class Connection:
            statement = Statement()

        class Names:
            @hookimpl
            def ucm_owned_types(self) -> list[type]:
                return [Statement]

        manager = UserContextManager(plugins=[Names()])
        statement = manager.create_isolated_context("alice").own(Connection()).statement
        assert isinstance(statement, Statement)
        assert statement.run() == "ran"
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            statement.run()
        manager.cleanup_all_contexts()

    def test_plain_data_is_given_as_it_is(self, handle: Session, session: Session) -> None:
        assert handle.calls is session.calls


class TestAsAnObject:
    def test_its_repr_shows_no_more_than_what_it_is(self, alice: UserExecutionContext, handle: Session) -> None:
        shown = f"<owned Session of {alice.request_id} open>"
        assert (repr(handle), str(handle), f"{handle}", f"{handle!r:>1}") == (shown,) * 4
        assert repr(handle.call) == f"<method call of {shown}>"
        revoke_handle(handle)
        assert repr(handle) == f"<owned Session of {alice.request_id} revoked>"
        other = alice.own(Session())
        alice.close()
        assert repr(other) == f"<owned Session of {alice.request_id} closed>"

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_it_is_neither_copied_nor_pickled(self, handle: Session, copied: Callable[[Any], Any]) -> None:
        for owned in (handle, handle.call):
            with pytest.raises(TypeError, match="not copied or pickled"):
                copied(owned)

    def test_what_cannot_be_owned(self, alice: UserExecutionContext, handle: Session) -> None:
        plain: Any
        for plain in (None, 1, "text", [1], {}, Session, copy):
            with pytest.raises(InvalidContextError, match="plain data"):
                alice.own(plain)
        for target in (handle, handle.call):
            with pytest.raises(InvalidContextError, match="owned already"):
                alice.own(target)

    def test_none_is_made_by_a_context_that_has_closed(self, alice: UserExecutionContext) -> None:
        alice.close()
        with pytest.raises(ContextClosedError):
            alice.own(Session())


@dataclass
class Box:
    content: Any


class TestAtTheBoundary:
    @pytest.mark.parametrize("wrap", [lambda it: it, lambda it: [{"deep": it}], Box], ids=["itself", "deep", "object"])
    def test_it_passes_as_itself_to_the_same_user(
        self, alice: UserExecutionContext, session: Session, handle: Session, wrap: Callable[[Any], Any]
    ) -> None:
        alice.agent_context["tool"] = wrap(handle)
        child = alice.create_child_context("a part", agent_context={"given": handle, "call": handle.call})
        assert child.agent_context["given"] is handle
        assert child.agent_context["call"] == handle.call
        inner = child.agent_context["tool"]
        while type(inner) in (list, dict, Box):
            inner = inner[0] if type(inner) is list else inner["deep"] if type(inner) is dict else inner.content
        assert inner is handle
        assert child.verify_isolation()
        childs = child.own(session)
        assert childs.call("a") == "A"
        assert child.verify_isolation()

    @pytest.mark.parametrize("wrap", [lambda it: it, lambda it: [{"deep": it}], Box], ids=["itself", "deep", "object"])
    def test_it_is_refused_in_the_data_of_another_user(self, handle: Session, wrap: Callable[[Any], Any]) -> None:
        with pytest.raises(
            InvalidContextError, match=r"not of the user that the data is for|cannot be copied"
        ) as error:
            create_isolated_execution_context("bob", agent_context={"tool": wrap(handle)})
        assert error.value.field.startswith("agent_context['tool']")

    def test_shared_lets_it_through_and_its_use_is_still_checked(
        self, manager: UserContextManager, handle: Session
    ) -> None:
        bob = create_isolated_execution_context("bob", agent_context={"tool": Shared(handle)})
        manager.set_context("bob", bob)
        with managed_user_context(bob), pytest.raises(CrossUserAccessError):
            bob.agent_context["tool"].value.call("a")

    def test_a_record_shows_its_type(self, manager: UserContextManager, alice: UserExecutionContext) -> None:
        alice.audit_metadata["tool"] = alice.own(Session())
        alice.close()
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        assert trail["tool"] == "<Session>"


def findings_of(manager: UserContextManager) -> list[str]:
    """Without where the target is besides: pytest has a fixture's value too, which is found where there is time."""
    return [str(finding).partition(", which is ")[0] for finding in manager.isolation_report().findings]


class TestTheSearchForWhatIsShared:
    def test_two_users_handles_of_one_target_are_found(
        self, manager: UserContextManager, alice: UserExecutionContext, session: Session
    ) -> None:
        bob = manager.create_isolated_context("bob")
        kept = [alice.own(session, name="db"), bob.own(Session())]
        assert manager.validate_isolation()
        kept.append(bob.own(session, name="db"))
        assert findings_of(manager) == ["alice.db is bob.db (Session)"]
        bob.close()

    def test_a_handle_that_got_into_another_users_data_is_found(
        self, manager: UserContextManager, alice: UserExecutionContext, handle: Session
    ) -> None:
        bob = manager.create_isolated_context("bob")
        alice.agent_context["tool"] = [handle]
        assert manager.validate_isolation()
        bob.agent_context["tool"] = [handle]
        assert findings_of(manager) == ["alice.Session is bob.agent_context['tool'][0]<target> (Session)"]
        bob.agent_context["tool"] = handle.call
        assert not manager.validate_isolation()
        bob.close()
