"""The thread of a worker's cluster: an event loop of its own, which no handler can hold up."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Final, TypeVar

from ucm_middleware.errors import ClusterUnavailableError

T = TypeVar("T")

THREAD_NAME: Final = "ucm-middleware cluster"

GATHER: Final = 0.005
"""Seconds that what ends is gathered, to be given back together."""


class ClusterThread:
    """Runs ``run`` until ``end``. It is given an event that is set when there is something to do."""

    def __init__(self, run: Callable[["ClusterThread"], Coroutine[Any, Any, None]]) -> None:
        self._work = run
        self.loop = asyncio.new_event_loop()
        self.woken = asyncio.Event()
        self.is_ending = False
        self.ended: Future[None] = Future()
        self._is_waking = False
        self._is_over = False
        self._closing = threading.RLock()  # a finalizer may ask in the middle of it
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the asking code runs in it."""
        return threading.current_thread() is self._thread

    def call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run something on the thread's loop, in an empty Context: it is no part of whoever asks.

        Raises ClusterUnavailableError once the thread has ended.
        """
        with self._closing:
            if not self._is_over:
                return Context().run(asyncio.run_coroutine_threadsafe, work, self.loop)
        work.close()
        raise ClusterUnavailableError("down")

    def soon(self, run: Callable[..., object], *args: Any) -> bool:
        """Have this called on the thread's loop, in an empty Context. False once that has ended."""
        with self._closing:
            if not self._is_over:
                self.loop.call_soon_threadsafe(run, *args, context=Context())
            return not self._is_over

    def wake(self) -> None:
        """There is something to do, at once."""
        self.soon(self.woken.set)

    def wake_soon(self) -> None:
        """There is something to do, and perhaps more in a moment. Cheap when it was said before."""
        if not self._is_waking:
            self._is_waking = True
            self.soon(self._gather)

    def _gather(self) -> None:
        self.loop.call_later(GATHER, self._wake_gathered)

    def _wake_gathered(self) -> None:
        self._is_waking = False  # first: what comes from now on wakes anew
        self.woken.set()

    def end(self) -> None:
        """Do what is left, and end."""
        self.is_ending = True
        self.wake()

    def _run(self) -> None:
        loop = self.loop
        try:
            loop.run_until_complete(self._work(self))
        finally:
            with self._closing:
                self._is_over = True  # what was asked before this still has its turn: somebody waits for it
            try:
                loop.run_until_complete(_end_others())
            finally:
                loop.close()
                self.ended.set_result(None)


async def _end_others() -> None:
    """Cancel what is under way on the running loop, and wait until it has ended."""
    await asyncio.sleep(0)  # what was asked last takes its first step: before that, it could not even fail
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
