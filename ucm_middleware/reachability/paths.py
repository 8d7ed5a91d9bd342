"""The ways to what the fast walk found: backwards through the levels, batch by batch, to what led there.

So a path costs about another walk of one owner, also with loops in C, and names are read for its own objects alone.
"""

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ucm_middleware.reachability.kinds import SIZED, Kinds
from ucm_middleware.reachability.names import Step, path_of, steps_between
from ucm_middleware.reachability.report import Root
from ucm_middleware.reachability.walk import BATCH, LARGE, Marks, batches, held_in_slices


@dataclass(frozen=True, slots=True)
class Path:
    """A way to an object as text, and where the context was opened in which it begins.

    ``place`` is its beginning, in which there is nothing but what the owner has named.
    """

    text: str
    opened: str
    place: str


SECONDS_PER_ITEM = 5e-8
"""What it may take to look for one object among those that a container holds, per object."""


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
        while (parent := self._parents.get(id(value))) is not None and self._has_time_for(parent):
            steps.append(steps_between(parent, value, self._kinds))
            value = parent
        root = self._root_of(value)
        if root is None:
            start = f"{self._marks.owner}..."
            return Path(start, self._marks.roots[0].opened, start)
        first = steps[-1] if steps and root.is_named_by_owner else []
        whole = [step for some in reversed(steps) for step in some]
        return Path(path_of(root.label, whole), root.opened, path_of(root.label, first))

    def _has_time_for(self, parent: Any) -> bool:
        length = self._kinds.of(parent).length
        seconds = 0.0 if length is None else length(parent) * SECONDS_PER_ITEM
        return time.perf_counter() + seconds < self._deadline

    def parent_of(self, value: Any) -> Any:
        """What the shortest path comes from last; None where that is not known, or the path begins."""
        return self._parents.get(id(value))

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
                if self._may_hold(batch, wanted):
                    self._locate(batch, wanted, above)

    def _may_hold(self, values: Sequence[Any], wanted: dict[int, Any]) -> bool:
        """Whether any of these may lead to what is wanted: asked of all at once where that is no large question."""
        kinds = list(map(id, map(type, values)))
        if not self._kinds.special.isdisjoint(kinds):
            return True
        if sum(len(value) for value, kind in zip(values, kinds, strict=True) if kind in SIZED) > LARGE:
            return True
        return not wanted.keys().isdisjoint(map(id, gc.get_referents(*values)))

    def _locate(self, values: Sequence[Any], wanted: dict[int, Any], above: dict[int, Any]) -> None:
        """Find which of these objects lead to what is wanted; that is then no longer wanted."""
        for value in values:
            try:
                for held in held_in_slices(value, self._kinds):
                    for place in wanted.keys() & set(map(id, held)):
                        self._parents[place] = above[id(value)] = value
                        del wanted[place]
                    if not wanted or time.perf_counter() >= self._deadline:
                        return
            except RuntimeError:  # another thread has added to it meanwhile
                continue
