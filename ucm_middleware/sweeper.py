"""A thread that sleeps until the next deadline, and then has whatever is due closed."""

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Final

from ucm_middleware.forking import renewed_after_fork

logger = logging.getLogger(__name__)

NEVER: Final = float("inf")
THREAD_NAME: Final = "ucm-middleware sweeper"
LONGEST_SLEEP: Final = 3600.0
"""Seconds. Platforms bound how long a thread may wait; a look once an hour costs nothing."""


class Sweeper:
    """Starts its thread at the first deadline, and lets go of its owner: the thread ends when that is gone.

    ``sweep`` and ``next_wake`` are bound methods of the owner: close what is due; say when to look again, on ``clock``.
    """

    __slots__ = ("__weakref__", "_clock", "_condition", "_next_wake", "_planned", "_sweep", "_thread")

    def __init__(
        self, sweep: Callable[[], object], next_wake: Callable[[], float | None], clock: Callable[[], float]
    ) -> None:
        self._sweep = weakref.WeakMethod(sweep)
        self._next_wake = weakref.WeakMethod(next_wake)
        self._clock = clock
        self._condition = threading.Condition()
        self._planned = NEVER
        self._thread: threading.Thread | None = None
        renewed_after_fork(self)

    def plan(self, wake: float) -> None:
        """See to it that the thread is awake at that moment."""
        if wake >= self._planned:
            return
        with self._condition:
            if self._thread is None:
                self._start()  # first: when no thread can be started, nothing is planned, and the next one tries again
            self._planned = min(wake, self._planned)
            self._condition.notify()

    def stop(self) -> None:
        """Let the thread go, now that its owner has."""
        with self._condition:
            self._condition.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        thread.start()
        self._thread = thread

    def after_fork(self) -> None:
        """Threads do not survive a fork: the child starts its own at its next deadline."""
        self._condition = threading.Condition()
        self._planned = NEVER
        self._thread = None

    def _run(self) -> None:
        while (sweep := self._sweep()) is not None:
            try:
                sweep()
            except Exception:
                # A fault in closing one context must not end the expiry of all the others.
                logger.exception("the sweep of expired contexts failed; it goes on at the next deadline")
            del sweep
            with self._condition:
                # Before asking: a deadline that comes from now on must find nothing planned, and notify.
                self._planned = NEVER
                if (next_wake := self._next_wake()) is None:
                    return
                wake = next_wake()
                del next_wake
                if wake is not None:
                    self._planned = min(wake, self._planned)
                left = self._planned - self._clock()
                self._condition.wait(None if left == NEVER else min(max(0.0, left), LONGEST_SLEEP))
