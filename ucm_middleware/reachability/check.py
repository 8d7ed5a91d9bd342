"""The check as a whole: the walk, then the paths of what it found."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ucm_middleware.isolation import type_name
from ucm_middleware.reachability.kinds import SIZED, Kinds, type_of
from ucm_middleware.reachability.paths import Path, Paths
from ucm_middleware.reachability.report import Finding, IsolationReport, Root, Unseen
from ucm_middleware.reachability.shared import ends_of
from ucm_middleware.reachability.walk import Budget, Share, Walk, children_of

Holder = Callable[[object, float], str | None]
"""What keeps an object alive, as a path from a global, found within so many seconds."""

HOLDING: Final = 0.25
"""How many seconds that takes at most for one object, give or take one pass over the heap."""

WALKING: Final = 0.75
"""Of the time, how much is for the walk; the rest is for the paths of what it found."""


def find_shared(
    roots: Iterable[Root], user_id: str | None = None, *, shared_types: Iterable[type] = ()
) -> list[Finding]:
    """Every place where an owner's data lead into something mutable that an earlier owner reaches too.

    Owners are taken in the order of their first root. A finding names the object, the first owner who reaches it and
    the later one who came upon it. What lies below is not named again, unless that owner also gets there another way.
    No findings means that no two owners share anything mutable.

    An owned handle leads to its target in the data of another user alone: in the owner's, the context that made it has
    the target among its roots. A context of another user is a finding, and is not looked into. With ``user_id``, all
    owners are parts of that user.
    """
    sources = [Source(root.owner, partial(list[Root], (root,))) for root in roots]
    return list(Check(sources, shared_types=shared_types, user_id=user_id).report().findings)


class Source(NamedTuple):
    """A context: whose it is, and what gives its roots, which is called when its turn comes."""

    owner: str
    roots: Callable[[], list[Root]]


class Check:
    """One look at contexts. Budgets are seconds, from ``started`` on, and objects looked at.

    ``applications`` are the ASGI applications that serve: the walk ends there. ``holder`` is asked what keeps a shared
    object alive.
    """

    def __init__(
        self,
        contexts: Sequence[Source],
        *,
        shared_types: Iterable[type] = (),
        applications: Iterable[object] = (),
        max_seconds: float = math.inf,
        max_objects: float = math.inf,
        user_id: str | None = None,
        holder: Holder | None = None,
        started: float | None = None,
    ) -> None:
        self.owners: dict[str, list[Source]] = {}
        for source in contexts:
            self.owners.setdefault(source.owner, []).append(source)
        self._contexts = len(contexts)
        self._started = time.perf_counter() if started is None else started
        self._deadline = self._started + max_seconds
        budget = Budget(self._started + max_seconds * WALKING, max_objects)
        self._holder = holder
        self._walk = Walk(Kinds(shared_types), budget, user_id, ends_of(applications))

    def report(self) -> IsolationReport:
        """Take the look, once."""
        walk = self._walk
        skipped = 0
        for owner, sources in self.owners.items():
            roots: list[Root] = []
            for source in sources:
                if walk.budget.is_spent:
                    break
                roots += source.roots()
            else:
                walk.through(owner, roots)
                if walk.marks[-1].is_complete:
                    continue
            skipped += len(sources)
        paths = self._paths()
        return IsolationReport(
            contexts=self._contexts,
            findings=tuple(self._finding(share, paths) for share in walk.shares if not self._is_part(share, paths)),
            objects=walk.objects,
            seconds=time.perf_counter() - self._started,
            skipped=skipped,
            unseen=tuple(self._unseen(paths)),
        )

    def _paths(self) -> dict[int, Paths]:
        wanted: dict[int, list[Any]] = {}
        for share in self._walk.shares:
            wanted.setdefault(share.second, []).append(share.value)
            if share.first is not None:
                wanted.setdefault(share.first, []).append(share.value)
        for place, value in self._walk.examples.values():
            wanted.setdefault(place, []).append(value)
        return {
            place: Paths(self._walk.marks[place], values, self._walk.kinds, self._deadline)
            for place, values in wanted.items()
        }

    def _is_part(self, share: Share, paths: dict[int, Paths]) -> bool:
        """Whether both get to a container through an object that has it from one of a shared type, which it holds too:
        as rows hold what describes their columns, and a dict of that. An object that anything can be put into is none.
        """
        if share.first is None or id(type_of(share.value)) not in SIZED:
            return False
        return all(
            self._has_from_shared(paths[place].parent_of(share.value), share) for place in (share.first, share.second)
        )

    def _has_from_shared(self, parent: Any, share: Share) -> bool:
        kinds = self._walk.kinds
        if parent is None or id(type_of(parent)) in SIZED or kinds.of(parent).attributes is not None:
            return False
        beside = filter(kinds.is_shared, children_of(parent, kinds))
        return any(part is share.value for one in beside for part in _parts_of(one))

    def _finding(self, share: Share, paths: dict[int, Paths]) -> Finding:
        marks = self._walk.marks
        if share.first is None:
            start = f"{share.user_id}.context"
            first, owner = Path(start, "", start), share.user_id
        else:
            first, owner = paths[share.first].to(share.value), marks[share.first].owner
        second = paths[share.second].to(share.value)
        return Finding(
            first.text,
            second.text,
            type_name(share.value),
            owner,
            marks[share.second].owner,
            first.opened,
            second.opened,
            first.place,
            second.place,
            self._held_by(share.value),
        )

    def _held_by(self, value: object) -> str | None:
        seconds = min(self._deadline - time.perf_counter(), HOLDING)
        return None if self._holder is None or seconds <= 0 else self._holder(value, seconds)

    def _unseen(self, paths: dict[int, Paths]) -> Iterable[Unseen]:
        for kind, count in self._walk.unseen.items():
            place, value = self._walk.examples[kind]
            yield Unseen(type_name(value), count, paths[place].to(value).text)


def _parts_of(value: Any) -> list[Any]:
    """What an object holds by itself, the values of its attributes included."""
    held = gc.get_referents(value)
    return [*held, *gc.get_referents(*(item for item in held if type(item) is dict))]
