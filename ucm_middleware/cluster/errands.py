"""What runs on the cluster's thread for others: tasks there, what is asked from other threads, and second attempts."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from typing import Any, Final, TypeVar

from ucm_middleware.cluster.worker import Worker
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError
from ucm_middleware.waiting import wake

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 5.0
"""Seconds between attempts, which grow by half each time, and have a fifth of chance in them."""


class Errands:
    """Tasks on the thread's loop, which are kept while they run."""

    __slots__ = ("_tasks", "_worker")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, errand: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin one; on the thread's loop. What it raises is a fault of ours, and logged."""
        task = asyncio.Task(errand(), loop=asyncio.get_running_loop(), name="ucm-middleware cluster", context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("what ran on the cluster's thread failed", exc_info=error)

    def ask(self, question: Callable[[], Awaitable[T]]) -> "Future[T]":
        """Have something asked on the thread's loop, from any thread. Cancelled before it has begun, it is not asked;
        after that it goes on. The future raises ClusterUnavailableError when the thread is gone.
        """
        future: Future[T] = Future()

        async def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = await question()
            except asyncio.CancelledError:  # the thread ends
                future.set_exception(ClusterUnavailableError("down", is_unknown=True))
                raise
            except Exception as error:  # noqa: BLE001 - whoever waits for it raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self._worker.call(self.start, answer):
            future.set_exception(ClusterUnavailableError("down"))
        return future

    def wait(self, future: "Future[T]") -> T:
        """Wait for an answer, in a thread, for as long as the store has for three. Raises ClusterUnavailableError; and
        ConfigurationError on the cluster's own, which would wait for itself.
        """
        if self._worker.is_here:
            raise ConfigurationError("the cluster's own thread cannot wait for the store; ask it in another one")
        try:
            return future.result(3 * self._worker.policy.timeout)
        except TimeoutError:
            raise ClusterUnavailableError("timeout", is_unknown=not future.cancel()) from None


async def apart(work: Callable[[], object]) -> None:
    """Have something done in a thread of its own, which may wait and may last, and wait for its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def run() -> None:
        try:
            work()
        except Exception:
            logger.exception("what the cluster's thread had done for it failed")
        finally:
            with suppress(RuntimeError):  # the cluster's loop is closed
                loop.call_soon_threadsafe(wake, done, context=Context())

    threading.Thread(target=run, name="ucm-middleware notice", daemon=True).start()
    await done


class Again:
    """Calls something until it has nothing left to do, at growing waits. On the thread's loop.

    ``attempt`` is called there, and calls ``plan`` when it must be called again, or ``reset`` when all is well.
    """

    __slots__ = ("_attempt", "_loop", "_timer", "_wait")

    def __init__(self, attempt: Callable[[], object]) -> None:
        self._attempt = attempt
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wait = FIRST_WAIT

    def plan(self) -> None:
        """Call it in a while, unless that is planned already."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:  # the thread may be another one by now
            wait = self._wait * random.uniform(0.8, 1.2)
            self._wait = min(self._wait * 1.5, LONGEST_WAIT)
            self._loop = loop
            self._timer = loop.call_later(wait, self._now, context=Context())

    def reset(self) -> None:
        """All is well: the next wait is a short one."""
        self._wait = FIRST_WAIT

    def now(self) -> None:
        """Call it at once."""
        if self._timer is not None:
            self._timer.cancel()
        self._now()

    def _now(self) -> None:
        self._timer = None
        self._attempt()
