"""The cancellation matrix: kind of cancel x where it strikes x kind of resource.

Whatever cancels a request, and wherever it stands: what was entered is exited once, the last first, or reported by
name; the cancellation reaches whoever runs the request, alone; nothing of the request is left.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from ucm_middleware import (
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
    managed_user_context,
)
from ucm_middleware.types import Message, Receive, Scope, Send

pytestmark = [pytest.mark.no_cover, pytest.mark.matrix]  # see pyproject.toml

NAMES = ("outer", "middle", "inner")
HANDLER_MOMENTS = ("before", "between", "entering", "body")
EXIT_MOMENTS = tuple(f"exit of {name}" for name in NAMES)
VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="")
DEADLINE = 0.002  # seconds that a resource gets which will not need fewer
TURNS = 4  # of the loop: more than any cancellation needs to arrive


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucm_middleware.lifetime.CANCEL_GRACE", DEADLINE)


async def some_turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


@dataclass
class Trial:
    """One request: the moment at which to strike, and what the request did."""

    moment: str
    fire: Callable[[], object] = lambda: None
    on_every_exit: Callable[[], object] = lambda: None
    entered: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    context: UserExecutionContext | None = None
    data: dict[str, Any] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    fired: bool = False
    survived: bool = False
    group: ExceptionGroup[Exception] | None = None

    def strike(self, moment: str) -> bool:
        if moment != self.moment or self.fired:
            return False
        self.fired = True
        self.fire()
        return True

    async def stand(self, moment: str) -> None:
        """A place where the handler waits: for ever, when it is where the cancellation strikes."""
        if self.strike(moment):
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    async def entering(self, name: str) -> None:
        if name == "middle":
            await self.stand("entering")

    def leaving_now(self, name: str) -> None:
        self.left.append(name)
        self.on_every_exit()
        self.strike(f"exit of {name}")

    async def leaving(self, name: str) -> None:
        self.leaving_now(name)
        await some_turns()


class Thing:
    def __init__(self, trial: Trial, name: str) -> None:
        self.trial = trial
        self.name = name


class SyncThing(Thing):
    def __enter__(self) -> None:
        self.trial.entered.append(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trial.leaving_now(self.name)


class AsyncThing(Thing):
    async def __aenter__(self) -> None:
        await self.trial.entering(self.name)
        self.trial.entered.append(self.name)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.trial.leaving(self.name)


class FailingSync(SyncThing):
    def __exit__(self, *args: object) -> NoReturn:
        self.trial.leaving_now(self.name)
        raise OSError(f"{self.name} is broken")


class FailingAsync(AsyncThing):
    async def __aexit__(self, *args: object) -> NoReturn:
        await self.trial.leaving(self.name)
        raise OSError(f"{self.name} is broken")


class Hanging(AsyncThing):
    async def __aexit__(self, *args: object) -> None:
        await self.trial.leaving(self.name)
        await asyncio.Event().wait()


class Swallowing(AsyncThing):
    async def __aexit__(self, *args: object) -> None:
        self.trial.leaving_now(self.name)
        while not self.trial.over.is_set():
            try:
                await self.trial.over.wait()
            except asyncio.CancelledError:
                continue


class WithClose(Thing):
    def close(self) -> None:
        self.trial.leaving_now(self.name)


class WithAclose(Thing):
    async def aclose(self) -> None:
        await self.trial.leaving(self.name)


class WithCloseToAwait(Thing):
    def close(self) -> Awaitable[None]:
        return self.trial.leaving(self.name)


@asynccontextmanager
async def resetting(trial: Trial, name: str) -> AsyncIterator[None]:
    await trial.entering(name)
    token = VARIABLE.set(name)
    trial.entered.append(name)
    try:
        yield
    finally:
        await trial.leaving(name)
        VARIABLE.reset(token)


@asynccontextmanager
async def with_task_group(trial: Trial, name: str) -> AsyncIterator[None]:
    await trial.entering(name)
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        trial.entered.append(name)
        try:
            yield
        finally:
            await trial.leaving(name)
            group.cancel_scope.cancel()


# How a resource of each kind gets onto the context.

Enter = Callable[[UserExecutionContext, Trial, str], Awaitable[None]]


async def enter_sync(context: UserExecutionContext, trial: Trial, name: str) -> None:
    context.enter_context(SyncThing(trial, name), name=name)


async def enter_async(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(AsyncThing(trial, name), name=name)


async def enter_resetting(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(resetting(trial, name), name=name)


async def enter_resetting_in_owner(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(resetting(trial, name), name=name, owner_task=True)


async def enter_task_group(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(with_task_group(trial, name), name=name, owner_task=True)


async def enter_callback(context: UserExecutionContext, trial: Trial, name: str) -> None:
    def release(of: str) -> None:
        trial.leaving_now(of)

    release.__qualname__ = name
    context.callback(release, name)
    trial.entered.append(name)


async def enter_async_callback(context: UserExecutionContext, trial: Trial, name: str) -> None:
    async def release(of: str) -> None:
        await trial.leaving(of)

    release.__qualname__ = name
    context.callback(release, name)
    trial.entered.append(name)


async def enter_close(context: UserExecutionContext, trial: Trial, name: str) -> None:
    context.closing(WithClose(trial, name), name=name)
    trial.entered.append(name)


async def enter_aclose(context: UserExecutionContext, trial: Trial, name: str) -> None:
    context.closing(WithAclose(trial, name), name=name)
    trial.entered.append(name)


async def enter_close_to_await(context: UserExecutionContext, trial: Trial, name: str) -> None:
    context.closing(WithCloseToAwait(trial, name), name=name)
    trial.entered.append(name)


async def enter_failing_sync(context: UserExecutionContext, trial: Trial, name: str) -> None:
    context.enter_context(FailingSync(trial, name), name=name)


async def enter_failing_async(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(FailingAsync(trial, name), name=name)


async def enter_hanging(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(Hanging(trial, name), name=name, timeout=DEADLINE)


async def enter_swallowing(context: UserExecutionContext, trial: Trial, name: str) -> None:
    await context.enter_async_context(Swallowing(trial, name), name=name, timeout=DEADLINE)


RESOURCES: dict[str, Enter] = {
    "sync cm": enter_sync,
    "async cm": enter_async,
    "resets a token": enter_resetting,
    "resets a token, owned": enter_resetting_in_owner,
    "task group, owned": enter_task_group,
    "callback": enter_callback,
    "async callback": enter_async_callback,
    "close": enter_close,
    "aclose": enter_aclose,
    "close to await": enter_close_to_await,
    "fails": enter_failing_sync,
    "fails async": enter_failing_async,
    "hangs": enter_hanging,
    "swallows": enter_swallowing,
}
WAIT_TO_ENTER = {enter_async, enter_resetting, enter_resetting_in_owner, enter_task_group, enter_failing_async}
WAIT_TO_ENTER |= {enter_hanging, enter_swallowing}
WAIT_TO_EXIT = WAIT_TO_ENTER | {enter_async_callback, enter_aclose, enter_close_to_await}
OUTCOMES: dict[Enter, str] = {
    enter_failing_sync: "failed",
    enter_failing_async: "failed",
    enter_hanging: "timed out",
    enter_swallowing: "timed out",
}
OWNED = {enter_resetting_in_owner, enter_task_group}


def outcomes_expected(enter: Enter, cancel: str, host: str, moment: str) -> set[str | None]:
    """How a resource may end: None is well, anything else is reported."""
    expected: set[str | None] = {OUTCOMES.get(enter)}
    if enter is enter_resetting and (host == "managed" or cancel == "disconnect"):
        # Entered in the task's own Context, which no other task can have: such wants an owner task, and is reported.
        expected = {"failed"}
    if cancel == "asyncio.run" and moment in EXIT_MOMENTS and enter in WAIT_TO_EXIT:
        expected.add("cancelled")  # the loop's end cancels the very task that releases
    return expected


# The request: the same handler through both ways in.

Work = Callable[[Trial], Awaitable[None]]


def handler_entering(resources: Iterable[tuple[str, Enter]]) -> Work:
    async def handler(trial: Trial) -> None:
        trial.context = context = current_context()
        trial.data = context.agent_context
        trial.data["secret"] = "alice's"
        await trial.stand("before")
        for name, enter in resources:
            await enter(context, trial, name)
            if name == "outer":
                await trial.stand("between")
        await trial.stand("body")

    return handler


def through_managed(manager: UserContextManager, handler: Work) -> Work:
    async def work(trial: Trial) -> None:
        try:
            async with managed_user_context(manager.create_isolated_context("alice")):
                await handler(trial)
        except ExceptionGroup as group:  # what the resources raised, and nothing else
            trial.group = group

    return work


def through_middleware(manager: UserContextManager, handler: Work) -> Work:
    async def work(trial: Trial) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await handler(trial)

        await UserContextMiddleware(app, manager=manager)(http_scope(), never, ignore)

    return work


def http_scope() -> Scope:
    return {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"version": "3.0"}}


async def never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def ignore(message: Message) -> None:
    pass


HOSTS = {"managed": through_managed, "middleware": through_middleware}


# How a request is cancelled. Each runs it, has the trial fire in the right moment, and looks at what gets out of it.


async def wholly(work: Work, trial: Trial) -> None:
    """The request and a little more: whoever is cancelled does not get beyond this."""
    await work(trial)
    await some_turns()
    await anyio.lowlevel.checkpoint()
    trial.survived = True


async def cancel_natively(work: Work, trial: Trial) -> None:
    task = asyncio.create_task(wholly(work, trial))
    trial.fire = task.cancel
    await asyncio.wait([task])
    assert task.cancelled()


async def cancel_natively_three_times(work: Work, trial: Trial) -> None:
    task = asyncio.create_task(wholly(work, trial))
    trial.fire = lambda: [task.cancel() for _ in range(3)]
    await asyncio.wait([task])
    assert task.cancelled()
    assert task.cancelling() == 3


async def cancel_natively_again_and_again(work: Work, trial: Trial) -> None:
    task = asyncio.create_task(wholly(work, trial))
    trial.fire = task.cancel
    trial.on_every_exit = lambda: trial.fired and task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def cancel_by_timeout(work: Work, trial: Trial) -> None:
    timeout = asyncio.timeout(None)
    with pytest.raises(TimeoutError):
        async with timeout:
            trial.fire = lambda: timeout.reschedule(asyncio.get_running_loop().time())
            await wholly(work, trial)
    assert timeout.expired()


async def cancel_by_sibling(work: Work, trial: Trial) -> None:
    failing = asyncio.Event()
    trial.fire = failing.set
    tasks: list[asyncio.Task[None]] = []
    with pytest.RaisesGroup(pytest.RaisesExc(ZeroDivisionError)):
        async with asyncio.TaskGroup() as group:
            tasks.append(group.create_task(wholly(work, trial)))
            await failing.wait()
            raise ZeroDivisionError
    assert tasks[0].cancelled()


async def cancel_by_anyio_sibling(work: Work, trial: Trial) -> None:
    failing = asyncio.Event()
    trial.fire = failing.set
    with pytest.RaisesGroup(pytest.RaisesExc(ZeroDivisionError)):
        async with anyio.create_task_group() as group:
            group.start_soon(wholly, work, trial)
            await failing.wait()
            raise ZeroDivisionError


async def cancel_by_scope(work: Work, trial: Trial) -> None:
    with anyio.CancelScope() as scope:
        trial.fire = scope.cancel
        await wholly(work, trial)
    assert scope.cancelled_caught


async def cancel_by_move_on_after(work: Work, trial: Trial) -> None:
    with anyio.move_on_after(None) as scope:
        trial.fire = lambda: setattr(scope, "deadline", anyio.current_time())
        await wholly(work, trial)
    assert scope.cancelled_caught


async def cancel_by_fail_after(work: Work, trial: Trial) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(None) as scope:
        trial.fire = lambda: setattr(scope, "deadline", anyio.current_time())
        await wholly(work, trial)
    assert scope.cancelled_caught


CANCELS: dict[str, Callable[[Work, Trial], Awaitable[None]]] = {
    "native": cancel_natively,
    "native three times": cancel_natively_three_times,
    "native during teardown": cancel_natively_again_and_again,
    "asyncio.timeout": cancel_by_timeout,
    "TaskGroup": cancel_by_sibling,
    "anyio task group": cancel_by_anyio_sibling,
    "CancelScope": cancel_by_scope,
    "move_on_after": cancel_by_move_on_after,
    "fail_after": cancel_by_fail_after,
}


# What must hold.


class Complaints:
    """What the event loop was told that nobody looks after: lost errors, tasks destroyed while pending."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def note(self, loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        self.told.append(about)


def check(trial: Trial, manager: UserContextManager, expected: Callable[[str], set[str | None]], lifo: bool) -> None:
    """``expected`` says how the resource of that name may end."""
    assert trial.context is not None
    failures = trial.context.lifetime.failures
    reported = {failure.name: failure for failure in failures}
    assert len(reported) == len(failures), "reported twice"
    assert set(reported) <= set(trial.entered), "reported what was not entered"
    for name in trial.entered:
        failure = reported.get(name)
        assert (None if failure is None else failure.outcome) in expected(name)
        assert failure is None or isinstance(failure.error, Exception)
        # What the end of the loop cancels before its exit has begun is reported only.
        assert trial.left.count(name) == 1 or (failure is not None and failure.outcome == "cancelled")
    assert set(trial.left) <= set(trial.entered)
    if lifo:
        assert trial.left == [name for name in reversed(trial.entered) if name in trial.left]
    assert trial.data == {}, "the data was not wiped"
    assert repr(trial.context).endswith("closed>")
    assert manager.get_active_contexts() == {}
    assert not manager._closing
    if trial.group is not None:
        assert list(trial.group.exceptions) == [failure.error for failure in failures]


def new_manager() -> UserContextManager:
    return UserContextManager(guard="open")  # asked from outside, after the request


def moments_of(enter: Enter, moments: Iterable[str]) -> list[str]:
    return [moment for moment in moments if moment != "entering" or enter in WAIT_TO_ENTER]


def cases(cancels: Iterable[str], hosts: Iterable[str], moments: Iterable[str]) -> list[Any]:
    return [
        pytest.param(cancel, host, enter, moment, id=f"{cancel} - {host} - {kind} - {moment}")
        for cancel in cancels
        for host in hosts
        for kind, enter in RESOURCES.items()
        for moment in moments_of(enter, moments)
    ]


async def run_and_check_tasks(cancel: Callable[[Work, Trial], Awaitable[None]], work: Work, trial: Trial) -> None:
    await cancel(work, trial)
    assert trial.survived is not trial.fired
    left_running = asyncio.all_tasks() - {asyncio.current_task()}
    assert all(task.get_name().startswith("release ") for task in left_running)
    assert trial.context is not None
    assert len(left_running) == sum("left running" in str(f.error) for f in trial.context.lifetime.failures)
    trial.over.set()
    if left_running:
        await asyncio.wait(left_running)


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
@pytest.mark.parametrize(("cancel", "host", "enter", "moment"), cases(CANCELS, HOSTS, HANDLER_MOMENTS + EXIT_MOMENTS))
def test_cancelled(cancel: str, host: str, enter: Enter, moment: str) -> None:
    manager, complaints = new_manager(), Complaints()
    work = HOSTS[host](manager, handler_entering([(name, enter) for name in NAMES]))

    async def main() -> Trial:
        asyncio.get_running_loop().set_exception_handler(complaints.note)
        trial = Trial(moment)
        await run_and_check_tasks(CANCELS[cancel], work, trial)
        return trial

    trial = asyncio.run(main())
    check(trial, manager, lambda name: outcomes_expected(enter, cancel, host, moment), lifo=True)
    assert complaints.told == []


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
@pytest.mark.parametrize(
    ("cancel", "host", "enter", "moment"), cases(["asyncio.run"], HOSTS, HANDLER_MOMENTS + EXIT_MOMENTS)
)
def test_the_loop_ends(cancel: str, host: str, enter: Enter, moment: str) -> None:
    manager, complaints = new_manager(), Complaints()
    work = HOSTS[host](manager, handler_entering([(name, enter) for name in NAMES]))
    tasks: list[asyncio.Task[None]] = []

    async def main() -> Trial:
        asyncio.get_running_loop().set_exception_handler(complaints.note)
        trial, ending = Trial(moment), asyncio.Event()
        trial.fire = ending.set
        tasks.append(asyncio.create_task(wholly(work, trial)))
        tasks[0].add_done_callback(lambda _: trial.over.set())
        await ending.wait()
        return trial  # asyncio.run now cancels whatever there is, all at once

    trial = asyncio.run(main())
    assert tasks[0].cancelled()
    assert not trial.survived
    # Owner tasks are cancelled with all others, and leave at once.
    check(trial, manager, lambda name: outcomes_expected(enter, cancel, host, moment), lifo=enter not in OWNED)
    gc.collect()
    assert complaints.told == []


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
@pytest.mark.parametrize(("cancel", "host", "enter", "moment"), cases(["disconnect"], ["middleware"], HANDLER_MOMENTS))
def test_the_client_leaves_a_stream(cancel: str, host: str, enter: Enter, moment: str) -> None:
    manager, complaints = new_manager(), Complaints()
    handler = handler_entering([(name, enter) for name in NAMES])

    async def leaves(work: Work, trial: Trial) -> None:
        gone = asyncio.Event()
        trial.fire = gone.set

        async def body() -> AsyncIterator[bytes]:
            await handler(trial)
            trial.survived = True
            yield b"all of it"

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        await UserContextMiddleware(StreamingResponse(body()), manager=manager)(http_scope(), receive, ignore)

    async def main() -> Trial:
        asyncio.get_running_loop().set_exception_handler(complaints.note)
        trial = Trial(moment)
        await run_and_check_tasks(leaves, handler, trial)
        return trial

    trial = asyncio.run(main())
    check(trial, manager, lambda name: outcomes_expected(enter, cancel, host, moment), lifo=True)
    assert complaints.told == []


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
@pytest.mark.parametrize("enter", RESOURCES.values(), ids=RESOURCES)
def test_the_server_refuses_a_chunk_of_a_stream(enter: Enter) -> None:
    # Servers of the newer ASGI say so by an OSError from send: the generator is broken off where it yields.
    manager, complaints = new_manager(), Complaints()
    handler = handler_entering([(name, enter) for name in NAMES])

    async def breaks_off(work: Work, trial: Trial) -> None:
        async def body() -> AsyncIterator[bytes]:
            await handler(trial)
            trial.fired = True
            yield b"half of it"
            trial.survived = True

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise OSError("the client has gone")

        scope = {**http_scope(), "asgi": {"version": "3.0", "spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            await UserContextMiddleware(StreamingResponse(body()), manager=manager)(scope, never, send)

    async def main() -> Trial:
        asyncio.get_running_loop().set_exception_handler(complaints.note)
        trial = Trial("nowhere")
        await run_and_check_tasks(breaks_off, handler, trial)
        return trial

    trial = asyncio.run(main())
    check(trial, manager, lambda name: outcomes_expected(enter, "send", "middleware", "body"), lifo=True)
    assert complaints.told == []


# The same with any stack of resources, and the cancellations at any turn of the loop.

stacks = st.lists(st.sampled_from(sorted(RESOURCES)), max_size=5)
turns_between = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@pytest.mark.ucm_leaks("a resource is never released, and that is reported")
@given(stacks, turns_between, st.sampled_from(sorted(HOSTS)), st.booleans())
def test_cancelled_at_any_turn(stack: list[str], gaps: list[int], host: str, by_anyio: bool) -> None:
    manager, complaints = new_manager(), Complaints()
    kinds = {f"{number} {kind}": RESOURCES[kind] for number, kind in enumerate(stack)}
    work = HOSTS[host](manager, handler_entering(kinds.items()))

    async def in_scope(scope: anyio.CancelScope, trial: Trial) -> None:
        with scope:
            await wholly(work, trial)

    async def cancel(work: Work, trial: Trial) -> None:
        scope = anyio.CancelScope()
        task = asyncio.create_task(in_scope(scope, trial))
        await asyncio.sleep(0)
        for gap in gaps:
            for _ in range(gap):
                await asyncio.sleep(0)
            if not task.done():
                trial.fired = True
                scope.cancel() if by_anyio else task.cancel()
        await asyncio.wait([task])
        if by_anyio:
            assert scope.cancelled_caught is trial.fired
        else:
            assert task.cancelled() is trial.fired

    async def main() -> Trial:
        asyncio.get_running_loop().set_exception_handler(complaints.note)
        trial = Trial("nowhere")
        await run_and_check_tasks(cancel, work, trial)
        return trial

    trial = asyncio.run(main())
    check(trial, manager, lambda name: outcomes_expected(kinds[name], "any", host, "any"), lifo=True)
    assert complaints.told == []
