"""What a handler that was cut off leaves running: the tasks and threads that it began, which go on without it.

To cancel a task ends none that it waits for with ``asyncio.wait``, or has forgotten, and no thread.
"""

import asyncio
import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from ucm_middleware.current import ambient
from ucm_middleware.threads import entered_elsewhere, is_entered, module_of
from ucm_middleware.waiting import Cancelled, settle

SERVED_IN_TASKS: Final = frozenset({"django", "quart"})
"""Frameworks that run a handler in a task of their own, and leave that to itself when the request is cancelled."""

SHARE: Final = 20
"""After a look, so many times its duration pass before the next: together they take a twentieth of the loop's time."""

_OURS: Final = "ucm_middleware"
"""Our own tasks end by themselves: the owner of a resource, the run of an agent, which has a context of its own."""

_coroutine_of: Final[Callable[[object], object]] = vars(asyncio.Task)["get_coro"]  # a subclass may have its own


@dataclass(frozen=True, slots=True)
class StrayTask:
    """One that began in the context."""

    task: "asyncio.Task[Any]"

    def __str__(self) -> str:
        coroutine = _coroutine_of(self.task)
        return f"the task {getattr(coroutine, '__qualname__', type(coroutine).__name__)}"

    @property
    def runs(self) -> bool:
        return not self.task.done()

    def end(self) -> bool:
        """Cancel it where it is the handler itself, and say whether it is: others may be shielded on purpose."""
        if package_of(self.task) not in SERVED_IN_TASKS:
            return False
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

    def end(self) -> bool:
        """Nothing ends a thread."""
        return False


Stray = StrayTask | StrayThread
Found = dict[object, list[Stray]]
"""By context."""


class Strays:
    """Looks for those of the contexts of one manager: for those of all contexts that are cut off at a time together."""

    __slots__ = ("_looks", "_next")

    def __init__(self) -> None:
        self._looks: dict[asyncio.AbstractEventLoop, asyncio.Future[Found]] = {}
        self._next = 0.0

    async def of(self, node: object, cancelled: Cancelled) -> list[Stray]:
        """Those of a context: the tasks on this event loop that began in it, and the threads that run in it or in one
        below it.
        """
        loop = asyncio.get_running_loop()
        look = self._looks.get(loop)
        if look is None:
            look = self._looks[loop] = loop.create_future()
            # In an empty Context: a timer keeps its own until it is due.
            loop.call_later(max(0.0, self._next - time.monotonic()), self._look, loop, context=Context())
        await settle(look, math.inf, cancelled)
        here = asyncio.current_task()
        return [stray for stray in look.result().get(node, ()) if not (type(stray) is StrayTask and stray.task is here)]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        began = time.monotonic()
        found: Found = defaultdict(list)
        try:
            for task in asyncio.all_tasks(loop):
                node = _inside(variables_of(task))
                if node is not None and package_of(task) != _OURS:
                    found[node].append(StrayTask(task))
            for variables in entered_elsewhere():
                for node in _with_all_above(_inside(variables)):
                    found[node].append(StrayThread(variables))
        finally:
            self._looks.pop(loop).set_result(found)
            ended = time.monotonic()
            self._next = ended + SHARE * (ended - began)


def package_of(task: "asyncio.Task[Any]") -> str:
    """The top package that a task's coroutine is written in; nothing where it does not tell."""
    frame: FrameType | None = getattr(_coroutine_of(task), "cr_frame", None)
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
