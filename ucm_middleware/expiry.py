"""Deadlines, ordered without sorting: what is due, and when to look next.

An entry waits in a queue with all others that wait about as long, so each queue is in order by itself: a dict, new
entries at the end, the next one due at the front. Waits are rounded down to within 1/64, which bounds the number of
queues; an entry that comes up early for that reason waits once more for the small rest. Adding and discarding cost the
same whatever the number of entries, and an entry that is discarded leaves nothing behind.
"""

import math
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from ucm_middleware.errors import InvalidContextError

K = TypeVar("K")
T = TypeVar("T")

SHORTEST_WAIT: Final = 0.001
"""Seconds. The resolution of the sweep; whoever looks at a deadline in between sees it exactly."""

LONGEST_TTL: Final = 365 * 24 * 3600.0
"""Seconds. A context that should live longer than a year is a mistake in the unit."""


def checked_ttl(ttl: object) -> float | None:
    """A life in seconds as a float; None for no end. Raises InvalidContextError for what is no sensible one."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise InvalidContextError("ttl_seconds", f"is a {type(ttl).__name__}, not a number", "give seconds as a number")
    try:
        seconds = float(ttl)
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds <= LONGEST_TTL:  # NaN is in no range
        rule = f"is {seconds:g}, not above 0 and at most a year ({LONGEST_TTL:g})"
        raise InvalidContextError("ttl_seconds", rule, "give seconds in that range")
    return seconds


class Timed:
    """Something with a deadline, in seconds on the monotonic clock. ``wake`` and ``wait`` belong to the queue.

    Whoever makes one fills in the ``deadline``, and 0 as its ``wait``.
    """

    __slots__ = ("deadline", "wait", "wake")

    deadline: float | None
    wait: float
    wake: float


class Deadlines(Generic[T]):
    """What has a deadline, and whose it is, in queues by how long they wait. Not thread-safe: its owner has a lock."""

    __slots__ = ("queues",)

    def __init__(self) -> None:
        self.queues: dict[float, dict[Timed, T]] = {}

    def add(self, entry: Timed, of: T, now: float, seconds: float) -> None:
        """Take an entry in, or move it, to be looked at in so many seconds at the latest, but not at once."""
        self.discard(entry)
        self.queue_for(entry, now, seconds)[entry] = of

    def queue_for(self, entry: Timed, now: float, seconds: float) -> dict[Timed, T]:
        """The queue that an entry must be put into, which has been told when it is to be looked at."""
        entry.wait = wait = _round_down(seconds)
        entry.wake = now + wait
        return self.queues.setdefault(wait, {})

    def discard(self, entry: Timed) -> None:
        """Take an entry out, if it is in."""
        queue = self.queues.get(entry.wait)
        if queue is not None:
            queue.pop(entry, None)

    def pop_due(self, now: float, most: int) -> list[T]:
        """Take out what is due, so many at most: the owner's lock is held meanwhile."""
        due: list[T] = []
        for queue in list(self.queues.values()):
            while up := [entry for entry in front(queue, most - len(due)) if entry.wake <= now]:
                for entry in up:
                    of = queue.pop(entry, None)
                    left = 0.0 if entry.deadline is None else entry.deadline - now
                    if of is None:
                        continue  # a finalizer has just taken it out
                    if left <= 0:
                        due.append(of)
                    else:
                        self.add(entry, of, now, left)
        return due

    def next_wake(self) -> float | None:
        """When to look next; None when there is nothing to wait for."""
        wakes = [entry.wake for queue in list(self.queues.values()) for entry in front(queue, 1)]
        return min(wakes, default=None)


def front(queue: dict[K, Any], most: int) -> list[K]:
    """The first so many of a queue, in one walk: each walk begins with the gaps that those before have left."""
    while True:
        with suppress(RuntimeError):  # a finalizer took an entry out, or put one in, before the walk
            return list(islice(queue, most))


def _round_down(wait: float) -> float:
    if wait <= SHORTEST_WAIT:
        return SHORTEST_WAIT
    mantissa, exponent = math.frexp(wait)
    return math.ldexp(mantissa * 128 // 1, exponent - 7)
