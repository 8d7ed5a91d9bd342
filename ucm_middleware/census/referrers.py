"""From an object back to what refers to it, up to a module's global: ``shop.CACHE['profile']``.

It runs none of the application's code. The interpreter goes through all objects once for each step back: some
milliseconds for each million of them, in which nothing else runs.
"""

import functools
import gc
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import (
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    ModuleType,
)
from typing import Any, Final

from ucm_middleware.isolation import type_name
from ucm_middleware.reachability.kinds import Kinds
from ucm_middleware.reachability.names import KEY, NAME, TEXT, Step, path_of, steps_between

STEPS: Final = 14
"""How many steps back are taken at most."""

WIDTH: Final = 1000
"""How many objects a step goes back from at most."""

SHOWN_KEY: Final = 16
"""How long a key may be that is shown in a path."""

_module_dict: Final[Any] = vars(ModuleType)["__dict__"].__get__
_module_name: Final[Any] = vars(type)["__module__"].__get__
_qualname: Final[Any] = vars(type)["__qualname__"].__get__
_ATTRIBUTES: Final[Step] = (NAME, "__dict__")
_START: Final[Step] = (TEXT, "")
_LRU_CACHE: Final = type(functools.lru_cache(len))
_OF_A_CACHE: Final = frozenset({"dict", "_lru_list_elem"})


Back = dict[int, tuple[object, tuple[int, ...]]]
"""By its id, each object with the ids of what it holds; nothing for those that the search began at."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A way to an object: from a root, whose ``name`` is given, through ``objects``, the last of which is the one."""

    name: str
    objects: tuple[object, ...]

    def shown(self, longest_key: int) -> str:
        """As text. Of a key that is longer, it says only of which type it is: it may be a token, or another's id."""
        steps = _steps(self.objects)
        if type(self.objects[0]) is dict and steps:  # a module's global
            steps.insert(0, _ATTRIBUTES)
        pairs = itertools.pairwise([_START, *steps])
        return path_of(self.name, [_masked(before, step, longest_key) for before, step in pairs])

    def up_to(self, kind: type) -> "Trace":
        """The way as far as the first object of a type."""
        length = next((number for number, one in enumerate(self.objects, 1) if type(one) is kind), len(self.objects))
        return Trace(self.name, self.objects[:length])


def holder_path(value: object, seconds: float = 0.25, *, without: Iterable[type] = ()) -> str | None:
    """What keeps an object alive, as a path from a module's global or a class: ``shop.CACHE['profile']``.

    None where there is none, and where none was found in so many seconds. It does not lead through objects of the types
    ``without``.
    """
    trace = Search(seconds=seconds, never=without).back_from([value]).get(id(value))
    return None if trace is None else trace.shown(SHOWN_KEY)


class Search:
    """Goes back from objects. ``ends`` are types of objects that are roots too, besides modules and classes, and
    ``never`` types that no way leads through; ``without`` objects that are passed over.
    """

    __slots__ = ("_deadline", "_ends", "_modules", "_never", "_without")

    def __init__(
        self,
        *,
        seconds: float,
        ends: Iterable[type] = (),
        never: Iterable[type] = (),
        without: Iterable[object] = (),
    ) -> None:
        self._deadline = time.perf_counter() + seconds
        self._ends = tuple(ends)
        self._never = (*never, FrameType, CodeType)
        self._without = {id(one) for one in without}
        self._modules = {id(_module_dict(module)): name for name, module in _modules()}

    def back_from(self, values: Iterable[object], ways: Iterable[tuple[object, object]] = ()) -> dict[int, Trace]:
        """A shortest way from a root to each of these objects, by its id, where one was found. All of them go back
        together: it takes no longer than for one. ``ways`` are known already: something, and what it leads to.
        """
        back: Back = {id(value): (value, ()) for value in values}
        back |= {id(holder): (holder, (id(held),)) for holder, held in ways}
        wanted = {place for place, (_, held) in back.items() if not held}
        level = [value for value, _ in back.values()]
        found: dict[int, Trace] = {}
        for _ in range(STEPS):
            holders = self._step(level, back)
            for root, name in ((one, self._root_name(one)) for one in holders):
                if name is not None:
                    for way in _ways_down(id(root), back):
                        found.setdefault(id(way[-1]), Trace(name, way))
            level = [one for one in holders if not issubclass(type(one), self._never)][:WIDTH]
            if not level or wanted <= found.keys() or time.perf_counter() > self._deadline:
                break
        return found

    def _step(self, level: list[object], back: "Back") -> list[object]:
        """Who refers to one of these, and was not met yet."""
        referrers = gc.get_referrers(*level)
        ours = {id(level), id(back), id(referrers), *map(id, back.values())} | self._without
        within = {id(one) for one in level}
        found: list[object] = []
        for one in referrers:
            if id(one) in back or id(one) in ours or issubclass(type(one), FrameType):
                continue
            held = tuple(dict.fromkeys(id(other) for other in gc.get_referents(one) if id(other) in within))
            if held:
                back[id(one)] = one, held
                found.append(one)
        return found

    def _root_name(self, value: object) -> str | None:
        if id(value) in self._modules:
            return self._modules[id(value)]
        if issubclass(type(value), type):
            return f"{_module_name(value)}.{_qualname(value)}"
        if issubclass(type(value), self._ends):
            return f"<{type_name(value)}>"
        return None


def _modules() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = list(sys.modules.items())
    return [(name, module) for name, module in found if issubclass(type(module), ModuleType)]


def _ways_down(root: int, back: Back) -> Iterator[tuple[object, ...]]:
    """The ways from a root to each of the objects that the search began at, as it came upon them."""
    waiting: list[tuple[int, ...]] = [(root,)]
    met = {root}
    for places in waiting:
        held = back[places[-1]][1]
        if not held:
            yield tuple(back[place][0] for place in places)
        for place in held:
            if place not in met:
                met.add(place)
                waiting.append((*places, place))


def _steps(way: Sequence[Any]) -> list[Step]:
    """How a path goes on from each object to the next."""
    kinds = Kinds()
    steps: list[Step] = []
    function: FunctionType | None = None
    in_cache = False
    for holder, held in itertools.pairwise(way):
        if type(holder) is _LRU_CACHE:
            steps.append((TEXT, ".<cache>"))
            in_cache = True
        elif in_cache and type_name(holder) in _OF_A_CACHE:
            continue
        elif type(holder) is FunctionType:
            function = holder
            steps += _of_function(holder, held)
        elif type(held) is CellType:
            steps += [(TEXT, "<closure>")] if function is None else steps_between(function, held, kinds)
        elif type(holder) is not CellType:
            in_cache = False
            is_of_class = issubclass(type(holder), type) and type(held) is dict
            steps += [_ATTRIBUTES] if is_of_class else steps_between(holder, held, kinds)
    return steps


def _masked(before: Step, step: Step, longest: int) -> Step:
    form, what = step
    is_attribute = before == _ATTRIBUTES and type(what) is str and what.isidentifier()
    is_key = form == KEY and type(what) in (str, bytes) and not is_attribute
    return (TEXT, f"[<{type_name(what)}>]") if is_key and len(what) > longest else step


def _of_function(function: FunctionType, held: object) -> list[Step]:
    if held is function.__closure__:
        return []
    names = ("__defaults__", "__kwdefaults__", "__dict__")
    return [(NAME, name) for name in names if getattr(function, name) is held]
