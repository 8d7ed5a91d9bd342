"""What runs in a context: the tasks, timers and threads that began in it and go on.

Each of them has a copy of the Context in which it was started, and so the ambient variable that says whose it is. They
are found where the interpreter keeps them; what is found nowhere else, ``referrers`` looks for.
"""

import asyncio
import functools
import gc
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextvars import Context
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from ucm_middleware.census.holder import Holder, place, running
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient
from ucm_middleware.isolation import type_name
from ucm_middleware.strays import coroutine_of, variables_of
from ucm_middleware.threads import entered_below, frames_of_others, module_of
from ucm_middleware.waiting import running_loop

_OF_OTHERS: Final = frozenset(
    {
        *("asyncio", "anyio", "uvloop", "concurrent", "threading", "trio"),
        *("uvicorn", "hypercorn", "granian", "websockets", "wsproto"),
    }
)
"""Packages whose timers are part of something else: that of a sleep is its task's, others are the server's."""

_OURS: Final = "ucm_middleware."
"""Our own tasks end by themselves: a drain, a release that was left behind and is recorded as such."""

_BROKEN_OFF: Final = "async_generator_athrow"
"""What the loop closes a generator with that nobody iterates any more."""

_AGENTS: Final = "ucm_middleware.agents."
"""What runs of agents leave behind is listed, and told, as their stragglers."""

Holders = dict[UserExecutionContext, list[Holder]]


def survey(contexts: Iterable[UserExecutionContext]) -> Holders:
    """What runs in which of these contexts, seen from the event loop, if any, that runs here."""
    wanted = set(contexts)
    found: Holders = defaultdict(list)
    loop = running_loop()
    seen = [*_threads()]
    if loop is not None:
        seen += [*_tasks(loop), *_timers(loop)]
    for context, holder in seen:
        if context in wanted:
            found[context].append(holder)
    return found


def cancelled_timers() -> list[object]:
    """The timers of the event loop that runs here, if any, that will call nothing any more. The loop keeps them, and
    each its Context, until their time has come: so does every ``asyncio.timeout``.
    """
    loop = running_loop()
    return [] if loop is None else [handle for handle in _handles(loop) if handle.cancelled()]


def whose(variables: Context | None) -> UserExecutionContext | None:
    """The context that code in these variables runs in."""
    inside = None if variables is None else variables.get(ambient)
    return None if inside is None else inside.context


def _tasks(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[UserExecutionContext, Holder]]:
    here = asyncio.current_task(loop)
    for task in asyncio.all_tasks(loop):
        if task is here or (context := whose(variables_of(task))) is None:
            continue
        name, where = running(coroutine_of(task))
        if name.startswith(_OURS) or name == _BROKEN_OFF:
            continue
        yield context, Holder("task", name, where, task.cancel)


def _timers(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[UserExecutionContext, Holder]]:
    for handle in _handles(loop):
        if handle.cancelled() or (context := whose(variables_of(handle))) is None:
            continue
        name, where = _callback(handle)
        if name.partition(".")[0].lstrip("_") not in _OF_OTHERS:
            yield context, Holder("timer", name, where, handle.cancel)


def _handles(loop: asyncio.AbstractEventLoop) -> list[Any]:
    """What waits in a loop: asyncio keeps it in a heap, uvloop in a set that only the garbage collector sees."""
    scheduled = getattr(loop, "_scheduled", None)
    if scheduled is not None:
        return [*scheduled]
    kept = [one for one in gc.get_referents(loop) if type(one) in (set, list)]
    return [one for each in kept for one in list(each) if type(one).__name__ == "TimerHandle"]


def _callback(handle: object) -> tuple[str, str]:
    """The name of what a handle will call, and where that is written."""
    function: Any = getattr(handle, "_callback", None)
    if function is None:  # uvloop's
        function = next((one for one in gc.get_referents(handle) if callable(one)), None)
    while type(function) is functools.partial:
        function = function.func
    if type(function) is MethodType and type(function.__func__) is FunctionType:
        function = function.__func__
    if type(function) is FunctionType:
        code = function.__code__
        return f"{function.__module__}.{function.__qualname__}", f"{code.co_filename}:{code.co_firstlineno}"
    if type(function) in (BuiltinFunctionType, MethodType):  # of a type that is written in C or Cython
        owner: object = function.__self__
        module = type(owner).__module__ if type(owner) is not ModuleType else function.__module__
        return f"{module}.{function.__qualname__}", ""
    return type_name(function), ""


def _threads() -> Iterator[tuple[UserExecutionContext, Holder]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in frames_of_others().items():
        if _is_of_an_agent(top):
            continue
        for context in _contexts_of(top):
            frame = _of_the_application(top)
            name = f"{names.get(ident, ident)!r} in {module_of(frame)}.{frame.f_code.co_qualname}"
            yield context, Holder("thread", name, place(frame))


def _is_of_an_agent(top: FrameType) -> bool:
    frame: FrameType | None = top
    while frame is not None:
        if module_of(frame).startswith(_AGENTS):
            return True
        frame = frame.f_back
    return False


def _contexts_of(top: FrameType) -> set[UserExecutionContext]:
    return {context for variables in entered_below(top) if (context := whose(variables)) is not None}


def _of_the_application(top: FrameType) -> FrameType:
    """The innermost frame that is none of the standard library's."""
    frame: FrameType | None = top
    while frame is not None:
        if module_of(frame).partition(".")[0] not in sys.stdlib_module_names:
            return frame
        frame = frame.f_back
    return top
