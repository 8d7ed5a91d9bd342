"""What the objects of a type are to the walk: passed over, or walked, and how; and whether they can be written to."""

import asyncio
import gc
import io
import logging
import types
import weakref
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from contextvars import Context, Token
from functools import partial
from typing import Any, Final

from ucm_middleware.handles import Handle, OwnedMethod
from ucm_middleware.isolation import SCALARS
from ucm_middleware.reachability.report import Finding
from ucm_middleware.reachability.shared import INERT, INERT_NAMES, PACKAGES, TYPING, mro_of, names_of

Expand = Callable[[Any], list[Any]]
"""Reads what an object holds, where the collector is not asked for many objects at once."""


class Boundary:
    """The base of contexts: the walk ends there, since each is walked from its own roots.

    A class with this base keeps the id of its user in the slot ``_user_id``.
    """

    __slots__ = ()


class Kind:
    """What the objects of one type are to the walk.

    ``expand`` is None for those that are read many at once. ``user_of`` is there for contexts, ``length`` and
    ``iterators``, which give all that one holds, for containers. ``native`` are types of
    extensions, of which nothing is known; one that ``hides`` tells the collector nothing.
    """

    __slots__ = (
        *("attributes", "expand", "hides", "inert", "iterators", "length", "made_for", "mutable", "native", "owned"),
        *("slots", "user_of"),
    )

    def __init__(self, kind: type, *, inert: bool = False, mutable: bool = False) -> None:
        self.made_for = kind  # held, so that its id stays its own
        self.inert = inert
        self.mutable = mutable
        self.expand: Expand | None = None
        self.length: Callable[[Any], int] | None = None
        self.iterators: tuple[Callable[[Any], Iterable[Any]], ...] = ()
        self.native = False
        self.hides = False
        self.owned = False
        self.user_of: Callable[[Any], str] | None = None
        self.attributes: Callable[[Any], Any] | None = None
        self.slots: tuple[tuple[str, Callable[[Any], Any]], ...] = ()

    @property
    def is_special(self) -> bool:
        """Whether each object is dealt with by itself."""
        return self.expand is not None or self.native or self.owned or self.user_of is not None


class Kinds:
    """The kinds of all types met in one check. Types are told apart by their ids: a metaclass may define a hash."""

    __slots__ = ("_shared", "known", "special", "table", "walked")

    def __init__(self, shared_types: Iterable[type] = ()) -> None:
        self._shared = frozenset(map(id, shared_types))
        self.table = {place: kind for place, kind in _BUILT_IN.items() if place not in self._shared}
        self.known = set(self.table)
        self.walked = {place for place, kind in self.table.items() if not kind.inert}
        self.special = {place for place, kind in self.table.items() if kind.is_special}

    def of(self, value: object) -> Kind:
        """The kind of an object."""
        kind: type[object] = type(value)
        known = self.table.get(id(kind))
        return self._learn(kind) if known is None else known

    def is_shared(self, value: object) -> bool:
        """Whether users share it by design."""
        return not self._shared.isdisjoint(map(id, mro_of(type_of(value))))

    def learn(self, values: Iterable[object]) -> None:
        """Take in the kinds of all these."""
        for value in values:
            self.of(value)

    def _learn(self, kind: type) -> Kind:
        place = id(kind)
        made = self.table[place] = _kind(kind, self._shared)
        self.known.add(place)
        if not made.inert:
            self.walked.add(place)
            if made.is_special:
                self.special.add(place)
        return made


def held_by(value: Any) -> list[Any]:
    """What an object holds, as far as the garbage collector knows it."""
    return gc.get_referents(value)


def _function(value: types.FunctionType) -> list[Any]:
    # Not its globals, which are the process's.
    return [*(value.__closure__ or ()), value.__defaults__, *(value.__kwdefaults__ or {}).values()]


def _compiled_function(value: Any) -> list[Any]:
    # Its closure and defaults. Its dicts are the module's globals, annotations and attributes.
    return [item for item in gc.get_referents(value) if type(item) is not dict]


def _weak(value: Any) -> list[Any]:
    return [*gc.get_referents(value), _target_of(value)]


def _variables(value: Context) -> list[Any]:
    return list(value.values())


def _built_in_method(value: types.BuiltinFunctionType) -> list[Any]:
    # A task forgets itself by `done.discard` in the set of all tasks of its server or application, and reads nothing.
    if type(value.__self__) is set and value.__name__ == "discard":
        return []
    return gc.get_referents(value)


def _frame(value: types.FrameType) -> list[Any]:
    # Neither who called it, up to the server's loop, nor what is the module's.
    others = _ids(value.f_back, value.f_globals, value.f_builtins)
    return [item for item in gc.get_referents(value) if id(item) not in others]


def _partial(value: Any) -> list[Any]:
    # Of the dicts, which nobody writes to, only what they hold: one partial may be everybody's, as a function is.
    given = keywords_of(value)
    others = _ids(given, partial_attributes_of(value))
    own = [item for item in gc.get_referents(value) if id(item) not in others]
    return [*own, *args_of(value), *_values_of(given)]


def _frozen(attributes: Callable[[Any], Any]) -> Expand:
    """Of a frozen dataclass the dict is left out: nobody writes to it, as to the object."""

    def expand(value: Any) -> list[Any]:
        own: dict[str, Any] = attributes(value)
        return [*(item for item in gc.get_referents(value) if item is not own), *_values_of(own)]

    return expand


_values_of: Final[Callable[[Any], Iterable[Any]]] = vars(dict)["values"]
args_of: Final[Callable[[Any], tuple[Any, ...]]] = vars(partial)["args"].__get__
keywords_of: Final[Callable[[Any], dict[str, Any]]] = vars(partial)["keywords"].__get__
partial_attributes_of: Final[Callable[[Any], Any]] = vars(partial)["__dict__"].__get__
_target_of: Final[Callable[[Any], Any]] = vars(weakref.ref)["__call__"]


def _ids(*kinds: Any) -> frozenset[int]:
    return frozenset(map(id, kinds))


type_of: Final[Callable[[object], type[object]]] = type
_flags_of: Final[Callable[[type], int]] = vars(type)["__flags__"].__get__
_HAS_GC: Final = 1 << 14
_qualname_of: Final[Callable[[type], str]] = vars(type)["__qualname__"].__get__
_DataclassParams: Final[Any] = vars(Finding)["__dataclass_params__"].__class__

CONTAINERS: Final = (dict, list, tuple, set, frozenset, deque)
SIZED: Final = _ids(*CONTAINERS, OrderedDict, defaultdict)
"""The types whose objects may be asked for their length, and whose classes have no code of the application's."""
_CONTAINERS: Final = _ids(*CONTAINERS)
_MUTABLE: Final = _ids(dict, list, set, deque, bytearray)
_TRANSPARENT: Final = (
    *(*CONTAINERS, *SCALARS, slice, types.GenericAlias, types.UnionType, types.MethodType, types.MethodWrapperType),
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType, types.CellType),
    *(types.MappingProxyType, types.FunctionType, types.BuiltinFunctionType, weakref.ref, Token),
    partial,
)
# Nobody can write to these; the same goes for subclasses without attributes.
_IMMUTABLE: Final = _ids(*_TRANSPARENT) - _MUTABLE
_READ: Final = _ids(
    *(
        *_TRANSPARENT,
        OrderedDict,
        defaultdict,
        bytearray,
        types.SimpleNamespace,
        array,
        memoryview,
    ),
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, types.FrameType, types.TracebackType),
    *(
        property,
        classmethod,
        staticmethod,
        super,
        BaseException,
        asyncio.Task,
        asyncio.Future,
        Context,
    ),
    *(io.BytesIO, io.StringIO, io.FileIO, io.BufferedReader, io.BufferedWriter, io.TextIOWrapper),
)
"""The types written in C all of whose content the collector knows, or that hold none."""
_EXPANDED: Final[dict[int, Expand]] = {
    id(types.FunctionType): _function,
    id(weakref.ref): _weak,
    id(Context): _variables,
    id(types.FrameType): _frame,
    id(types.BuiltinFunctionType): _built_in_method,
    id(partial): _partial,
}
_DESCRIPTORS: Final = _ids(types.WrapperDescriptorType, types.MethodDescriptorType)


def _kind(kind: type, shared: frozenset[int]) -> Kind:
    mro, own = mro_of(kind), names_of(kind)
    places = frozenset(map(id, mro))
    if id(Boundary) in places:
        return _boundary(kind, mro)
    if not places.isdisjoint(_OWNED):
        made = Kind(kind)
        made.owned = True
        return made
    if _is_inert(mro, places, shared):
        return Kind(kind, inert=True)
    params: Any = own.get("__dataclass_params__")
    frozen: bool = type(params) is _DataclassParams and params.frozen
    made = Kind(kind)
    slots: list[tuple[str, Callable[[Any], Any]]] = []
    for base in mro:
        place = id(base)
        members = [item for item in list(names_of(base).values()) if _is_member(item, base)]
        # Only classes written in Python have __slots__; of others not known here anything must be expected.
        stateless = place in _IMMUTABLE or ("__slots__" in names_of(base) and not members)
        made.mutable = made.mutable or place in _MUTABLE or not (stateless or frozen)
        if made.expand is None:
            made.expand = _EXPANDED.get(place)
        if place not in _CONTAINERS:
            for member in members:
                if member.__name__ == "__dict__":
                    made.attributes = member.__get__
                else:
                    slots.append((member.__name__, member.__get__))
        if place in _CONTAINERS:
            names = names_of(base)
            made.length = names["__len__"]
            made.iterators = (names["keys"], names["values"]) if base is dict else (names["__iter__"],)
            if id(kind) not in SIZED:
                made.expand = held_by
    # The layout is that of the nearest class written in C.
    layout = next((base for base in mro if id(base) in _READ or _is_native(base)), None)
    made.native = layout is not None and id(layout) not in _READ
    made.hides = made.native and layout is not None and not _flags_of(layout) & _HAS_GC
    made.slots = tuple(slots)
    if _is_cython_function(kind, own):
        made.mutable, made.native, made.expand = False, False, _compiled_function
    if made.attributes is not None and not made.mutable and made.expand is None:
        made.expand = _frozen(made.attributes)
    return made


_OWNED: Final = _ids(Handle, OwnedMethod)


def _boundary(kind: type, mro: tuple[type, ...]) -> Kind:
    made = Kind(kind, mutable=True)
    for base in mro:
        member = names_of(base).get("_user_id")
        if type(member) is types.MemberDescriptorType:
            made.user_of = member.__get__
            return made
    return Kind(kind, inert=True)


def _is_inert(mro: tuple[type, ...], places: frozenset[int], shared: frozenset[int]) -> bool:
    if not places.isdisjoint(shared) or not places.isdisjoint(INERT) or id(mro[0]) in _SCALARS:
        return True
    module: object = names_of(mro[0]).get("__module__")
    if type(module) is str and module in TYPING:
        return True
    for base in mro:
        module = names_of(base).get("__module__")
        if type(module) is str and (module.startswith(PACKAGES) or f"{module}.{_qualname_of(base)}" in INERT_NAMES):
            return True
    return _takes(mro, "__call__", ("scope", "receive", "send")) and _takes(mro, "__init__", ("app",))


def _takes(mro: tuple[type, ...], name: str, arguments: tuple[str, ...]) -> bool:
    """Whether a method written in Python has these arguments first, as those of an ASGI middleware do."""
    for base in mro:
        method = names_of(base).get(name)
        if method is not None:
            return (
                type(method) is types.FunctionType and method.__code__.co_varnames[1 : 1 + len(arguments)] == arguments
            )
    return False


def _is_native(base: type) -> bool:
    """Whether a class is written in C: it has methods that are."""
    members: list[Any] = list(names_of(base).values())
    return base is not object and any(
        id(type_of(item)) in _DESCRIPTORS  # pyright: ignore[reportUnknownArgumentType]
        and item.__objclass__ is base
        for item in members
    )


def _is_cython_function(kind: type, own: "types.MappingProxyType[str, Any]") -> bool:
    # Each version of Cython has a type of its own for them. A class written in Python has text as its __module__.
    return _qualname_of(kind) == "cython_function_or_method" and type(own.get("__module__")) is not str


def _is_member(item: Any, base: type) -> bool:
    """Whether a class attribute gives access to what C code keeps for ``base``: a slot, or the dict of an instance."""
    if type(item) is types.MemberDescriptorType:
        return item.__objclass__ is base
    return type(item) is types.GetSetDescriptorType and item.__objclass__ is base and item.__name__ == "__dict__"


_SCALARS: Final = _ids(*SCALARS)
_BUILT_IN: Final = {
    id(kind): _kind(kind, frozenset())
    for kind in (*SCALARS, *CONTAINERS, OrderedDict, defaultdict, logging.Logger, types.FunctionType, types.MethodType)
}
