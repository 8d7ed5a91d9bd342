"""A thread that sleeps until the next deadline, and then has whatever is due closed."""

import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

NEVER: Final = float("inf")


class Sweeper:
    """Starts its thread at the first deadline, and lets go of its owner: the thread ends when that is gone.

    ``sweep`` is a bound method that closes what is due. ``next_wake`` says when to look again, on ``clock``.
    """

    __slots__ = ("__weakref__", "_clock", "_condition", "_next_wake", "_planned", "_sweep", "_thread")

    def __init__(
        self, sweep: Callable[[], object], next_wake: Callable[[], float | None], clock: Callable[[], float]
    ) -> None:
        self._sweep = weakref.WeakMethod(sweep)
        self._next_wake = next_wake
        self._clock = clock
        self._condition = threading.Condition()
        self._planned = NEVER
        self._thread: threading.Thread | None = None

    def plan(self, wake: float) -> None:
        """See to it that the thread is awake at that moment."""
        if wake >= self._planned:
            return
        with self._condition:
            self._planned = min(wake, self._planned)
            if self._thread is None:
                self._start()
            self._condition.notify()

    def stop(self) -> None:
        """Let the thread go, now that its owner has."""
        with self._condition:
            self._condition.notify()

    def _start(self) -> None:
        reference = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (method := reference()) and method())
        self._thread = threading.Thread(target=self._run, name="ucm-middleware sweeper", daemon=True)
        self._thread.start()

    def _after_fork(self) -> None:
        # Threads do not survive a fork: the child starts its own at its next deadline.
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
                wake = self._next_wake()
                self._planned = NEVER if wake is None else wake
                if self._sweep() is not None:
                    self._condition.wait(None if wake is None else max(0.0, wake - self._clock()))
