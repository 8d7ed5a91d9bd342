"""How a step from an object to one that it holds is written in a path."""

import asyncio
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import Context, ContextVar
from functools import partial
from itertools import compress, count, repeat
from operator import is_
from typing import Any, Final

from ucm_middleware.isolation import ELEMENT, key_text, path_text
from ucm_middleware.reachability.kinds import Kinds, args_of, keywords_of
from ucm_middleware.reachability.shared import mro_of

Step = tuple[int, Any]
KEY: Final = 0  # [key], or [index]
NAME: Final = 1  # .name
TEXT: Final = 2  # as it is

_DICT: Final[Step] = (NAME, "__dict__")


def path_of(start: str, steps: Sequence[Step]) -> str:
    """A path as text, from where it starts."""
    texts: list[str] = []
    for form, what in steps:
        if form == NAME:
            texts.append(f".{what}")
        elif form == TEXT:
            texts.append(what)
        elif texts and texts[-1] == ".__dict__" and type(what) is str and what.isidentifier():
            texts[-1] = f".{what}"
        else:
            texts.append(f"[{key_text(what)}]")
    return path_text(start, [text for text in texts if text])


def steps_between(parent: Any, child: Any, kinds: Kinds) -> list[Step]:
    """The steps that lead from an object to one that it holds; ``<held>`` where C code does not name them."""
    kind = kinds.of(parent)
    if kind.owned:
        return [(TEXT, "<target>")]
    for base in mro_of(kind.made_for):
        reader = _READERS.get(id(base))
        if reader is not None:
            for step in reader(parent, child):
                return [step]
    for name, get in kind.slots:
        if _got(get, parent) is child:
            return [(NAME, name)]
    if kind.attributes is not None:
        own = _got(kind.attributes, parent)
        if own is child:
            return [_DICT]
        if type(own) is dict:  # C code may give anything for one
            for step in _item(own, child):
                return [_DICT, step]
    return [(TEXT, "<held>")]


def _got(get: Callable[[Any], Any], value: Any) -> Any:
    try:
        return get(value)
    except AttributeError:  # a slot without a value
        return None


_keys: Final[Callable[[Any], Iterable[Any]]] = vars(dict)["keys"]
_values: Final[Callable[[Any], Iterable[Any]]] = vars(dict)["values"]
_NOTHING: Final = object()


def _beside(names: Iterable[Any], values: Iterable[Any], child: Any) -> Any:
    """The name that stands beside an object, which is not asked whether it equals; one call of C code, so that no
    other thread can change the container meanwhile."""
    try:
        return next(compress(names, map(is_, values, repeat(child))), _NOTHING)
    except RuntimeError:  # one has changed it just before
        return _NOTHING


def _item(parent: Any, child: Any) -> Iterator[Step]:
    key = _beside(_keys(parent), _values(parent), child)
    if key is not _NOTHING:
        yield KEY, key
    elif _beside(_keys(parent), _keys(parent), child) is not _NOTHING:
        yield TEXT, "<key>"


def _indexed(kind: type) -> "_Reader":
    iterate = vars(kind)["__iter__"]

    def read(parent: Any, child: Any) -> Iterator[Step]:
        place = _beside(count(), iterate(parent), child)
        if place is not _NOTHING:
            yield KEY, place

    return read


def _element(kind: type) -> "_Reader":
    iterate = vars(kind)["__iter__"]

    def read(parent: Any, child: Any) -> Iterator[Step]:
        if _beside(count(), iterate(parent), child) is not _NOTHING:
            yield TEXT, ELEMENT

    return read


def _function(parent: types.FunctionType, child: Any) -> Iterator[Step]:
    for name, cell in zip(parent.__code__.co_freevars, parent.__closure__ or (), strict=True):
        if cell is child:
            yield TEXT, f"<variable {name}>"
    if parent.__defaults__ is child:
        yield NAME, "__defaults__"
    for name, default in list((parent.__kwdefaults__ or {}).items()):
        if default is child:
            yield TEXT, f".__kwdefaults__[{name!r}]"


def _partial(parent: Any, child: Any) -> Iterator[Step]:
    yield from _partial_function(parent, child)
    for name, get, read in (("args", args_of, _in_tuple), ("keywords", keywords_of, _item)):
        for _, place in read(get(parent), child):
            yield TEXT, f".{name}[{key_text(place)}]"


def _passing(parent: Any, child: Any) -> Iterator[Step]:
    yield TEXT, ""


def _local(parent: Any, child: Any) -> Iterator[Step]:
    yield TEXT, "<local>"


def _weak(parent: Any, child: Any) -> Iterator[Step]:
    if vars(weakref.ref)["__call__"](parent) is child:
        yield TEXT, "()"


def _variable(parent: Context, child: Any) -> Iterator[Step]:
    for variable, value in list(parent.items()):
        if value is child:
            yield KEY, _name_of(variable)


def _named(kind: type, *names: str) -> "_Reader":
    """Of what C code computes, such as what a coroutine awaits."""
    members = [(name, vars(kind)[name].__get__) for name in names]

    def read(parent: Any, child: Any) -> Iterator[Step]:
        for name, get in members:
            if get(parent) is child:
                yield NAME, name

    return read


_Reader = Callable[[Any, Any], Iterator[Step]]
_yielded_from: Final = _named(types.GeneratorType, "gi_yieldfrom")
_awaited: Final = _named(types.CoroutineType, "cr_await")
_async_awaited: Final = _named(types.AsyncGeneratorType, "ag_await")
_name_of: Final[Callable[[Any], str]] = vars(ContextVar)["name"].__get__
_in_tuple: Final = _indexed(tuple)
_partial_function: Final = _named(partial, "func")
_READERS: Final[dict[int, _Reader]] = {
    id(dict): _item,
    **{id(kind): _indexed(kind) for kind in (list, tuple, deque)},
    **{id(kind): _element(kind) for kind in (set, frozenset)},
    id(types.FunctionType): _function,
    id(partial): _partial,
    id(types.BuiltinFunctionType): _named(types.BuiltinFunctionType, "__self__"),
    id(types.MappingProxyType): _passing,
    id(types.CellType): _passing,
    id(weakref.ref): _weak,
    id(Context): _variable,
    id(asyncio.Task): _named(asyncio.Task, "_coro"),
    id(asyncio.Future): _named(asyncio.Future, "_result", "_exception"),
    id(types.FrameType): _local,
    id(types.GeneratorType): lambda parent, child: _after(_yielded_from, _local, parent, child),
    id(types.CoroutineType): lambda parent, child: _after(_awaited, _local, parent, child),
    id(types.AsyncGeneratorType): lambda parent, child: _after(_async_awaited, _local, parent, child),
    id(BaseException): _named(BaseException, "args", "__traceback__", "__cause__", "__context__"),
}


def _after(first: _Reader, second: _Reader, parent: Any, child: Any) -> Iterator[Step]:
    yield from first(parent, child)
    yield from second(parent, child)
