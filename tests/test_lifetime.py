"""The life of a context: one closer, releases in reverse under deadlines, on the right thread, whatever goes wrong."""

import asyncio
import gc
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from contextvars import Context
from functools import partial
from types import TracebackType
from typing import Any, cast

import anyio
import pytest

from support.contexts import MakeManager
from support.waiting import PATIENCE, wait_until
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
)
from ucm_middleware.lifetime import CloseReason, Lifetime, State
from ucm_middleware.types import Message, Receive, Scope, Send

TINY = 0.002  # seconds, for what will not let go however long it is given

Log = list[str]


@pytest.fixture
def context() -> UserExecutionContext:
    return create_isolated_execution_context("alice")


@pytest.fixture
def log() -> Log:
    return []


def of_user(manager: UserContextManager, user: str = "alice") -> UserExecutionContext:
    return manager.create_isolated_context(user)


def failures_of(context: UserExecutionContext) -> dict[str, str]:
    """What is reported of a context: the outcome by the name of the resource."""
    assert repr(context).endswith("closed>")
    return {failure.name: failure.outcome for failure in context.lifetime.failures}


class Thing:
    """A resource of either kind that writes down how it is left, and with what error."""

    def __init__(self, log: Log, name: str = "thing", leave: Callable[[], Awaitable[object]] | None = None) -> None:
        self.log = log
        self.name = name
        self.leave = leave
        self.seen: BaseException | None = None

    def __enter__(self) -> "Thing":
        self.log.append(f"{self.name} entered")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seen = error
        self.log.append(f"{self.name} left")

    async def __aenter__(self) -> "Thing":
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leave is not None:
            await self.leave()
        self.__exit__(kind, error, trace)


async def one_turn() -> None:
    await asyncio.sleep(0)


@pytest.fixture
def complaints() -> Iterator[list[dict[str, Any]]]:
    """What the loop of the test is told that nobody looks after. Install with ``listen``."""
    told: list[dict[str, Any]] = []
    yield told
    assert told == []


def listen(told: list[dict[str, Any]]) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _, about: told.append(about))


@pytest.mark.usefixtures("threads_switch_often")
class TestOneCloser:
    def at_once(self, work: Callable[[], object], threads: int = 8) -> list[object]:
        """The results of as many threads that begin together."""
        results: list[object] = []
        together = threading.Barrier(threads)

        def begin() -> None:
            together.wait()
            results.append(work())

        runners = [threading.Thread(target=begin) for _ in range(threads)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        return results

    def test_one_of_many_threads_begins_the_closing(self) -> None:
        for _ in range(100):
            lifetime = Lifetime.begin(State.OPEN, "a test")
            results = self.at_once(lambda lifetime=lifetime: lifetime.begin_closing("closed"))  # type: ignore[misc]
            assert sorted(results) == [False] * 7 + [True]  # type: ignore[type-var]

    def test_many_closers_release_once_and_leave_nothing_in_the_registry(self) -> None:
        manager = UserContextManager()
        for _ in range(100):
            released: list[int] = []
            context = of_user(manager)
            context.callback(released.append, 1)
            self.at_once(context.close, 4)
            wait_until(lambda context=context: "closed>" in repr(context), "it is closed")  # type: ignore[misc]
            assert released == [1]
            assert len(manager._registry) == 0

    def test_a_closer_that_comes_before_the_first_has_said_so_leaves_it_to_that_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        say_closing = UserExecutionContext._say_closing

        def racing(context: UserExecutionContext) -> object:
            second = threading.Thread(target=context.close)
            second.start()
            second.join()
            return say_closing(context)

        monkeypatch.setattr(UserExecutionContext, "_say_closing", racing)
        manager, released = UserContextManager(), list[int]()
        context = of_user(manager)
        context.callback(released.append, 1)
        context.close()
        assert released == [1]
        assert failures_of(context) == {}
        assert len(manager._registry) == 0

    def test_what_is_added_while_others_close_is_released_too(self) -> None:
        for _ in range(100):
            context = create_isolated_execution_context("alice")
            released: list[int] = []
            turns = iter(range(8))

            def add_or_close(
                context: UserExecutionContext = context,
                released: list[int] = released,
                turns: Iterator[int] = turns,
            ) -> int:
                if next(turns) == 5:
                    context.close()
                    return 0
                with suppress(ContextClosedError):
                    context.callback(released.append, 1)
                return 1

            added = self.at_once(add_or_close)
            wait_until(lambda context=context: "closed>" in repr(context), "it is closed")  # type: ignore[misc]
            assert len(released) == sum(cast("list[int]", added))

    async def test_a_second_closer_waits_for_the_first(self, context: UserExecutionContext, log: Log) -> None:
        going_on = asyncio.Event()
        await context.enter_async_context(Thing(log, leave=going_on.wait))
        first, second = asyncio.create_task(context.aclose()), asyncio.create_task(context.aclose("cleared"))
        await one_turn()
        await one_turn()
        assert not first.done()
        assert not second.done()
        going_on.set()
        assert (await first, await second) == ((), ())
        assert log == ["thing entered", "thing left"]
        assert context.lifetime.reason == "closed"

    async def test_who_waits_for_the_first_is_cancelled_after(self, context: UserExecutionContext, log: Log) -> None:
        going_on = asyncio.Event()
        await context.enter_async_context(Thing(log, leave=going_on.wait))
        first, second = asyncio.create_task(context.aclose()), asyncio.create_task(context.aclose())
        await one_turn()
        second.cancel()
        await one_turn()
        assert not second.done()
        going_on.set()
        await asyncio.wait([first, second])
        assert second.cancelled()
        assert first.result() == ()


class TestTooLate:
    """What comes when the teardown has begun is let go of, and refused."""

    async def test_every_kind_of_resource(self, context: UserExecutionContext, log: Log) -> None:
        closing, closed = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            closing.set()
            await closed.wait()

        await context.enter_async_context(Thing([], leave=hold))
        teardown = asyncio.create_task(context.aclose())
        await closing.wait()
        with pytest.raises(ContextClosedError):
            context.enter_context(Thing(log, "sync"))
        with pytest.raises(ContextClosedError):
            await context.enter_async_context(Thing(log, "async"))
        with pytest.raises(ContextClosedError):
            await context.enter_async_context(Thing(log, "owned"), owner_task=True)
        with pytest.raises(ContextClosedError):
            context.callback(log.append, "called back")
        closed.set()
        await teardown
        assert "called back" in log
        for name in ("sync", "async", "owned"):  # it need not be entered at all
            assert log.count(f"{name} entered") == log.count(f"{name} left")

    async def test_what_is_entered_too_late_is_exited_before_the_error_is_raised(
        self, context: UserExecutionContext, log: Log
    ) -> None:
        class Slow(Thing):
            async def __aenter__(self) -> "Thing":
                await context.aclose()  # as a deadline may, meanwhile
                return await super().__aenter__()

        with pytest.raises(ContextClosedError):
            await context.enter_async_context(Slow(log, leave=one_turn))
        assert log == ["thing entered", "thing left"]

    async def test_its_failures_join_the_contexts(self, context: UserExecutionContext, log: Log) -> None:
        class Slow(Thing):
            async def __aenter__(self) -> "Thing":
                await context.aclose()
                return self

        with pytest.raises(ContextClosedError):
            await context.enter_async_context(Slow(log, leave=failing), name="late")
        assert failures_of(context) == {"late": "failed"}


async def failing() -> None:
    raise OSError("no space left")


async def hanging() -> None:
    await asyncio.Event().wait()


class TestAnyio:
    async def test_a_cancelled_scope_strikes_the_teardown_at_most_once(self, context: UserExecutionContext) -> None:
        # A scope cancels again on every turn of the loop, where it can reach: a teardown of seconds would spin.
        task = asyncio.current_task()
        assert task is not None
        counts: list[int] = []

        async def count() -> None:
            for _ in range(10):
                await one_turn()
                counts.append(task.cancelling())

        with anyio.CancelScope() as scope:
            async with managed_user_context(context):
                await context.enter_async_context(Thing([], leave=count))
                scope.cancel()
        assert len(counts) == 10
        assert max(counts) <= 1


class TestDeadlines:
    @pytest.fixture(autouse=True)
    def _little_grace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ucm_middleware.lifetime.CANCEL_GRACE", TINY)

    @pytest.mark.ucm_leaks("a resource is never released, and that is reported")
    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_what_hangs_is_cut_off_and_the_others_are_released(
        self, context: UserExecutionContext, log: Log, owner_task: bool
    ) -> None:
        await context.enter_async_context(Thing(log, "below"))
        await context.enter_async_context(Thing(log, leave=hanging), owner_task=owner_task, name="slow", timeout=TINY)
        await context.enter_async_context(Thing(log, "above"))
        (failure,) = await context.aclose()
        assert (failure.name, failure.outcome) == ("slow", "timed out")
        assert isinstance(failure.error, TimeoutError)
        assert log[3:] == ["above left", "below left"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @pytest.mark.ucm_leaks("a resource is never released, and that is reported")
    async def test_each_has_a_deadline_of_its_own(self, context: UserExecutionContext, log: Log) -> None:
        for name in ("first", "second"):
            await context.enter_async_context(Thing(log, leave=hanging), name=name, timeout=TINY)
        context.closing(Closed(hanging), name="third", timeout=TINY)
        await context.aclose()
        assert failures_of(context) == {"third": "timed out", "second": "timed out", "first": "timed out"}

    @pytest.mark.ucm_leaks("a resource is never released, and that is reported")
    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_an_error_after_the_deadline_is_not_left_unseen(
        self, context: UserExecutionContext, complaints: list[dict[str, Any]], owner_task: bool
    ) -> None:
        async def answers_with_an_error() -> None:
            try:
                await hanging()
            except asyncio.CancelledError:
                raise ValueError("not like this") from None

        listen(complaints)
        thing = Thing([], leave=answers_with_an_error)
        await context.enter_async_context(thing, owner_task=owner_task, name="slow", timeout=TINY)
        await context.aclose()
        assert failures_of(context) == {"slow": "timed out"}
        del thing
        gc.collect()
        await one_turn()

    @pytest.mark.ucm_leaks("a resource is never released, and that is reported")
    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_what_will_not_be_cancelled_is_left_behind_and_its_end_is_seen(
        self,
        context: UserExecutionContext,
        complaints: list[dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
        owner_task: bool,
    ) -> None:
        going_on = asyncio.Event()

        async def stubborn() -> None:
            while not going_on.is_set():
                try:
                    await going_on.wait()
                except asyncio.CancelledError:
                    continue
            raise ValueError("at last")

        listen(complaints)
        await context.enter_async_context(Thing([], leave=stubborn), owner_task=owner_task, name="slow", timeout=TINY)
        (failure,) = await context.aclose()
        assert failure.outcome == "timed out"
        assert "left running" in str(failure.error)
        going_on.set()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
        await one_turn()
        gc.collect()
        assert owner_task or "at last" in caplog.text


class Closed:
    """An object whose close() returns an awaitable."""

    def __init__(self, closing: Callable[[], Awaitable[object]]) -> None:
        self.closing = closing

    def close(self) -> Awaitable[object]:
        return self.closing()


class TestReplacing:
    def test_what_the_new_one_holds_is_kept(self, log: Log) -> None:
        class Pool:
            def close(self) -> None:
                log.append("pool closed")

        manager, pool = UserContextManager(), Pool()
        old, new = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context("alice", old)
        old.closing(pool)
        old.callback(log.append, "old closed")
        new.closing(pool)
        manager.set_context("alice", new)
        assert not old.is_open
        assert log == ["old closed"]
        new.close()
        assert log == ["old closed", "pool closed"]

    def test_a_callback_is_not_taken_for_another_of_the_same_function(self, log: Log) -> None:
        def free(what: str) -> None:
            log.append(what)

        manager = UserContextManager()
        old, new = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context("alice", old)
        old.callback(free, "old")
        new.callback(free, "new")
        manager.set_context("alice", new)
        assert log == ["old"]
        new.close()
        assert log == ["old", "new"]

    async def test_what_was_entered_once_is_left_by_the_old_one(self, log: Log, make_manager: MakeManager) -> None:
        manager = make_manager()
        old, new = (create_isolated_execution_context("alice") for _ in range(2))
        manager.set_context("alice", old)
        thing = await old.enter_async_context(Thing(log, leave=one_turn))
        manager.set_context("alice", new)
        await old.aclose()
        assert log == ["thing entered", "thing left"]
        assert isinstance(thing.seen, ContextClosedError)
        assert thing.seen.reason == "replaced"
        assert new.is_open


class TestLoopsAndThreads:
    async def test_another_threads_clear_releases_on_the_loop_that_opened(self) -> None:
        manager, seen = UserContextManager(), list[tuple[threading.Thread, asyncio.AbstractEventLoop]]()

        async def look() -> None:
            await one_turn()
            seen.append((threading.current_thread(), asyncio.get_running_loop()))

        context = create_isolated_execution_context("alice")
        manager.set_context("alice", context)
        await context.enter_async_context(Thing([], leave=look))
        await context.enter_async_context(Thing([], leave=look), owner_task=True)
        context.callback(look)
        context.closing(Closed(look))
        cleared: list[bool] = []
        await asyncio.to_thread(lambda: cleared.append(manager.clear_context("alice")))
        await context.aclose()
        assert cleared == [True]
        assert seen == [(threading.current_thread(), asyncio.get_running_loop())] * 4
        assert context.lifetime.failures == ()

    @pytest.mark.parametrize("reason", ["cleared", "expired"])
    async def test_what_is_bound_to_its_thread_is_closed_in_it(self, reason: CloseReason) -> None:
        context = create_isolated_execution_context("alice")
        database = context.closing(sqlite3.connect(":memory:"))  # refuses any other thread than this one
        await asyncio.to_thread(context.close, reason)
        assert await context.aclose() == ()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            database.execute("select 1")

    @pytest.mark.ucm_leaks("a resource is never released, and that is reported")
    def test_without_a_live_loop_what_needs_one_is_reported_and_the_rest_released(
        self, context: UserExecutionContext, log: Log
    ) -> None:
        async def never_called() -> None:
            log.append("called")

        async def open_them() -> None:
            context.callback(log.append, "lowest")
            await context.enter_async_context(Thing(log, "cm"), name="cm")
            context.callback(never_called)
            context.closing(Closed(never_called), name="close")
            context.callback(log.append, "highest")

        asyncio.run(open_them())
        context.agent_context["secret"] = "alice's"
        context.close()
        qualname = never_called.__qualname__
        assert failures_of(context) == {"close": "unclosed", qualname: "unclosed", "cm": "unclosed"}
        assert log == ["cm entered", "highest", "lowest"]
        gc.collect()  # a coroutine that nobody awaited would complain now

    def test_an_owner_that_left_with_its_loop_is_not_reported(self, context: UserExecutionContext, log: Log) -> None:
        async def open_it() -> None:
            await context.enter_async_context(Thing(log), owner_task=True, name="owned")

        asyncio.run(open_it())
        assert log == ["thing entered", "thing left"]
        context.close()
        assert failures_of(context) == {}

    async def test_another_loops_resource_is_refused_before_it_is_entered(
        self, context: UserExecutionContext, log: Log
    ) -> None:
        context.callback(log.append, "released")

        async def elsewhere() -> None:
            for owner_task in (False, True):
                with pytest.raises(ConfigurationError, match="event loop"):
                    await context.enter_async_context(Thing(log), owner_task=owner_task)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        await asyncio.to_thread(asyncio.run, elsewhere())
        await context.aclose()
        assert log == ["released"]

    async def test_closing_from_another_loop_waits_for_this_one(self, context: UserExecutionContext, log: Log) -> None:
        await context.enter_async_context(Thing(log, leave=failing), name="broken")

        async def elsewhere() -> None:
            (failure,) = await context.aclose()
            log.append(failure.name)

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert log == ["thing entered", "broken"]

    async def test_a_loop_that_ends_in_that_very_moment(self, log: Log) -> None:
        class Ending:
            """An event loop that seems to run when it is looked at, and is closed when it is called."""

            def is_running(self) -> bool:
                return True

            def is_closed(self) -> bool:
                return False

            def call_soon_threadsafe(self, *args: object) -> None:
                raise RuntimeError("Event loop is closed")

        context = create_isolated_execution_context("alice")
        context.callback(log.append, "released")
        context.lifetime.run_in_current_task()
        context.lifetime.loop = cast("asyncio.AbstractEventLoop", Ending())
        await asyncio.to_thread(context.close, "expired")
        assert log == ["released"]
        assert failures_of(context) == {}


async def close_by_awaiting(context: UserExecutionContext) -> None:
    await context.aclose()


async def close_here(context: UserExecutionContext) -> None:
    context.close()
    await context.aclose()


async def close_in_a_thread(context: UserExecutionContext) -> None:
    await asyncio.to_thread(context.close, "expired")
    await context.aclose()


class TestChildren:
    """A child is inside its parent: it lets go first, whoever closes, in whichever way."""

    @pytest.mark.parametrize("close", [close_by_awaiting, close_here, close_in_a_thread])
    async def test_a_child_lets_go_before_its_parent(
        self, context: UserExecutionContext, log: Log, close: Callable[[UserExecutionContext], Awaitable[None]]
    ) -> None:
        context.callback(log.append, "parent")
        for name in ("first", "second"):
            child = context.create_child_context(name)
            child.callback(log.append, name)
            grandchild = child.create_child_context("deep")
            await grandchild.enter_async_context(Thing(log, f"below {name}", leave=one_turn))
        await close(context)
        assert log[2:] == ["below second left", "second", "below first left", "first", "parent"]

    async def test_a_parent_without_a_loop_waits_for_the_loop_of_its_child(
        self, context: UserExecutionContext, log: Log
    ) -> None:
        going_on = asyncio.Event()
        await asyncio.to_thread(context.callback, log.append, "parent")  # in no loop
        child = context.create_child_context("op")
        await child.enter_async_context(Thing(log, "child", leave=going_on.wait))
        await asyncio.to_thread(context.close)
        assert log == ["child entered"]
        going_on.set()
        await context.aclose()
        assert log == ["child entered", "child left", "parent"]

    async def test_what_fails_in_a_child_stops_nothing(self, context: UserExecutionContext, log: Log) -> None:
        context.callback(log.append, "parent")
        children = [context.create_child_context(name) for name in ("first", "second")]
        children[0].callback(log.append, "first")
        await children[1].enter_async_context(Thing(log, leave=failing), name="broken")
        assert await context.aclose() == ()
        assert failures_of(children[1]) == {"broken": "failed"}
        assert log == ["thing entered", "first", "parent"]

    async def test_a_cancelled_teardown_closes_all_children(self, context: UserExecutionContext, log: Log) -> None:
        context.callback(log.append, "parent")
        for name in ("first", "second"):
            child = context.create_child_context(name)
            await child.enter_async_context(Thing(log, name, leave=one_turn))
        closing = asyncio.create_task(context.aclose())
        for _ in range(5):
            await one_turn()
            closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert log[2:] == ["second left", "first left", "parent"]

    def test_none_is_opened_in_a_parent_that_closes(self, context: UserExecutionContext) -> None:
        refused: list[ContextClosedError] = []

        def open_one() -> None:
            with pytest.raises(ContextClosedError) as caught:
                context.create_child_context("late")
            refused.append(caught.value)

        context.callback(open_one)
        context.close()
        assert failures_of(context) == {}
        assert len(refused) == 1

    def test_a_child_ends_when_its_parents_deadline_comes(self) -> None:
        now = [0.0]
        manager = UserContextManager(clock=lambda: now[0])
        child = manager.create_isolated_context("alice", ttl_seconds=10).create_child_context("op")
        assert child.agent_context == {}
        now[0] = 10.0
        with pytest.raises(ContextClosedError, match="expired"):
            _ = child.agent_context


class TestWhatResourcesSee:
    """A transaction commits when its exit sees no error, and only then."""

    @pytest.mark.parametrize("reason", ["finished", "closed", "cleared"])
    async def test_an_ordinary_end_is_no_error(self, reason: CloseReason) -> None:
        for thing in await self.close(reason):
            assert thing.seen is None

    @pytest.mark.parametrize(
        "reason", ["failed", "cancelled", "replaced", "evicted", "expired", "revoked", "shutdown", "disconnected"]
    )
    async def test_anything_else_is_an_error_that_says_what(self, reason: CloseReason) -> None:
        for thing in await self.close(reason):
            assert isinstance(thing.seen, ContextClosedError)
            assert thing.seen.reason == reason

    async def test_the_error_of_the_work_goes_to_all(self) -> None:
        error = LookupError("of the work")
        for thing in await self.close("failed", error):
            assert thing.seen is error

    async def close(self, reason: CloseReason, error: BaseException | None = None) -> list[Thing]:
        """One resource of each kind, in parent and child, closed from here and from another thread."""
        things: list[Thing] = []
        for from_thread in (False, True):
            parent = create_isolated_execution_context("alice")
            for context in (parent, parent.create_child_context("op")):
                things.append(context.enter_context(Thing([])))
                things.append(await context.enter_async_context(Thing([], leave=one_turn)))
                things.append(await context.enter_async_context(Thing([], leave=one_turn), owner_task=True))
            if from_thread:
                await asyncio.to_thread(parent.close, reason, error)
            assert await parent.aclose(reason, error) == ()
        return things

    async def test_a_transaction_of_an_expired_request_is_rolled_back(self) -> None:
        manager, done = UserContextManager(), list[str]()

        @asynccontextmanager
        async def transaction() -> AsyncIterator[None]:
            try:
                yield
            except BaseException:
                done.append("rolled back")
                raise
            done.append("committed")

        ends: tuple[CloseReason, ...] = ("expired", "finished")
        for end in ends:
            context = of_user(manager)
            await context.enter_async_context(transaction())
            await context.aclose(end)
            assert failures_of(context) == {}
        assert done == ["rolled back", "committed"]

    @pytest.mark.parametrize(
        ("kind", "owner_task"),
        [
            *(("raises it", False), ("generator", False), ("lets it through", False)),
            *(("raises it", True), ("generator", True), ("lets it through", True)),
            # A task group must be left in the task that entered it. It wraps what it is given.
            *(("anyio task group", True), ("TaskGroup", True)),
        ],
    )
    async def test_an_exit_that_raises_what_it_was_given_has_not_failed(
        self, context: UserExecutionContext, kind: str, owner_task: bool
    ) -> None:
        error = LookupError("of the work")

        class RaisesIt(Thing):
            async def __aexit__(self, *args: Any) -> None:
                raise args[1]

        @asynccontextmanager
        async def generator() -> AsyncIterator[None]:
            yield

        @asynccontextmanager
        async def in_anyio_group() -> AsyncIterator[None]:
            async with anyio.create_task_group() as group:
                group.start_soon(one_turn)
                yield

        @asynccontextmanager
        async def in_group() -> AsyncIterator[None]:
            async with asyncio.TaskGroup() as group:
                group.create_task(one_turn())
                yield

        kinds: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
            "raises it": partial(RaisesIt, []),
            "generator": generator,
            "lets it through": partial(Thing, []),
            "anyio task group": in_anyio_group,
            "TaskGroup": in_group,
        }
        await context.enter_async_context(kinds[kind](), owner_task=owner_task)
        assert await context.aclose("failed", error) == ()

    def test_nor_has_a_synchronous_one(self, context: UserExecutionContext) -> None:
        @contextmanager
        def generator() -> Iterator[None]:
            yield

        class RaisesIt(Thing):
            def __exit__(self, *args: Any) -> None:
                raise args[1]

        context.enter_context(generator())
        context.enter_context(RaisesIt([]))
        context.close("failed", LookupError("of the work"))
        assert failures_of(context) == {}

    async def test_another_error_beside_the_given_one_is_a_failure(self, context: UserExecutionContext) -> None:
        error = LookupError("of the work")

        class RaisesBoth(Thing):
            async def __aexit__(self, *args: Any) -> None:
                raise ExceptionGroup("both", [args[1], OSError("no space left")])

        await context.enter_async_context(RaisesBoth([]), name="broken")
        (failure,) = await context.aclose("failed", error)
        assert failure.outcome == "failed"


class TestNames:
    async def test_failures_name_the_resource(self, context: UserExecutionContext) -> None:
        @asynccontextmanager
        async def database() -> AsyncIterator[None]:
            yield
            raise OSError

        @contextmanager
        def cache() -> Iterator[None]:
            yield
            raise OSError

        def log_out(of: str) -> None:
            raise OSError

        await context.enter_async_context(database())
        context.enter_context(cache())
        context.callback(partial(log_out, "here"))
        context.closing(Closed(failing))
        await context.enter_async_context(Thing([], leave=failing))
        await context.enter_async_context(Thing([], leave=failing), name="the third one")
        names = [failure.name.rpartition(".")[2] for failure in await context.aclose()]
        assert names == ["the third one", "Thing", "Closed", "log_out", "cache", "database"]


class TestWhatStopsTheInterpreter:
    @pytest.mark.parametrize("awaited", [False, True])
    def test_what_stops_the_interpreter_still_leaves_nothing_behind(
        self, context: UserExecutionContext, log: Log, awaited: bool
    ) -> None:
        context.agent_context["secret"] = "alice's"
        data = context.agent_context
        context.callback(log.append, "below")
        context.callback(sys.exit, 3)
        context.callback(log.append, "above")

        async def close() -> None:
            await context.aclose()

        with pytest.raises(SystemExit):
            asyncio.run(close()) if awaited else context.close()
        assert log == ["above", "below"]
        assert data == {}
        assert failures_of(context) == {}

    @pytest.mark.parametrize("awaited", [False, True])
    def test_also_when_it_comes_from_a_child(self, context: UserExecutionContext, log: Log, awaited: bool) -> None:
        context.callback(log.append, "parent")
        first, second = (context.create_child_context(name) for name in ("first", "second"))
        first.callback(log.append, "first")
        second.callback(sys.exit, 3)

        async def close() -> None:
            await context.aclose()

        with pytest.raises(SystemExit):
            asyncio.run(close()) if awaited else context.close()
        assert log == ["first", "parent"]
        assert [failures_of(each) for each in (context, first, second)] == [{}, {}, {}]


class TestManagedBlocks:
    async def test_all_failures_come_together(self, context: UserExecutionContext) -> None:
        with pytest.RaisesGroup(pytest.RaisesExc(OSError), pytest.RaisesExc(LookupError)):
            async with managed_user_context(context):
                context.callback(raising, LookupError())
                await context.enter_async_context(Thing([], leave=failing))

    async def test_releases_run_inside_the_context(self) -> None:
        seen: list[UserExecutionContext] = []

        def look() -> None:
            seen.append(current_context())

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().callback(look)

        with managed_user_context(create_isolated_execution_context("alice")) as first:
            first.callback(look)
        async with managed_user_context(create_isolated_execution_context("bob")) as second:
            second.callback(look)
        await serve(app, UserContextManager())
        assert seen[:2] == [first, second]
        assert len(seen) == 3

    async def test_a_generator_broken_off_inside_the_block_closes_in_silence(
        self, context: UserExecutionContext, log: Log, complaints: list[dict[str, Any]]
    ) -> None:
        async def stream() -> AsyncIterator[int]:
            async with managed_user_context(context):
                await context.enter_async_context(Thing(log, leave=one_turn))
                yield 1
                yield 2

        listen(complaints)
        async for _ in stream():
            break
        gc.collect()
        await context.aclose()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=PATIENCE)
        assert log == ["thing entered", "thing left"]


def raising(error: Exception) -> None:
    raise error


async def fail_in_a_group() -> None:
    """The group has nothing to do any more but to wait when its task fails; before Python 3.13 it leaves a mark."""

    async def fail() -> None:
        await one_turn()
        raise LookupError

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
    except* LookupError:
        pass


async def serve(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], manager: UserContextManager, ttl: float | None = None
) -> list[Message]:
    """One request through the middleware; what was sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await UserContextMiddleware(app, manager=manager, ttl=ttl)(scope, receive, send)
    return sent


class TestInterrupts:
    """A handler that waits for something else is told when its context ends before it."""

    @pytest.mark.parametrize(("reason", "status"), [("expired", 504), ("revoked", 401), ("shutdown", 503)])
    @pytest.mark.parametrize("from_thread", [False, True])
    async def test_it_is_cancelled_and_answered_for(
        self, log: Log, reason: CloseReason, status: int, from_thread: bool
    ) -> None:
        manager, waiting = UserContextManager(guard="open"), asyncio.Event()
        contexts: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            contexts.append(current_context())
            contexts[0].callback(log.append, "released")
            waiting.set()
            try:
                await asyncio.Event().wait()
            finally:
                log.append("handler left")

        request = asyncio.create_task(serve(app, manager))
        await waiting.wait()
        if from_thread:
            await asyncio.to_thread(contexts[0].close, reason)
        else:
            contexts[0].close(reason)
        sent = await request
        assert sent[0]["status"] == status
        assert log == ["handler left", "released"]
        assert request.cancelling() == 0
        assert manager.get_active_contexts() == {}

    async def test_a_deadline_is_enough(self, log: Log) -> None:
        now = [0.0]
        manager, waiting = UserContextManager(guard="open", clock=lambda: now[0]), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            waiting.set()
            await asyncio.Event().wait()

        request = asyncio.create_task(serve(app, manager, ttl=3600))
        await waiting.wait()
        now[0] = 3600.0
        await asyncio.to_thread(manager.sweep)
        assert (await request)[0]["status"] == 504

    async def test_whoever_closes_its_own_context_is_not_cancelled(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().close("revoked")
            await one_turn()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        sent = await serve(app, UserContextManager())
        assert [message.get("status") for message in sent] == [200]

    async def test_the_task_of_a_handler_that_has_ended_is_left_alone(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            # The cancellation gets onto its way to the loop, where the handler will have ended before it arrives.
            interrupting = threading.Thread(target=current_context().lifetime.interrupt)
            interrupting.start()
            interrupting.join()

        await serve(app, UserContextManager())
        task = asyncio.current_task()
        assert task is not None
        await one_turn()
        assert task.cancelling() == 0

    @pytest.mark.parametrize("reason", ["expired", "revoked", "shutdown"])
    async def test_who_has_caught_a_failed_group_is_cut_off_like_others(self, reason: CloseReason) -> None:
        context = create_isolated_execution_context("alice")
        with pytest.raises(ContextClosedError, match=reason):
            async with managed_user_context(context):
                await fail_in_a_group()
                asyncio.get_running_loop().call_soon(context.close, reason, context=Context())  # of somebody else
                await asyncio.Event().wait()

    @pytest.mark.parametrize("first", ["somebody else", "the context"])
    @pytest.mark.parametrize("before", [one_turn, fail_in_a_group], ids=["plain", "after a caught group"])
    async def test_somebody_elses_cancellation_of_the_same_turn_is_theirs(
        self, first: str, before: Callable[[], Awaitable[None]]
    ) -> None:
        working = asyncio.Event()
        context = create_isolated_execution_context("alice")

        async def work() -> None:
            async with managed_user_context(context):
                await before()
                working.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await working.wait()
        context.close("expired")  # cancels it by a callback, in the next turn of the loop
        if first == "somebody else":
            task.cancel()
        else:
            asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()

    async def test_so_is_one_that_the_handler_was_just_ending_by(self) -> None:
        tidying = asyncio.Event()
        context = create_isolated_execution_context("alice")

        async def work() -> None:
            async with managed_user_context(context):
                try:
                    await asyncio.Event().wait()
                finally:
                    tidying.set()
                    await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await one_turn()
        task.cancel()
        await tidying.wait()
        context.close("expired")
        await asyncio.wait([task])
        assert task.cancelled()

    async def test_a_clear_lets_the_handler_end_first(self, log: Log) -> None:
        manager, waiting, going_on = UserContextManager(guard="open"), asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            current_context().callback(log.append, "released")
            waiting.set()
            await going_on.wait()
            log.append("handler left")

        request = asyncio.create_task(serve(app, manager))
        await waiting.wait()
        assert manager.cleanup_all_contexts() == 1
        await one_turn()
        assert log == []
        going_on.set()
        await request
        assert log == ["handler left", "released"]

    async def test_a_handler_that_does_not_end_loses_its_resources(
        self, log: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ucm_middleware.teardown.HANDLER_GRACE", TINY)
        waiting, going_on, released = asyncio.Event(), asyncio.Event(), asyncio.Event()
        contexts: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            contexts.append(current_context())
            contexts[0].callback(released.set)
            waiting.set()
            await going_on.wait()
            log.append("handler left")

        request = asyncio.create_task(serve(app, UserContextManager()))
        await waiting.wait()
        contexts[0].close("cleared")
        await released.wait()
        assert log == []
        going_on.set()
        await request
        assert log == ["handler left"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager task factories came with Python 3.12")
class TestEagerTasks:
    @pytest.fixture(autouse=True)
    async def _eager(self) -> None:
        if sys.version_info >= (3, 12):
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)

    @pytest.mark.parametrize("owner_task", [False, True])
    async def test_teardown_is_the_same(self, log: Log, owner_task: bool) -> None:
        contexts: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            contexts.append(current_context())
            await contexts[0].enter_async_context(Thing(log, "below", leave=one_turn), owner_task=owner_task)
            await contexts[0].enter_async_context(Thing(log, "above"), owner_task=owner_task)

        await serve(app, UserContextManager())
        assert failures_of(contexts[0]) == {}
        assert log[2:] == ["above left", "below left"]

    async def test_a_synchronous_close_is_the_same(self, context: UserExecutionContext, log: Log) -> None:
        await context.enter_async_context(Thing(log, leave=one_turn))
        context.close()
        assert await context.aclose() == ()
        assert log == ["thing entered", "thing left"]
