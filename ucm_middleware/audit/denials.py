"""Floods of denials and refusals: the first ones have a record each, the others are counted into one.

Thread-safe without a lock: under the GIL threads, finalizers and signal handlers come in between calls only, and where
a comment says so nothing is called.
"""

import logging
import time
from collections.abc import Callable
from typing import Final, Literal
from weakref import WeakMethod

from ucm_middleware.expiry import front
from ucm_middleware.forking import renewed_after_fork

logger = logging.getLogger(__name__)

EACH: Final = 10
"""How many of one kind have a record each in a window."""

WINDOW: Final = 60.0
"""Seconds, from the first of a kind."""

KINDS: Final = 1024
"""How many kinds are told apart at a time; those that come when there are so many are counted together."""

OTHERS: Final = "others"

Denial = Literal["denied", "egress", "refused"]
Kind = tuple[str | None, Denial, str]
"""In whose trail, what, and the action or the word that says why."""


class Flood:
    """Those of one kind in one window. ``count`` is how many have no record yet, ``first`` and ``last`` when they came,
    in seconds since the epoch.
    """

    __slots__ = ("count", "ends", "first", "is_over", "kind", "last", "seen")

    def __init__(self, kind: Kind, ends: float) -> None:
        self.kind = kind
        self.ends = ends
        self.seen = 0
        self.count = 0
        self.first = self.last = 0.0
        self.is_over = False


class Denials:
    """Counts, and decides which have a record of their own.

    ``write``, a method of the owner, writes the record of those that were counted: their kind, how many, when the first
    and the last came.
    ``clock`` is monotonic; ``plan`` has ``tell_due`` called at that moment.
    """

    __slots__ = ("__weakref__", "_clock", "_floods", "_plan", "_write")

    def __init__(
        self,
        write: Callable[[Kind, int, float, float], None],
        clock: Callable[[], float],
        plan: Callable[[float], None],
    ) -> None:
        self._write = WeakMethod(write)  # its owner has this
        self._clock = clock
        self._plan = plan
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin with none in a forked child: what was counted is the parent's to tell."""
        self._floods: dict[Kind, Flood] = {}

    def has_record(self, kind: Kind) -> bool:
        """Whether this one, of now, is to have a record of its own; else it has been counted."""
        at = time.time()
        while True:
            flood = self._flood_of(kind)
            # Nothing is called from here on.
            if flood.is_over:
                continue
            flood.seen = seen = flood.seen + 1
            if seen <= EACH:
                break
            is_first = flood.count == 0
            flood.count += 1
            if is_first:
                flood.first = flood.last = at
            elif at > flood.last:  # threads may overtake each other
                flood.last = at
            elif at < flood.first:
                flood.first = at
            break
        if seen == 1:  # its count is told when the window ends, and whose it is is forgotten
            try:
                self._plan(flood.ends)
            except RuntimeError:  # whoever comes in the next window, or reads the trail, finds the count
                logger.warning("denials are counted, and no thread can be started to record them in time")
        return seen <= EACH

    def tell_due(self) -> None:
        """Write down what was counted in windows that are over."""
        now = self._clock()
        for flood in list(self._floods.values()):
            if flood.ends <= now:
                self._end(flood)

    def tell(self, user_id: str | None) -> None:
        """Write down what was counted for one trail."""
        for flood in list(self._floods.values()):
            if flood.kind[0] == user_id:
                self._tell(flood)

    def tell_all(self) -> None:
        """Write down all that was counted."""
        for flood in list(self._floods.values()):
            self._tell(flood)

    def next_wake(self) -> float | None:
        """When the next window ends."""
        return min((flood.ends for flood in list(self._floods.values())), default=None)

    def _flood_of(self, kind: Kind) -> Flood:
        now = self._clock()
        flood = self._floods.get(kind)
        if flood is not None and flood.ends <= now:
            self._end(flood)
            flood = self._floods.get(kind)  # still there when it could not be told
        if flood is not None:
            return flood
        if len(self._floods) >= KINDS and kind[2] is not OTHERS:
            self._forget_due(now)
            if len(self._floods) >= KINDS:
                return self._flood_of((None, kind[1], OTHERS))
        return self._floods.setdefault(kind, Flood(kind, now + WINDOW))

    def _forget_due(self, now: float) -> None:
        """Make room, if there are windows that are over: the oldest is the first."""
        for kind in front(self._floods, 1):
            oldest = self._floods.get(kind)
            if oldest is None or oldest.ends <= now:
                self.tell_due()

    def _end(self, flood: Flood) -> None:
        """Close a window, once what it counted is on record."""
        if not self._tell(flood):
            flood.ends = self._clock() + WINDOW
            return
        floods, kind = self._floods, flood.kind
        # Nothing is called from here on; whoever comes later begins a new window.
        if flood.count == 0:
            flood.is_over = True
            if kind in floods and floods[kind] is flood:
                del floods[kind]

    def _tell(self, flood: Flood) -> bool:
        """Write down what a window counted so far. False when the ledger did not take it: then it is kept."""
        # Nothing is called before the try: what is taken is either written or given back.
        count, first, last = flood.count, flood.first, flood.last
        if count == 0:
            return True
        flood.count = 0
        try:
            write = self._write()
            assert write is not None
            write(flood.kind, count, first, last)
        except BaseException as error:
            if flood.count == 0:
                flood.last = last
            flood.count += count
            flood.first = first
            if not isinstance(error, Exception):
                raise
            logger.exception("%d denials could not be recorded; it is tried again", count)
            return False
        return True
