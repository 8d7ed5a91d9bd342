"""The ways to what the fast walk found: backwards through the levels, halving what may have led there.

So a path costs about another walk of one owner, also with loops in C, and names are read for its own objects alone.
"""

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Any

from ucm_middleware.reachability.kinds import Kinds
from ucm_middleware.reachability.names import Step, path_of, steps_between
from ucm_middleware.reachability.report import Root
from ucm_middleware.reachability.walk import BATCH, Marks, batches, children_of


@dataclass(frozen=True, slots=True)
class Path:
    """A way to an object as text, and where the context was opened in which it begins."""

    text: str
    opened: str


class Paths:
    """The paths of one owner to some of what the owner reaches."""

    def __init__(self, marks: Marks, targets: Iterable[Any], kinds: Kinds, deadline: float) -> None:
        self._marks = marks
        self._kinds = kinds
        self._deadline = deadline
        self._parents: dict[int, Any] = {}
        wanted = {id(value): value for value in targets}
        by_level: dict[int, dict[int, Any]] = {}
        for level, value in marks.met:
            if id(value) in wanted:
                by_level.setdefault(level, {})[id(value)] = wanted.pop(id(value))
        for level, values in enumerate(marks.levels):
            for place in set(wanted).intersection(map(id, values)):
                by_level.setdefault(level, {})[place] = wanted.pop(place)
        self._go_back(by_level)

    def to(self, value: Any) -> Path:
        """A shortest path; what is not known of it, for want of time or since things have changed, is left out."""
        steps: list[list[Step]] = []
        while (parent := self._parents.get(id(value))) is not None:
            steps.append(steps_between(parent, value, self._kinds))
            value = parent
        root = self._root_of(value)
        start = f"{self._marks.owner}..." if root is None else root.label
        opened = self._marks.roots[0].opened if root is None else root.opened
        return Path(path_of(start, [step for some in reversed(steps) for step in some]), opened)

    def _root_of(self, value: Any) -> Root | None:
        for root in self._marks.roots:
            if root.value is value:
                return root
        return None

    def _go_back(self, by_level: dict[int, dict[int, Any]]) -> None:
        for level in range(max(by_level, default=0), 0, -1):
            wanted = by_level.get(level, {})
            above = by_level.setdefault(level - 1, {})
            for batch in batches(self._marks.levels[level - 1], BATCH):
                if not wanted or time.perf_counter() >= self._deadline:
                    break
                self._locate(batch, wanted, above)

    def _locate(self, values: Sequence[Any], wanted: dict[int, Any], above: dict[int, Any]) -> None:
        """Find which of these objects lead to what is wanted; that is then no longer wanted."""
        held = wanted.keys() & set(map(id, self._children(values)))
        if not held:
            return
        if len(values) == 1:
            for place in held:
                self._parents[place] = values[0]
                del wanted[place]
            above[id(values[0])] = values[0]
            return
        half = len(values) // 2
        for part in (values[:half], values[half:]):
            if wanted:
                self._locate(part, wanted, above)

    def _children(self, values: Sequence[Any]) -> list[Any]:
        special = list(map(self._kinds.special.__contains__, map(id, map(type, values))))
        held = gc.get_referents(*compress(values, map(not_, special)))
        for value in compress(values, special):
            held += children_of(value, self._kinds)
        return held
