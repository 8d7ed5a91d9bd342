"""Closing a context: after its handler, and in the meantime of no use but to its own releases."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from contextvars import Context, copy_context
from types import FrameType
from typing import Any, cast

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from asgiref.sync import SyncToAsync
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from support.asgi import exchange, http_scope, status_of
from support.clock import Clock
from support.waiting import PATIENCE
from ucm_middleware import (
    ContextClosedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    create_isolated_execution_context,
    current_context,
    managed_user_context,
    validate_user_context,
)
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.threads import entered_elsewhere
from ucm_middleware.types import Message, Receive, Scope, Send

Log = list[str]


@pytest.fixture
def log() -> Log:
    return []


@pytest.fixture
def _nobody_waits(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails when the wait for a handler had to be given up, as it must be when the handler waits for itself."""
    yield
    assert not any("did not end" in record.getMessage() for record in caplog.get_records("call"))


class Connection:
    lent_to = "nobody"


class Pool:
    """One connection, lent to one after the other."""

    def __init__(self) -> None:
        self.free: asyncio.Queue[Connection] = asyncio.Queue()
        self.free.put_nowait(Connection())

    @asynccontextmanager
    async def lend(self, user: str) -> AsyncIterator[Connection]:
        connection = await self.free.get()
        connection.lent_to = user
        try:
            yield connection
        finally:
            connection.lent_to = "nobody"
            self.free.put_nowait(connection)


class TestAfterTheHandler:
    @pytest.mark.parametrize("reason", ["expired", "revoked", "shutdown", "disconnected", "cleared", "evicted"])
    async def test_a_connection_is_lent_to_the_next_when_the_last_has_rolled_back(
        self, log: Log, reason: CloseReason
    ) -> None:
        pool, working, told = Pool(), asyncio.Event(), asyncio.Event()
        contexts: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            context = current_context()
            connection = await context.enter_async_context(pool.lend(context.user_id))
            if context.user_id == "bob":
                log.append(f"bob works on what is lent to {connection.lent_to}")
                return
            contexts.append(context)
            working.set()
            try:
                await told.wait()
            finally:
                for _ in range(5):  # a round trip
                    await asyncio.sleep(0)
                log.append(f"alice rolls back on what is lent to {connection.lent_to}")

        middleware = UserContextMiddleware(app, identify=lambda connection: connection.headers["user"])
        requests = [
            asyncio.create_task(exchange(middleware, http_scope(headers=[("user", user)]))) for user in ("alice", "bob")
        ]
        await working.wait()
        contexts[0].close(reason)
        if reason in ("cleared", "evicted"):
            told.set()  # nothing interrupts the handler then
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait(requests)
        assert log == ["alice rolls back on what is lent to alice", "bob works on what is lent to bob"]

    @pytest.mark.usefixtures("_nobody_waits")
    async def test_a_subtask_that_tidies_up_does_not_wait_for_its_own_handler(self) -> None:
        working = asyncio.Event()
        contexts: list[UserExecutionContext] = []

        async def child() -> None:
            contexts.append(current_context())
            working.set()
            try:
                await asyncio.Event().wait()
            finally:
                await contexts[0].aclose()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())

        request = asyncio.create_task(exchange(UserContextMiddleware(app), http_scope()))
        await working.wait()
        contexts[0].close("expired")
        assert status_of(await request) == 504

    async def test_a_cancellation_that_was_swallowed_before_is_not_taken_for_one_of_now(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            asyncio.get_running_loop().call_soon(current_context().close, "expired")
            await asyncio.Event().wait()

        async def serve() -> list[Message]:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(0)
            # Not uncancelled, as servers leave it that catch a cancellation and go on.
            return await exchange(UserContextMiddleware(app), http_scope())

        assert status_of(await asyncio.create_task(serve())) == 504

    @pytest.mark.parametrize("turns", range(5))
    async def test_cut_off_in_the_turn_in_which_a_task_group_fails(self, turns: int) -> None:
        working, failing = asyncio.Event(), asyncio.Event()
        contexts: list[UserExecutionContext] = []

        async def child() -> None:
            working.set()
            await failing.wait()
            raise LookupError("in the task group")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            contexts.append(current_context())
            contexts[0].callback(asyncio.sleep, 0)
            async with asyncio.TaskGroup() as group:
                group.create_task(child())

        request = asyncio.create_task(exchange(UserContextMiddleware(app), http_scope()))
        await working.wait()
        failing.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        contexts[0].close("expired")
        await asyncio.wait([request])
        assert not request.cancelled()
        if (error := request.exception()) is None:
            assert status_of(request.result()) == 504
        else:  # the group had failed before
            assert isinstance(error, ExceptionGroup)


Work = Callable[[], Coroutine[Any, Any, None]]


async def in_a_subtask(work: Work) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.wait_for(work(), PATIENCE))


async def in_an_anyio_task(work: Work) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)


async def from_a_thread(work: Work) -> None:
    await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(work))


async def here(work: Work) -> None:
    await work()


class PassingOn(BaseHTTPMiddleware):
    """Runs the endpoint in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


async def in_an_executor(work: Callable[[], object]) -> object:
    return await asyncio.get_running_loop().run_in_executor(None, copy_context().run, work)


THREADS: dict[str, Callable[[Callable[[], object]], Awaitable[object]]] = {
    "asyncio": asyncio.to_thread,
    "anyio": anyio.to_thread.run_sync,
    "executor": in_an_executor,
    "asgiref": lambda work: SyncToAsync(work, thread_sensitive=False)(),  # Django's synchronous views
}


async def some_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class WorkInAThread:
    """A request whose handler enters something, and works in a thread until the gate is opened."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.gate = threading.Event()
        self.then: Callable[[], object] = int
        self._begun: asyncio.Queue[UserExecutionContext] = asyncio.Queue()

    async def begun(self) -> UserExecutionContext:
        async with asyncio.timeout(PATIENCE):
            return await self._begun.get()

    async def serve(self, how: Callable[[Callable[[], object]], Awaitable[object]]) -> list[Message]:
        loop = asyncio.get_running_loop()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            context = current_context()
            context.callback(self.log.append, "released")

            def work() -> None:
                loop.call_soon_threadsafe(self._begun.put_nowait, context)
                assert self.gate.wait(PATIENCE)
                self.then()
                self.log.append("the thread ends")

            await how(work)

        middleware = UserContextMiddleware(app, identify=lambda connection: "alice")
        return await exchange(middleware, http_scope())


class TestAfterItsThreads:
    """To cancel who waits for a thread does not end the thread."""

    @pytest.fixture
    async def thread(self, log: Log) -> AsyncIterator[WorkInAThread]:
        work = WorkInAThread(log)
        yield work
        work.gate.set()

    @pytest.mark.parametrize("how", THREADS.values(), ids=THREADS)
    @pytest.mark.parametrize("reason", ["expired", "revoked", "shutdown", "disconnected", "cancelled"])
    async def test_nothing_is_released_before_they_have_ended(
        self, log: Log, thread: WorkInAThread, how: Callable[[Callable[[], object]], Awaitable[object]], reason: str
    ) -> None:
        request = asyncio.create_task(thread.serve(how))
        context = await thread.begun()
        if reason == "cancelled":
            request.cancel()
        else:
            context.close(cast("CloseReason", reason))
        await some_turns()
        thread.gate.set()
        await asyncio.wait([request])
        assert log == ["the thread ends", "released"]
        assert request.cancelled() == (reason == "cancelled")
        assert context.lifetime.reason == reason

    async def test_so_it_is_when_one_works_for_a_part_of_the_request(self, log: Log, thread: WorkInAThread) -> None:
        async def in_a_part(work: Callable[[], object]) -> object:
            async with managed_user_context(current_context().create_child_context("part")):
                return await asyncio.to_thread(work)

        request = asyncio.create_task(thread.serve(in_a_part))
        (await thread.begun()).close("expired")
        await some_turns()
        thread.gate.set()
        assert status_of(await request) == 504
        assert log == ["the thread ends", "released"]

    async def test_so_it_is_with_a_thread_that_the_thread_has_started(
        self, log: Log, thread: WorkInAThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, gate, others = threading.Event(), threading.Event(), list[threading.Thread]()
        looks = list[str]()

        def watched() -> list[Context]:
            looks.append("at the threads")
            found = entered_elsewhere()
            if len(looks) == 2:
                gate.set()
            return found

        monkeypatch.setattr("ucm_middleware.strays.entered_elsewhere", watched)

        def work() -> None:
            begun.set()
            assert gate.wait(PATIENCE)
            log.append("its thread ends")

        def start() -> None:
            others.append(threading.Thread(target=copy_context().run, args=(work,)))
            others[0].start()
            assert begun.wait(PATIENCE)

        thread.then = start
        request = asyncio.create_task(thread.serve(asyncio.to_thread))
        (await thread.begun()).close("expired")
        await some_turns()
        thread.gate.set()
        assert status_of(await request) == 504
        gate.set()
        assert log == ["the thread ends", "its thread ends", "released"]
        others[0].join(PATIENCE)

    async def test_many_that_are_cut_off_at_once_look_at_the_threads_once(
        self, log: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks = list[int]()

        def frames() -> dict[int, FrameType]:
            looks.append(1)
            return {}

        monkeypatch.setattr("ucm_middleware.threads.frames_of_others", frames)
        contexts = list[UserExecutionContext]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            contexts.append(current_context())
            contexts[-1].callback(log.append, "released")
            await asyncio.Event().wait()

        middleware = UserContextMiddleware(app)
        requests = [asyncio.create_task(exchange(middleware, http_scope())) for _ in range(50)]
        await some_turns()
        for context in contexts:
            context.close("expired")
        answers = await asyncio.gather(*requests)
        assert [status_of(answer) for answer in answers] == [504] * 50
        assert log == ["released"] * 50
        assert looks == [1]

    async def test_a_cancellation_meanwhile_is_raised_after(self, log: Log, thread: WorkInAThread) -> None:
        request = asyncio.create_task(thread.serve(asyncio.to_thread))
        (await thread.begun()).close("expired")
        await some_turns()
        for _ in range(3):
            request.cancel()
            await some_turns()
        assert log == []
        thread.gate.set()
        await asyncio.wait([request])
        assert request.cancelled()
        assert log == ["the thread ends", "released"]

    async def test_who_closes_it_meanwhile_waits_too(self, log: Log, thread: WorkInAThread) -> None:
        request = asyncio.create_task(thread.serve(asyncio.to_thread))
        context = await thread.begun()
        context.close("expired")
        await some_turns()
        context.close("shutdown")
        closing = asyncio.create_task(context.aclose("shutdown"), context=Context())
        await some_turns()
        assert log == []
        assert not closing.done()
        thread.gate.set()
        await closing
        assert log == ["the thread ends", "released"]
        await request

    async def test_a_thread_that_closes_it_does_not_wait_for_itself(
        self, log: Log, thread: WorkInAThread, caplog: pytest.LogCaptureFixture
    ) -> None:
        contexts: list[UserExecutionContext] = []

        async def close() -> None:
            await contexts[0].aclose()

        def close_in_thread() -> None:
            anyio.from_thread.run(close)

        thread.then = close_in_thread
        request = asyncio.create_task(thread.serve(anyio.to_thread.run_sync))
        contexts.append(await thread.begun())
        contexts[0].close("expired")
        await some_turns()
        thread.gate.set()
        assert status_of(await request) == 504
        assert log == ["the thread ends", "released"]
        assert "did not end" not in caplog.text

    async def test_one_that_does_not_end_is_not_waited_for_for_ever(
        self, log: Log, thread: WorkInAThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ucm_middleware.teardown.HANDLER_GRACE", 0.05)
        request = asyncio.create_task(thread.serve(asyncio.to_thread))
        (await thread.begun()).close("expired")
        assert status_of(await request) == 504
        assert log == ["released"]
        assert "a thread of <UserExecutionContext 'alice'" in caplog.text

    async def test_those_of_others_are_none_of_its_concern(self, log: Log, thread: WorkInAThread) -> None:
        others = asyncio.create_task(thread.serve(asyncio.to_thread))
        await thread.begun()
        context = create_isolated_execution_context("alice")

        async def work() -> None:
            async with managed_user_context(context):
                context.callback(log.append, "own")
                asyncio.get_running_loop().call_soon(context.close, "expired", context=Context())
                await asyncio.Event().wait()

        with pytest.raises(ContextClosedError):
            await work()
        assert log == ["own"]
        thread.gate.set()
        await others


class WorkInATask:
    """A request whose handler runs in a task of its own, as some frameworks do it, and is waited for there."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.is_deaf = False
        self.gate = asyncio.Event()
        self.began: asyncio.Queue[UserExecutionContext] = asyncio.Queue()
        self.manager = UserContextManager()

    async def serve(self, *, holds_something: bool = True) -> list[Message]:
        async def work() -> None:
            try:
                self.began.put_nowait(current_context())
                await self.gate.wait()
            except asyncio.CancelledError:
                if self.is_deaf:
                    await self.gate.wait()
                raise
            finally:
                self.log.append("the task ends")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if holds_something:
                current_context().callback(self.log.append, "released")
            await asyncio.wait([asyncio.create_task(work())])

        middleware = UserContextMiddleware(app, manager=self.manager, identify=lambda connection: "alice")
        return await exchange(middleware, http_scope())


class TestAfterItsTasks:
    """To cancel who waits for a task with ``asyncio.wait`` does not end the task."""

    @pytest.fixture
    async def task(self, log: Log) -> AsyncIterator[WorkInATask]:
        work = WorkInATask(log)
        yield work
        work.gate.set()
        await some_turns()

    @pytest.fixture
    def _is_a_frameworks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ucm_middleware.strays.SERVED_IN_TASKS", frozenset({"tests"}))

    @pytest.mark.usefixtures("_is_a_frameworks")
    @pytest.mark.parametrize("holds_something", [True, False])
    @pytest.mark.parametrize("reason", ["expired", "revoked", "shutdown", "disconnected", "cancelled"])
    async def test_those_of_the_framework_are_cancelled_and_have_ended_first(
        self, log: Log, task: WorkInATask, reason: str, holds_something: bool
    ) -> None:
        request = asyncio.create_task(task.serve(holds_something=holds_something))
        context = await task.began.get()
        if reason == "cancelled":
            request.cancel()
        else:
            context.close(cast("CloseReason", reason))
        await asyncio.wait([request])
        assert log == ["the task ends", *(["released"] if holds_something else [])]
        assert request.cancelled() == (reason == "cancelled")

    async def test_others_may_be_meant_to_go_on(self, log: Log, task: WorkInATask) -> None:
        """As what is shielded, and what ends with a task group that the context holds."""
        request = asyncio.create_task(task.serve())
        (await task.began.get()).close("expired")
        assert status_of(await request) == 504
        assert log == ["released"]

    @pytest.mark.usefixtures("_is_a_frameworks")
    async def test_one_that_does_not_end_is_not_waited_for_for_ever(
        self, log: Log, task: WorkInATask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ucm_middleware.teardown.HANDLER_GRACE", 0.05)
        task.is_deaf = True
        request = asyncio.create_task(task.serve())
        (await task.began.get()).close("expired")
        assert status_of(await request) == 504
        assert log == ["released"]
        assert "the task WorkInATask.serve.<locals>.work of <UserExecutionContext 'alice'" in caplog.text

    @pytest.mark.usefixtures("_is_a_frameworks")
    async def test_those_of_many_requests_are_looked_for_together(
        self, log: Log, task: WorkInATask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = [asyncio.create_task(task.serve()) for _ in range(10)]
        contexts = [await task.began.get() for _ in requests]
        looks: list[str] = []

        def no_threads() -> list[Context]:
            looks.append("once")
            return []

        monkeypatch.setattr("ucm_middleware.strays.entered_elsewhere", no_threads)
        for context in contexts:
            context.close("shutdown")
        assert {status_of(await request) for request in requests} == {503}
        assert len(looks) <= len(requests) / 2
        assert sorted(log) == ["released"] * 10 + ["the task ends"] * 10

    @pytest.mark.usefixtures("_is_a_frameworks")
    async def test_who_is_cancelled_does_not_wait_for_itself(self, log: Log, caplog: pytest.LogCaptureFixture) -> None:
        async def work() -> None:
            async with managed_user_context(create_isolated_execution_context("alice")) as context:
                context.callback(log.append, "released")
                await asyncio.get_running_loop().create_future()

        working = asyncio.create_task(work())
        await some_turns()
        working.cancel()
        await asyncio.wait([working])
        assert log == ["released"]
        assert "did not end" not in caplog.text


@pytest.mark.usefixtures("_nobody_waits")
class TestByTheHandlerItself:
    """Whoever closes the context that it runs in does not wait for itself, in whichever task or thread it does."""

    @pytest.mark.parametrize("where", [here, in_a_subtask, in_an_anyio_task, from_a_thread])
    @pytest.mark.parametrize("how", ["aclose", "cleanup_context", "managed block", "from a child"])
    @pytest.mark.parametrize("below", [[], [Middleware(PassingOn)]], ids=["plain", "base middleware"])
    async def test_it_is_released_at_once(
        self, log: Log, where: Callable[[Work], Awaitable[None]], how: str, below: list[Middleware]
    ) -> None:
        manager = UserContextManager()

        async def close() -> None:
            context = current_context()
            if how == "aclose":
                await context.aclose()
            elif how == "cleanup_context":
                assert await manager.cleanup_context((context.user_id, context.request_id))
            elif how == "managed block":
                async with managed_user_context(context):
                    pass
            else:
                async with managed_user_context(context.create_child_context("part")):
                    await context.aclose()

        async def endpoint(request: Request) -> Response:
            async def release() -> None:
                log.append("released")

            current_context().callback(release)
            await where(close)
            log.append("the handler goes on")
            return PlainTextResponse("done")

        ours = Middleware(UserContextMiddleware, manager=manager, identify=lambda connection: "alice")
        app = Starlette(routes=[Route("/", endpoint)], middleware=[ours, *below])
        assert status_of(await exchange(app, http_scope())) == 200
        assert log == ["released", "the handler goes on"]


USES: dict[str, Callable[[UserExecutionContext], object]] = {
    "agent_context": lambda context: context.agent_context,
    "audit_metadata": lambda context: context.audit_metadata,
    "db_session": lambda context: context.db_session,
    "environment": lambda context: context.environment,
    "verify_isolation": lambda context: context.verify_isolation(),
    "child": lambda context: context.create_child_context("part"),
    "callback": lambda context: context.callback(print),
}


async def in_a_thread(use: Callable[[], object]) -> object:
    return await asyncio.to_thread(use)


async def in_a_gathered_task(use: Callable[[], object]) -> object:
    async def work() -> object:
        return use()

    [result] = await asyncio.gather(work())
    return result


@asynccontextmanager
async def cancel_scope() -> AsyncIterator[None]:
    with anyio.CancelScope():
        yield


async def right_here(use: Callable[[], object]) -> object:
    return use()


WHERE = pytest.mark.parametrize("where", [right_here, in_a_gathered_task, in_a_thread])


# What is entered, and whether a task of its own leaves it: anyio's scopes must be left by the task that entered them.
EXITS: dict[str, tuple[Callable[[], AbstractAsyncContextManager[object]], bool]] = {
    "plain": (nullcontext, False),
    "owned": (nullcontext, True),
    "owned cancel scope": (cancel_scope, True),
    "owned task group": (anyio.create_task_group, True),
}


class TestUseMeanwhile:
    """From the closing on, a context is of use to its own releases and to nobody else."""

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    @pytest.mark.parametrize("reason", ["expired", "revoked", "cleared", "closed"])
    async def test_whoever_else_uses_it_is_refused(
        self, use: Callable[[UserExecutionContext], object], reason: CloseReason
    ) -> None:
        manager = UserContextManager()
        context = manager.create_isolated_context("alice", agent_context={"a": 1})
        releasing, may_go_on = asyncio.Event(), asyncio.Event()

        async def release() -> None:
            releasing.set()
            await may_go_on.wait()

        with managed_user_context(context):
            context.callback(release)
            closing = asyncio.create_task(context.aclose(reason))
            await releasing.wait()
            with pytest.raises(ContextClosedError, match=reason):
                use(context)
            for act in (
                current_context,
                lambda: manager.create_isolated_context("alice"),
                lambda: manager.get_audit_trail("alice"),
            ):
                with pytest.raises(ContextClosedError):
                    act()
            may_go_on.set()
            await closing

    @WHERE
    async def test_a_release_uses_it_with_whatever_it_starts(
        self, where: Callable[[Callable[[], object]], Awaitable[object]]
    ) -> None:
        context = create_isolated_execution_context("alice", agent_context={"draft": "text"})
        saved: list[object] = []

        async def save() -> None:
            saved.append(await where(lambda: current_context().agent_context["draft"]))

        context.callback(save)
        assert await context.aclose("expired") == ()
        assert saved == ["text"]

    @WHERE
    async def test_what_a_release_leaves_behind_may_not_use_it_after(
        self, where: Callable[[Callable[[], object]], Awaitable[object]]
    ) -> None:
        context = create_isolated_execution_context("alice")
        left_behind: list[asyncio.Task[object]] = []
        closed = asyncio.Event()

        async def straggle() -> object:
            await closed.wait()
            return await where(lambda: context.agent_context)

        async def release() -> None:
            left_behind.append(asyncio.create_task(straggle()))

        context.callback(release)
        await context.aclose()
        closed.set()
        with pytest.raises(ContextClosedError):
            await left_behind[0]

    @WHERE
    @pytest.mark.parametrize(("around", "owner_task"), EXITS.values(), ids=EXITS)
    @pytest.mark.parametrize("reason", ["expired", "closed"])
    async def test_the_exit_of_what_was_entered_uses_it_too(
        self,
        where: Callable[[Callable[[], object]], Awaitable[object]],
        around: Callable[[], AbstractAsyncContextManager[object]],
        owner_task: bool,
        reason: CloseReason,
    ) -> None:
        context = create_isolated_execution_context("alice", agent_context={"draft": "text"})
        saved: list[object] = []

        @asynccontextmanager
        async def saving() -> AsyncIterator[None]:
            async with around():
                try:
                    yield
                finally:
                    saved.append(await where(lambda: current_context().agent_context["draft"]))

        await context.enter_async_context(saving(), owner_task=owner_task)
        assert await context.aclose(reason) == ()
        assert saved == ["text"]

    async def test_so_does_one_whose_own_scope_is_cancelled_before_its_turn(self) -> None:
        context = create_isolated_execution_context("alice", agent_context={"draft": "text"})
        saved: list[object] = []
        exited = asyncio.Event()

        @asynccontextmanager
        async def saving() -> AsyncIterator[anyio.CancelScope]:
            with anyio.CancelScope() as scope:
                try:
                    yield scope
                finally:
                    saved.append(current_context().agent_context["draft"])
                    exited.set()

        async def cancel_it() -> None:
            scope.cancel()
            await exited.wait()

        scope = await context.enter_async_context(saving(), owner_task=True)
        context.callback(cancel_it)  # released first, and as long as it is, it is not the other one's turn
        assert await context.aclose("expired") == ()
        assert saved == ["text"]

    async def test_what_an_owner_leaves_behind_may_not_use_it_after(self) -> None:
        context = create_isolated_execution_context("alice")
        left_behind: list[asyncio.Task[object]] = []
        closed = asyncio.Event()

        async def straggle() -> object:
            await closed.wait()
            return context.agent_context

        @asynccontextmanager
        async def leaving() -> AsyncIterator[None]:
            yield
            left_behind.append(asyncio.create_task(straggle()))

        await context.enter_async_context(leaving(), owner_task=True)
        assert await context.aclose() == ()
        closed.set()
        with pytest.raises(ContextClosedError):
            await left_behind[0]

    async def test_one_release_that_ends_takes_nothing_from_another(self) -> None:
        context = create_isolated_execution_context("alice", agent_context={"draft": "text"})
        saved: list[object] = []

        async def save() -> None:
            with pytest.raises(ContextClosedError):
                context.callback(int)  # comes too late, and is released beside this one
            saved.append(context.agent_context["draft"])

        context.callback(save)
        assert await context.aclose() == ()
        assert saved == ["text"]

    def test_a_grant_taken_in_a_release_does_not_end_it(self) -> None:
        manager = UserContextManager()
        context = manager.create_isolated_context("alice", agent_context={"draft": "text"})
        seen: list[object] = []

        def save() -> None:
            with manager.privileged(reason="the last word", users=["bob"]):
                seen.append(context.agent_context["draft"])

        context.callback(save)
        context.close()
        assert (seen, context.lifetime.failures) == (["text"], ())


def in_the_middle_of(lock: Any, work: Callable[[], object]) -> bool:
    """Whether work that interrupts the holder of a lock, as finalizers and signal handlers do, gets through."""
    through = threading.Event()

    def hold() -> None:
        with lock:
            work()
        through.set()

    # A thread of its own, for what never gets through.
    threading.Thread(target=hold, daemon=True).start()
    return through.wait(PATIENCE)


class TestInTheMiddleOfAnything:
    """Finalizers and signal handlers interrupt whatever their thread does, and close and open contexts too."""

    @pytest.mark.parametrize("which", ["transition", "registry", "ledger"])
    def test_no_lock_of_ones_own_thread_stops_it(self, log: Log, which: str) -> None:
        manager = UserContextManager()
        context = manager.create_isolated_context("alice")
        context.callback(log.append, "released")
        trail: Any = manager._trail
        locks = {
            "transition": context.lifetime.transition,
            "registry": manager._registry._lock,
            "ledger": trail._ledger._lock,
        }

        def handler() -> None:
            manager.create_isolated_context("bob").callback(log.append, "bob's released")
            context.close()
            manager.cleanup_all_contexts()

        assert in_the_middle_of(locks[which], handler)
        assert log == ["released", "bob's released"]
        assert manager.get_active_contexts() == {}

    def test_what_is_being_added_when_the_context_closes_is_refused_and_released(self, log: Log) -> None:
        context = create_isolated_execution_context("alice")

        class Interrupted(list[Any]):
            def append(self, item: Any) -> None:
                context.close()
                super().append(item)

        context.lifetime.resources = Interrupted()
        with pytest.raises(ContextClosedError):
            context.callback(log.append, "released")
        assert log == ["released"]

    @pytest.mark.parametrize("moment", [1, 2])
    def test_what_is_being_registered_when_it_closes_does_not_stay(self, moment: int) -> None:
        readings: list[int] = []
        at = 0

        def clock() -> float:
            readings.append(1)
            if len(readings) == at:
                context.close()
            return 1000.0

        context = create_isolated_execution_context("alice", "r-2")
        manager = UserContextManager(max_contexts_per_user=2, clock=clock)
        manager.create_isolated_context("alice", "r-1", ttl_seconds=60)
        at = len(readings) + moment
        with pytest.raises(ContextClosedError):
            manager.set_context(("alice", "r-1"), context, ttl_seconds=60)
        at = 0
        for key in manager.get_active_contexts():
            assert manager.get_context(key).request_id == "r-1"


class TestChildrenOfOneThatEnds:
    """What keeps a context from being used keeps its children from it too."""

    async def test_they_are_of_no_use_while_their_parent_waits_for_its_handler(self) -> None:
        context = create_isolated_execution_context("alice")
        child = context.create_child_context("search")
        grandchild = child.create_child_context("read")
        inside, end = asyncio.Event(), asyncio.Event()

        async def handle() -> None:
            async with managed_user_context(context):
                inside.set()
                await end.wait()

        handler = asyncio.create_task(handle())
        await inside.wait()
        context.close("cleared")
        for part in (child, grandchild):
            assert not part.is_open
            with pytest.raises(ContextClosedError) as caught:
                _ = part.agent_context
            assert caught.value.reason == "cleared"
            with pytest.raises(ContextClosedError) as caught:
                validate_user_context(part)
            assert caught.value.reason == "cleared"
        end.set()
        await handler
        assert (child.is_open, grandchild.is_open) == (False, False)

    @pytest.mark.parametrize("add", ["callback", "closing"])
    def test_they_take_nothing_in_once_their_parent_has_expired(self, log: Log, add: str) -> None:
        clock = Clock()
        manager = UserContextManager(clock=clock)
        parent = manager.create_isolated_context("alice", ttl_seconds=1.0)
        child = parent.create_child_context("search")
        clock.advance(1.0)
        with pytest.raises(ContextClosedError):
            if add == "callback":
                child.callback(log.append, "released")
            else:
                child.closing(Closes(log))
        assert log == ["released"]
        with pytest.raises(ContextClosedError):
            validate_user_context(child)
        parent.close()
        assert log == ["released"]

    async def test_none_is_left_open_when_what_must_be_waited_for_is_deeper_down(self, log: Log) -> None:
        parent = create_isolated_execution_context("alice")
        first, last = parent.create_child_context("first"), parent.create_child_context("last")
        deep = last.create_child_context("deep")
        released = asyncio.Event()

        async def release() -> None:
            log.append("deep")

        def end() -> None:
            log.append("first")
            released.set()

        deep.callback(release)
        first.callback(end)
        parent.close()
        assert [node.is_open for node in (parent, first, last, deep)] == [False] * 4
        async with asyncio.timeout(PATIENCE):
            await released.wait()
        await parent.aclose()
        assert log == ["deep", "first"]
        assert "closed>" in repr(first)

    @pytest.mark.parametrize("on_a_loop_that_ended", [False, True])
    def test_none_is_left_open_when_another_thread_is_closing_one(self, log: Log, on_a_loop_that_ended: bool) -> None:
        parent = create_isolated_execution_context("alice")
        first, last = parent.create_child_context("first"), parent.create_child_context("last")
        releasing, may_end = threading.Event(), threading.Event()

        def release() -> None:
            releasing.set()
            may_end.wait(PATIENCE)

        async def hold() -> None:
            last.callback(release)

        asyncio.run(hold()) if on_a_loop_that_ended else last.callback(release)
        first.callback(log.append, "first")
        elsewhere = threading.Thread(target=last.close)
        elsewhere.start()
        assert releasing.wait(PATIENCE)
        parent.close()
        assert log == ["first"]
        may_end.set()
        elsewhere.join(PATIENCE)
        assert [repr(node).endswith("closed>") for node in (parent, first, last)] == [True] * 3


class Closes:
    def __init__(self, log: Log) -> None:
        self.log = log

    def close(self) -> None:
        self.log.append("released")
