"""Counting what may come in floods: told once a minute, with how many there were."""

import time
from collections.abc import Callable
from typing import Final

EACH: Final = 60.0
"""Seconds between two tellings."""


class Tally:
    """Calls ``tell`` with a number: at the first, and from then on once a minute while there are more.

    For one thread at a time. ``clock`` is monotonic, in seconds.
    """

    __slots__ = ("_clock", "_due", "_tell", "_untold", "total")

    def __init__(self, tell: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._untold = 0
        self._due = float("-inf")
        self.total = 0
        """How many there ever were."""

    def count(self) -> None:
        """There was one more."""
        self.total += 1
        self._untold += 1
        now = self._clock()
        if now >= self._due:
            self._due = now + EACH
            number, self._untold = self._untold, 0
            self._tell(number)
