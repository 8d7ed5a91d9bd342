"""The fast walk: marks what each owner reaches, level by level, with loops in C over many objects at once.

No line of Python runs for an ordinary object. What is found is kept by its levels, from which ``paths`` finds the ways.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, filterfalse, islice, repeat
from operator import not_
from typing import Any, Final

from ucm_middleware.handles import ownership_of
from ucm_middleware.reachability.kinds import SIZED, Kind, Kinds
from ucm_middleware.reachability.report import Root

BATCH: Final = 512
"""Objects that are read at once."""

CHUNK: Final = 4096
"""References that are sorted at once; other threads get the interpreter in between."""

LARGE: Final = 16_384
"""Items that containers may hold that are read in one go; larger ones are read in slices."""

MOST_FINDINGS: Final = 1000
"""With so many the walk ends: each is named by two paths, which are all kept."""

MOST_OWNERS: Final = 100
"""Of one object that very many owners reach, how many are named besides the first."""

ENDS: Final = -1
"""In the place of an owner: the process's own, where the walk ends."""


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

    ``user_id`` is the user that all of them are parts of. At the objects of ``ends`` the walk ends, as at shared types.
    """

    def __init__(self, kinds: Kinds, budget: Budget, user_id: str | None = None, ends: Iterable[Any] = ()) -> None:
        self.kinds = kinds
        self.budget = budget
        self.shares: list[Share] = []
        self.marks: list[Marks] = []
        self.unseen: Counter[int] = Counter()
        self.examples: dict[int, tuple[int, Any]] = {}
        self.objects = 0
        self._user_id = user_id
        # Whatever there is the id of is held, or another object could get that id.
        self._kept: list[Any] = list(ends)
        self._first: dict[int, int] = dict.fromkeys(map(id, self._kept), ENDS)  # what is reached, and by whom first
        self._passed: set[int] = set()  # of that, what is an earlier owner's and this walk has met already
        self._named: Counter[int] = Counter()  # how often an object is named

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
        if not marks.is_complete:
            return found
        for batch in batches(level):
            for chunk in self._read(marks, batch):
                if self.budget.is_spent:
                    marks.is_complete = False
                    return found
                found += self._new(marks, place, chunk)
        return found

    def _read(self, marks: Marks, batch: Sequence[Any]) -> Iterator[Sequence[Any]]:
        kinds = list(map(id, map(type, batch)))
        if sum(map(len, compress(batch, map(SIZED.__contains__, kinds)))) > LARGE:
            for value in batch:
                yield from self._read_one(marks, value)
        elif self.kinds.special.isdisjoint(kinds):
            yield from chunks(gc.get_referents(*batch))
        else:
            flags = list(map(self.kinds.special.__contains__, kinds))
            yield from chunks(gc.get_referents(*compress(batch, map(not_, flags))))
            for value in compress(batch, flags):
                yield from self._read_one(marks, value)

    def _read_one(self, marks: Marks, value: Any) -> Iterator[Sequence[Any]]:
        kind = self.kinds.of(value)
        try:
            for held in held_in_slices(value, self.kinds):
                if kind.native and (kind.hides or all(item is kind.made_for for item in held)):
                    self.unseen[id(kind.made_for)] += 1
                    self.examples.setdefault(id(kind.made_for), (len(self.marks) - 1, value))
                yield held
        except RuntimeError:  # another thread has added to it meanwhile
            marks.is_complete = False

    def _new(self, marks: Marks, place: int, values: Sequence[Any], bare: Iterable[Any] = ()) -> list[Any]:
        """Which of these objects are to be walked on from: neither known of this owner, nor of an earlier one's."""
        self.objects += len(values)
        self.budget.left -= len(values)
        places = list(map(id, map(type, values)))
        types = set(places)
        kinds = self.kinds
        if not kinds.known.issuperset(types):
            kinds.learn(values)
        fresh = list(compress(values, map(kinds.walked.__contains__, places)))
        fresh += bare
        by_place = dict(zip(map(id, fresh), fresh))  # noqa: B905 - of one length
        first = self._first
        places = list(filterfalse(first.__contains__, by_place))
        if len(places) == len(by_place):
            found = list(by_place.values())
        else:
            known = filter(first.__contains__, by_place)
            found = [*map(by_place.__getitem__, places), *self._older(marks, place, known, by_place)]
        first.update(zip(places, repeat(place)))
        if kinds.special.isdisjoint(types):
            return found
        return [value for value in found if self._goes_on(marks, place, value)]

    def _older(self, marks: Marks, place: int, known: Iterable[int], by_place: dict[int, Any]) -> list[Any]:
        """Of what was reached before, by an earlier owner: report what is mutable, and return what is not."""
        places = list(known)
        first, passed = self._first, self._passed
        if {place, ENDS}.issuperset(map(first.__getitem__, places)):
            return []
        found: list[Any] = []
        for one in places:
            whose, value = first[one], by_place[one]
            if whose in (place, ENDS) or one in passed:
                continue
            passed.add(one)
            kind = self.kinds.of(value)
            if kind.user_of is None and (kind.mutable or type(value) is object):
                self._meet(marks, Share(value, whose, place))
            else:
                found.append(value)
        return found

    def _goes_on(self, marks: Marks, place: int, value: Any) -> bool:
        kind = self.kinds.of(value)
        user_id = self._user_id or marks.owner
        if kind.owned:
            goes_on = ownership_of(value).owner.user_id != user_id
        elif kind.user_of is None:
            return True
        else:
            goes_on = False
            if (whose := user_of(kind, value)) not in (user_id, None):
                self._meet(marks, Share(value, None, place, whose or ""))
        if not goes_on:
            self._kept.append(value)
        return goes_on

    def _meet(self, marks: Marks, share: Share) -> None:
        self._named[id(share.value)] += 1
        if self._named[id(share.value)] > MOST_OWNERS:
            return
        if len(self.shares) < MOST_FINDINGS:
            marks.met.append((len(marks.levels), share.value))
            self.shares.append(share)
        else:
            marks.is_complete = False
            self.budget.left = 0


def user_of(kind: Kind, context: Any) -> str | None:
    """Whose a context is; None for one that another thread is just making."""
    try:
        return kind.user_of(context) if kind.user_of is not None else None
    except AttributeError:
        return None


def held_in_slices(value: Any, kinds: Kinds) -> Iterator[Sequence[Any]]:
    """What leads on from one object, in parts when there is very much. Raises RuntimeError when it grows meanwhile."""
    kind = kinds.of(value)
    if kind.length is None or kind.length(value) <= LARGE:
        yield from chunks(children_of(value, kinds))
        return
    rest = [] if kind.attributes is None else [kind.attributes(value)]
    for _, get in kind.slots:
        try:
            rest.append(get(value))
        except AttributeError:  # a slot without a value
            continue
    yield rest
    for iterate in kind.iterators:
        iterator = iter(iterate(value))
        while some := list(islice(iterator, CHUNK)):
            yield some


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
