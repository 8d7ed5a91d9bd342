"""A monotonic clock that a test moves by hand."""

# Contexts, their manager and the helpers open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import threading
import weakref
from typing import TypeVar

from ucm_middleware.manager import UserContextManager
from ucm_middleware.sweeper import THREAD_NAME
from ucm_middleware.waiting import loop_is_live

ManagerT = TypeVar("ManagerT", bound=UserContextManager)


class FakeClock:
    """Stands still until it is told to move on: ``UserContextManager(clock=FakeClock())``. Readings are in seconds.

    For a manager's own sweeping thread it never moves: what expires, and when, is up to the test. ``attach`` a manager
    to have its expired contexts closed by ``advance``; without that they are closed when somebody asks for them.
    """

    __slots__ = ("_managers", "_now", "_start")

    def __init__(self) -> None:
        self._start = self._now = 1000.0
        self._managers: weakref.WeakSet[UserContextManager] = weakref.WeakSet()

    def __call__(self) -> float:
        return self._start if threading.current_thread().name == THREAD_NAME else self._now

    def __repr__(self) -> str:
        return f"<FakeClock at {self._now:g} s>"

    def attach(self, manager: ManagerT) -> ManagerT:
        """Sweep this manager from now on whenever the clock is advanced. Returns the manager.

        Raises ValueError for a manager that was not made with ``clock=`` this clock: its deadlines are on another.
        """
        if manager._clock is not self:
            raise ValueError("the manager runs on another clock; make it with UserContextManager(clock=this_clock)")
        self._managers.add(manager)
        return manager

    def advance(self, seconds: float) -> None:
        """Let so much time pass, and close what then has expired.

        A context without an event loop is closed, and its resources are released, before this returns; one that has an
        event loop closes there, on the loop's next turn, and a handler that runs in it is cancelled. Raises ValueError
        for a step back, which no monotonic clock makes.
        """
        if seconds < 0:
            raise ValueError(f"a monotonic clock never goes back, not even by {-seconds:g} seconds")
        self._now += seconds
        for manager in tuple(self._managers):
            _sweep(manager)


def _sweep(manager: UserContextManager) -> None:
    # The manager's own sweep leaves slow releases to threads of their own. Here it is the test that waits for them.
    for _, context in manager._registry.live():
        loop = context.lifetime.loop
        if context.lifetime.is_expired and (loop is None or not loop_is_live(loop)):
            context.close("expired")
    # From another thread, as in the application: a handler is then cut off even if it is the one that moved the clock.
    sweep = threading.Thread(target=manager.sweep, name="sweep of the fake clock")
    sweep.start()
    sweep.join()
