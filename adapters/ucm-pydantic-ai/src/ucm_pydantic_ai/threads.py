"""Where synchronous tools run: in threads that are known to be theirs, so that what outlives its run is listed."""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeVar

import pydantic_ai._utils
from pydantic_ai import Agent

from ucm_middleware import ToolCall

P = ParamSpec("P")
T = TypeVar("T")

MOST_THREADS: Final = 256

# The executor that the application chose, by its own capability or ``Agent.using_thread_executor()``: to be kept, and
# there is no public way to ask for it. Where the framework has it no longer, tools run in threads of ours.
_chosen: "ContextVar[Executor | None] | None" = getattr(pydantic_ai._utils, "_thread_executor", None)


class ToolThreads(Executor):
    """Threads that are started as they are needed, ``most`` at once, and anew in a forked process."""

    def __init__(self, most: int = MOST_THREADS) -> None:
        self._most = most
        self._pid = 0
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._pool is None or self._pid != os.getpid():
            self._pool = ThreadPoolExecutor(self._most, "ucm-tool")
            self._pid = os.getpid()
        return self._pool.submit(fn, *args, **kwargs)


class _Watched(Executor):
    """Another executor, for what one call of a tool does in it."""

    def __init__(self, call: ToolCall, threads: Executor) -> None:
        self.threads = threads
        self._call = call

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self.threads.submit(self._call.in_thread(fn), *args, **kwargs)


def watching(call: ToolCall, threads: Executor) -> AbstractContextManager[Any]:
    """In the block, each thread that Pydantic AI calls a function in is known to be this call's."""
    chosen = None if _chosen is None else _chosen.get()
    if chosen is not None:
        threads = chosen.threads if isinstance(chosen, _Watched) else chosen
    return Agent.using_thread_executor(_Watched(call, threads))
