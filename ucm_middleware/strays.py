"""What a handler that was cut off leaves running: threads, and the tasks in which its framework runs it.

To cancel a task ends no thread, and no task that it waits for with ``asyncio.wait``. Other tasks are none of this: they
may be shielded on purpose, or end with what is released.
"""

import asyncio
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, NamedTuple

from ucm_middleware.current import ambient
from ucm_middleware.threads import entered_elsewhere, is_entered, module_of
from ucm_middleware.waiting import Cancelled, settle, wake

SERVED_IN_TASKS: Final = frozenset({"django", "quart"})
"""Frameworks that run a handler in a task of their own, and leave that to itself when the request is cancelled."""

QUICK: Final = 0.001
"""Seconds that a look may take on each turn of the loop."""

SHARE: Final = 20
"""After one that takes longer, so many times its duration pass before the next: a twentieth of the loop's time."""

coroutine_of: Final[Callable[[object], object]] = vars(asyncio.Task)["get_coro"]  # a subclass may have its own


@dataclass(frozen=True, slots=True)
class StrayTask:
    """One in which a framework runs the handler."""

    task: "asyncio.Task[Any]"

    def __str__(self) -> str:
        coroutine = coroutine_of(self.task)
        return f"the task {getattr(coroutine, '__qualname__', type(coroutine).__name__)}"

    @property
    def runs(self) -> bool:
        return not self.task.done()

    def is_here(self) -> bool:
        """Whether it is the one that asks: a view of Django's may close a context of its own."""
        return self.task is asyncio.current_task()

    def end(self) -> bool:
        """Cancel it, and say that this ends it."""
        self.task.cancel()
        return True


@dataclass(frozen=True, slots=True)
class StrayThread:
    """One that runs in a Context in which the context is the running one."""

    variables: Context

    def __str__(self) -> str:
        return "a thread"

    @property
    def runs(self) -> bool:
        return is_entered(self.variables)

    def is_here(self) -> bool:
        """It is another thread."""
        return False

    def end(self) -> bool:
        """Nothing ends a thread."""
        return False


Stray = StrayTask | StrayThread


class _Question(NamedTuple):
    """What is found for a context goes in here, and who asked is woken: a future that had it as its result would be
    held, and so all of it, by the frames of a cancellation that came meanwhile.
    """

    waiter: "asyncio.Future[None]"
    found: list[Stray]


class Strays:
    """Looks for those of the contexts of one manager: for those of all contexts that are cut off at a time together."""

    __slots__ = ("_asked", "_clock", "_next")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[asyncio.AbstractEventLoop, dict[object, _Question]] = {}
        self._next = 0.0

    async def of(self, node: object, cancelled: Cancelled) -> list[Stray]:
        """Those of a context: the tasks on this event loop, and the threads also of what is below it."""
        loop = asyncio.get_running_loop()
        asked = self._asked.get(loop)
        if asked is None:
            asked = self._asked[loop] = {}
            # In an empty Context: a handle keeps its own until it is due.
            if (wait := self._next - self._clock()) > 0:
                loop.call_later(wait, self._look, loop, context=Context())
            else:
                loop.call_soon(self._look, loop, context=Context())
        question = asked[node] = _Question(loop.create_future(), [])
        await settle(question.waiter, math.inf, cancelled)
        # No name for the task here: frames of a cancellation, which it keeps in the end, may hold this one.
        return [stray for stray in question.found if not stray.is_here()]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        began = self._clock()
        asked = self._asked.pop(loop)
        try:
            for task in asyncio.all_tasks(loop):
                if package_of(task) in SERVED_IN_TASKS and (node := _inside(variables_of(task))) in asked:
                    asked[node].found.append(StrayTask(task))
            for variables in entered_elsewhere():
                for node in _with_all_above(_inside(variables)):
                    if node in asked:
                        asked[node].found.append(StrayThread(variables))
        finally:
            for question in asked.values():
                wake(question.waiter)
            ended = self._clock()
            if ended - began > QUICK:
                self._next = ended + SHARE * (ended - began)


def package_of(task: "asyncio.Task[Any]") -> str:
    """The top package that a task's coroutine is written in; nothing where it does not tell."""
    frame: FrameType | None = getattr(coroutine_of(task), "cr_frame", None)
    return "" if frame is None else module_of(frame).partition(".")[0]


def variables_of(value: object) -> Context | None:
    """The Context among what a task or a handle refers to: before Python 3.12 a task does not tell."""
    return next((one for one in gc.get_referents(value) if type(one) is Context), None)


def _inside(variables: Context | None) -> Any:
    value = None if variables is None else variables.get(ambient)
    return None if value is None else value.context


def _with_all_above(node: Any) -> Iterator[object]:
    while node is not None:
        yield node
        node = node._parent
