"""In which ``contextvars.Context`` a thread runs: no interpreter tells, but what runs jobs in threads keeps it."""

import concurrent.futures.thread
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from types import BuiltinFunctionType, FrameType
from typing import Any, Final

_RUN_THREADS: Final = frozenset({"threading", "concurrent.futures.thread", "anyio._backends._asyncio", "asgiref.sync"})
"""The modules in whose frames the Context is that a thread's job runs in."""

_attributes_of: Final[Callable[[threading.Thread], dict[str, Any]]] = vars(threading.Thread)["__dict__"].__get__


def frames_of_others() -> dict[int, FrameType]:
    """The innermost frame of each thread but this one, by the thread's identifier."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - there is no public way
    del frames[threading.get_ident()]  # which would refer to itself
    return frames


def entered_elsewhere() -> list[Context]:
    """Each Context that other threads run in now."""
    return [variables for top in frames_of_others().values() for variables in entered_below(top)]


def entered_below(top: FrameType) -> list[Context]:
    """Each Context that the thread with this innermost frame runs in."""
    found: list[Context] = []
    shown: list[dict[str, Any]] = []
    is_traced = threading.gettrace() is not None or threading.getprofile() is not None
    frame: FrameType | None = top
    while frame is not None:
        is_traced = is_traced or frame.f_trace is not None
        # Only where variables are a function's own: those of a module that is being imported, or of a class, are not a
        # copy.
        if module_of(frame) in _RUN_THREADS and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            variables = frame.f_locals
            values = list(variables.values())
            if type(variables) is dict:
                shown.append(variables)
            found += [one for value in values if (one := _variables_in(value)) is not None and _is_used(value, one)]
        frame = frame.f_back
    # Before Python 3.13 a frame keeps what it shows of its variables, and so the Context of the thread's last job:
    # emptied, unless a debugger may be asking too, behind which Python writes them back into the frame.
    if not is_traced:
        for variables in shown:
            variables.clear()
    return found


def is_entered(variables: Context) -> bool:
    """Whether something runs in them, in any thread. To enter a Context, and call what is written in C, lets no other
    thread run.
    """
    try:
        variables.run(int)
    except RuntimeError:
        return True
    return False


def module_of(frame: FrameType) -> str:
    """The module that the code of a frame stands in."""
    module = frame.f_globals.get("__name__", "?")
    return module if type(module) is str else "?"


def _variables_in(value: Any) -> Context | None:
    """The Context that a job or a thread runs in. Only where they keep it: to look through all that a frame holds would
    take for ever.
    """
    if type(value) is Context:
        return value
    if type(value) is BuiltinFunctionType:
        return _variables_in(value.__self__) if type(value.__self__) is Context else None
    if type(value) is functools.partial:
        return _variables_in(value.func)
    if type(value) is concurrent.futures.thread._WorkItem:  # pyright: ignore[reportPrivateUsage]
        return _variables_in(value.fn)
    if issubclass(type(value), threading.Thread):
        return _variables_in(_attributes_of(value).get("_target"))
    return None


def _is_used(keeper: object, variables: Context) -> bool:
    """Whether something runs in them, or will. A thread of a pool that is through with a job has its Context until it
    goes on, which may be after the event loop has finished the request; a thread that was made for it lets go of it by
    itself.
    """
    return issubclass(type(keeper), threading.Thread) or is_entered(variables)
