"""The fast walk: marks what each owner reaches, level by level, with loops in C over many objects at once.

No line of Python runs for an ordinary object. What is found is kept by its levels, from which ``paths`` finds the ways.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, filterfalse, repeat
from operator import not_
from typing import Any, Final

from ucm_middleware.handles import ownership_of
from ucm_middleware.reachability.kinds import SIZED, Kinds, type_of
from ucm_middleware.reachability.report import Root

BATCH: Final = 512
"""Objects that are read at once."""

CHUNK: Final = 4096
"""References that are sorted at once; other threads get the interpreter in between."""


@dataclass(slots=True, eq=False)
class Budget:
    """What the walk may take. ``left`` are objects, ``deadline`` is of ``time.perf_counter``."""

    deadline: float
    left: float

    @property
    def is_spent(self) -> bool:
        """Whether nothing may be looked at any more."""
        return self.left <= 0 or time.perf_counter() >= self.deadline


@dataclass(slots=True, eq=False)
class Marks:
    """What one owner reaches, by the number of steps; only what an earlier owner cannot write to.

    ``met`` is what ended the walk, with the number of steps that lead there.
    """

    owner: str
    roots: list[Root]
    levels: list[list[Any]] = field(default_factory=list[list[Any]])
    met: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])
    is_complete: bool = True


@dataclass(slots=True, eq=False)
class Share:
    """An object that two owners reach. ``first`` and ``second`` are their places among the marks.

    ``first`` is None where the object is another user's context itself; ``user_id`` names that user.
    """

    value: Any
    first: int | None
    second: int
    user_id: str = ""


class Walk:
    """The walk through the data of several owners, one after the other.

    ``user_id`` is the user that all of them are parts of.
    """

    def __init__(self, kinds: Kinds, budget: Budget, user_id: str | None = None) -> None:
        self.kinds = kinds
        self.budget = budget
        self.shares: list[Share] = []
        self.marks: list[Marks] = []
        self.unseen: Counter[int] = Counter()
        self.examples: dict[int, tuple[int, Any]] = {}
        self.objects = 0
        self._user_id = user_id
        self._first: dict[int, int] = {}  # what is reached, and by whom first
        self._passed: set[int] = set()  # of that, what is an earlier owner's and this walk has met already

    def through(self, owner: str, roots: list[Root]) -> None:
        """Mark what an owner reaches, as far as the budget goes."""
        place = len(self.marks)
        marks = Marks(owner, roots)
        self.marks.append(marks)
        bare = [root.value for root in roots if root.stands and type(root.value) is object]
        level = self._new(marks, place, [root.value for root in roots], bare)
        while level:
            marks.levels.append(level)
            level = self._next(marks, place, level)
        self._passed.clear()

    def _next(self, marks: Marks, place: int, level: list[Any]) -> list[Any]:
        found: list[Any] = []
        for batch in batches(level):
            for chunk in self._read(marks, batch):
                if self.budget.is_spent:
                    marks.is_complete = False
                    return []
                found += self._new(marks, place, chunk)
        return found

    def _read(self, marks: Marks, batch: Sequence[Any]) -> Iterator[Sequence[Any]]:
        kinds = list(map(id, map(type, batch)))
        # A single container may be larger than all that is left: then it is not opened at all.
        if sum(map(len, compress(batch, map(SIZED.__contains__, kinds)))) > self.budget.left:
            batch = [value for value in batch if id(type_of(value)) not in SIZED or len(value) <= self.budget.left]
            marks.is_complete = False
            kinds = list(map(id, map(type, batch)))
        if self.kinds.special.isdisjoint(kinds):
            yield from chunks(gc.get_referents(*batch))
            return
        flags = list(map(self.kinds.special.__contains__, kinds))
        yield from chunks(gc.get_referents(*compress(batch, map(not_, flags))))
        for value in compress(batch, flags):
            yield from chunks(self._read_special(marks, value))

    def _read_special(self, marks: Marks, value: Any) -> list[Any]:
        kind = self.kinds.of(value)
        if kind.length is not None and kind.length(value) > self.budget.left:
            marks.is_complete = False
            return []
        held = children_of(value, self.kinds)
        if kind.native and (kind.hides or all(item is kind.made_for for item in held)):
            self.unseen[id(kind.made_for)] += 1
            self.examples.setdefault(id(kind.made_for), (len(self.marks) - 1, value))
        return held

    def _new(self, marks: Marks, place: int, values: Sequence[Any], bare: Iterable[Any] = ()) -> list[Any]:
        """Which of these objects are to be walked on from: neither known of this owner, nor of an earlier one's."""
        self.objects += len(values)
        self.budget.left -= len(values)
        types = list(map(id, map(type, values)))
        kinds = self.kinds
        if not kinds.known.issuperset(types):
            kinds.learn(values)
        fresh = list(compress(values, map(kinds.walked.__contains__, types)))
        fresh += bare
        by_place = dict(zip(map(id, fresh), fresh, strict=True))
        first = self._first
        places = list(filterfalse(first.__contains__, by_place))
        if len(places) == len(by_place):
            found = list(by_place.values())
        else:
            older = self._older(marks, place, by_place)
            found = [*map(by_place.__getitem__, places), *older]
        first.update(zip(places, repeat(place)))
        if kinds.special.isdisjoint(map(id, map(type, found))):
            return found
        return [value for value in found if self._goes_on(marks, place, value)]

    def _older(self, marks: Marks, place: int, by_place: dict[int, Any]) -> list[Any]:
        """Of what was reached before, by an earlier owner: report what is mutable, and return what is not."""
        found: list[Any] = []
        for known in filter(self._first.__contains__, by_place):
            whose = self._first[known]
            if whose == place or known in self._passed:
                continue
            self._passed.add(known)
            value = by_place[known]
            if self.kinds.of(value).mutable or type(value) is object:
                self._meet(marks, value, Share(value, whose, place))
            else:
                found.append(value)
        return found

    def _goes_on(self, marks: Marks, place: int, value: Any) -> bool:
        kind = self.kinds.of(value)
        user_id = self._user_id or marks.owner
        if kind.owned:
            return ownership_of(value).owner.user_id != user_id
        if kind.user_of is None:
            return True
        whose = kind.user_of(value)
        if whose != user_id:
            self._meet(marks, value, Share(value, None, place, whose))
        return False

    def _meet(self, marks: Marks, value: Any, share: Share) -> None:
        marks.met.append((len(marks.levels), value))
        self.shares.append(share)


def children_of(value: Any, kinds: Kinds) -> list[Any]:
    """What leads on from one object."""
    kind = kinds.of(value)
    if kind.owned:
        return ownership_of(value).targets()
    if kind.user_of is not None:
        return []
    return (kind.expand or gc.get_referents)(value)


def batches(values: Sequence[Any], size: int = BATCH) -> Iterator[Sequence[Any]]:
    """The values, so many at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def chunks(values: list[Any]) -> Iterator[Sequence[Any]]:
    """The same for what was read: mostly a single one."""
    return iter((values,)) if len(values) <= CHUNK else batches(values, CHUNK)
