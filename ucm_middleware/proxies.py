"""One proxy class for each type of target, with exactly the special methods that the type has.

Python looks special methods up on the class: ``callable``, ``len``, ``await`` and ``with`` see what is defined there.
"""

import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

V = TypeVar("V")

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift")
_BITWISE = ("and", "xor", "or")
OPERATORS: Final = (
    *(f"__{name}__" for name in ("neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil")),
    *(f"__{side}{name}__" for name in (*_BINARY, *_BITWISE) for side in ("", "r", "i")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "hash")),
)
CONVERSIONS: Final = tuple(f"__{name}__" for name in ("bool", "int", "float", "complex", "index", "bytes", "fspath"))
CONTAINERS: Final = (
    *(f"__{name}__" for name in ("len", "length_hint", "contains", "getitem", "setitem", "delitem")),
    *(f"__{name}__" for name in ("iter", "next", "reversed", "aiter")),
)
# Not among them: what makes, ends, copies, describes or subclasses an object, and descriptors, which act on others.
FORWARDED: Final = (*OPERATORS, *CONVERSIONS, *CONTAINERS, "__call__", "__enter__")
_LAZY: Final = ("__call__", "__await__", "__next__", "__anext__", "__enter__", "__aenter__")

METHOD_DESCRIPTORS: Final = frozenset({types.MethodDescriptorType, types.WrapperDescriptorType})
BUILTIN_METHODS: Final = frozenset({types.BuiltinMethodType, types.MethodWrapperType})

_mro_of: Final[Callable[[type], tuple[type, ...]]] = vars(type)["__mro__"].__get__
_names_of: Final[Callable[[type], "types.MappingProxyType[str, Any]"]] = vars(type)["__dict__"].__get__


def special_methods(kind: type, names: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """Which of the names the type defines, ``object`` aside; False for one that it sets to None, to be without it."""
    bases = [_names_of(base) for base in _mro_of(kind) if base is not object]
    for name in names:
        for base in bases:
            if name in base:
                yield name, base[name] is not None
                break


def is_lazy(kind: type) -> bool:
    """Whether values of this type do their work later: callables, awaitables, iterators, context managers."""
    return any(defined for _, defined in special_methods(kind, dict.fromkeys(_LAZY)))


def plain_methods(kind: type) -> Iterator[tuple[str, bool]]:
    """The names that lead to a function of the class, unless the instance has another value there; and whether that is
    an ``async def``. None for a class that looks its attributes up by itself.
    """
    found: dict[str, object] = {}
    for base in reversed(_mro_of(kind)):
        found.update(_names_of(base))
    if found["__getattribute__"] is not vars(object)["__getattribute__"]:
        return
    for name, value in found.items():
        if type(value) is types.FunctionType:
            yield name, bool(value.__code__.co_flags & inspect.CO_COROUTINE)


def proxy_class(base: type, kind: type, methods: Mapping[str, object]) -> type:
    """A subclass of ``base`` with those of the methods that ``kind`` defines. It does not refer to ``kind``."""
    namespace: dict[str, object] = {"__slots__": (), "__module__": base.__module__}
    for name, defined in special_methods(kind, methods):
        namespace[name] = methods[name] if defined else None
    return type(kind.__name__, (base,), namespace)


class KindTable(Generic[V]):
    """What is worked out once for a type and forgotten with it. The value must not refer to the type."""

    __slots__ = ("_known", "_work_out")

    def __init__(self, work_out: Callable[[type], V]) -> None:
        self._work_out = work_out
        # By identity: a metaclass of the application's may define a hash and an equality.
        self._known: dict[int, tuple[weakref.ref[type], V]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, kind: type) -> V:
        place = id(kind)
        known = self._known.get(place)
        if known is None:
            table = self._known
            made = (weakref.ref(kind, lambda _: table.pop(place, None)), self._work_out(kind))
            known = table.setdefault(place, made)
        return known[1]
