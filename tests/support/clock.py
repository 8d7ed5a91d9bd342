"""A clock for tests of deadlines."""

import threading


class Clock:
    """Stands still until it is told to move on, and then moves for the thread that made it alone.

    A manager's own sweeper therefore never sees a deadline come: what expires, and when, is up to the test.
    """

    def __init__(self) -> None:
        self._start = self._now = 1000.0
        self._thread = threading.get_ident()

    def __call__(self) -> float:
        return self._now if threading.get_ident() == self._thread else self._start

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        self._now += seconds
