"""A world that a test moves step by step: an event loop with a time of its own, resources, and code inside contexts."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from inspect import isawaitable
from typing import Any, Final, Literal, TypeVar, TypeVarTuple, Unpack, cast

from ucm_middleware import UserExecutionContext, current_context

from .waiting import PATIENCE

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Kind = Literal["cm", "async cm", "owned cm", "close", "aclose", "awaitable close", "callback", "async callback"]
Fault = Literal["none", "fails", "hangs", "looks"]

KINDS: Final[tuple[Kind, ...]] = (
    "cm",
    "async cm",
    "owned cm",
    "close",
    "aclose",
    "awaitable close",
    "callback",
    "async callback",
)
ASYNCHRONOUS: Final[frozenset[Kind]] = frozenset({"async cm", "owned cm", "aclose", "awaitable close"})
"""The kinds whose release can be given a timeout, and so may hang."""

TIMEOUT: Final = 0.5
"""Seconds, on the world's loop, that a release may take."""

MOST_WAITS: Final = 100
"""How often what hangs may have to run out of its time until nothing does any more."""


class Loop(asyncio.SelectorEventLoop):
    """Its time stands still until it is told to move on, and it knows when there is nothing left to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.scheduled = 0
        super().__init__()

    def time(self) -> float:
        return self.now

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.scheduled += 1
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.scheduled += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


class World:
    """``releases`` is every release so far, in the order in which they began."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.gate = asyncio.Event()
        self.gate.set()
        self.hanging = 0
        self.releases: list[Thing] = []
        self.surprises: list[str] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the loop, and let everything that follows from it happen."""

        async def settled() -> T:
            result = await work
            await self.settle()
            return result

        return self.loop.run_until_complete(settled())

    async def settle(self) -> None:
        """Wait until nothing happens any more of itself. What hangs runs out of its time."""
        for _ in range(MOST_WAITS):
            before = -1
            while self.loop.scheduled != before + 1:  # the one is this task, that comes back
                before = self.loop.scheduled
                await asyncio.sleep(0)
            apart = [thread for thread in threading.enumerate() if thread.name == "ucm-middleware release"]
            for thread in apart:
                thread.join(PATIENCE)
            if self.hanging:
                self.loop.now += TIMEOUT
            elif not apart:
                return
        raise AssertionError("what hangs is not cut off")

    async def outcome(self, work: Awaitable[T]) -> T:
        """What comes of something that may have to wait: for releases, for what hangs."""
        task = asyncio.ensure_future(work)
        await self.settle()
        return task.result()

    def close(self) -> None:
        """The end. What is still running after a failure is cancelled."""
        self.gate.set()
        try:
            for _ in range(10):
                for task in asyncio.all_tasks(self.loop):
                    task.cancel()
                self.run(asyncio.sleep(0))
        finally:
            self.loop.close()


class Thing:
    """A resource of any kind. It writes down its releases, and what it saw."""

    def __init__(self, world: World, context: UserExecutionContext, kind: Kind, fault: Fault) -> None:
        self.world = world
        self.context = context
        self.kind = kind
        self.fault = fault
        self.released = 0
        self.seen: BaseException | None = None
        self.sees_errors = kind in ("cm", "async cm", "owned cm")

    def __repr__(self) -> str:
        return f"<{self.kind} that {self.fault} of {self.context.request_id}, released {self.released} times>"

    async def enter(self) -> None:
        """Enter it on its context. Raises what that raises."""
        context = self.context
        match self.kind:
            case "cm":
                context.enter_context(self)
            case "async cm":
                await context.enter_async_context(self, timeout=TIMEOUT)
            case "owned cm":
                await context.enter_async_context(self, owner_task=True, timeout=TIMEOUT)
            case "close":
                context.closing(Closing(self.let_go))
            case "aclose":
                context.closing(AClosing(self.let_go_later), timeout=TIMEOUT)
            case "awaitable close":
                context.closing(Closing(self.let_go_later), timeout=TIMEOUT)
            case "callback":
                context.callback(self.let_go)
            case "async callback":
                context.callback(self.let_go_later)

    def __enter__(self) -> "Thing":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.seen = error
        self.let_go()

    async def __aenter__(self) -> "Thing":
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.seen = error
        await self.let_go_later()

    def let_go(self) -> None:
        self.released += 1
        self.world.releases.append(self)
        if self.fault == "looks" and (
            current_context() is not self.context or "secret" not in self.context.agent_context
        ):
            self.world.surprises.append(f"{self} does not run in its context")
        if self.fault == "fails":
            raise OSError("no space left")

    async def let_go_later(self) -> None:
        self.let_go()
        await self.world.gate.wait()
        if self.fault == "hangs":
            self.world.hanging += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.world.hanging -= 1


class Closing:
    """Has a ``close``; what that returns may have to be awaited."""

    def __init__(self, close: Callable[[], object]) -> None:
        self.close = close


class AClosing:
    def __init__(self, close: Callable[[], Awaitable[None]]) -> None:
        self.aclose = close


class Inside:
    """Code that stays in a context, in a task of its own, and does what it is asked to until it is told to end."""

    def __init__(self, world: World, *, is_block: bool = False) -> None:
        self.world = world
        self.is_block = is_block
        self.context: UserExecutionContext | None = None
        self.variables = Context()
        self.task: asyncio.Task[Any] | None = None
        self._jobs: asyncio.Queue[tuple[Callable[[], object], asyncio.Future[Any]] | Exception | None] = asyncio.Queue()

    async def stay(self, context: UserExecutionContext) -> None:
        """What the handler does."""
        self.context = context
        self.variables = copy_context()
        while (job := await self._jobs.get()) is not None:
            if isinstance(job, Exception):
                raise job
            work, answer = job
            try:
                answer.set_result(await finished(work()))
            except Exception as error:  # noqa: BLE001 - handed to who asked
                answer.set_exception(error)

    async def do(self, work: Callable[[], Awaitable[T] | T]) -> T:
        """Have the handler's task do something. Returns, or raises, what came of it."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait((work, answer))
        await self.world.settle()
        return cast(T, answer.result())

    def end(self, error: Exception | None = None) -> None:
        """Let the handler return, or raise."""
        self._jobs.put_nowait(error)


async def finished(result: Awaitable[T] | T) -> T:
    """What came of a call, when it had to be awaited too."""
    return await cast("Awaitable[T]", result) if isawaitable(result) else result
