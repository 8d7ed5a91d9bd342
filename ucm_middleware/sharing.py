"""The reachability check: the mutable objects to which the data of two owners lead.

It runs none of the application's code: no ``__eq__``, ``__hash__``, ``__repr__``, ``__getattr__``, property or
overridden iteration. Objects are told apart by identity and read with the methods and descriptors of built-in types.
What C code hides is not seen: what a generator, an iterator or a type of an extension module holds.
"""

import datetime
import gc
import itertools
import logging
import pathlib
import types
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ucm_middleware.handles import Handle, OwnedMethod, ownership_of
from ucm_middleware.isolation import ELEMENT, SCALARS, SINGLETONS, Shared, key_text, path_text, type_name


@dataclass(frozen=True, slots=True)
class Root:
    """Where the walk through an owner's data begins. ``label`` begins the paths: ``alice.agent_context``.

    An ``opaque`` value, such as a database session, is compared by identity and not walked.
    """

    owner: str
    label: str
    value: object
    opaque: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One mutable object that two owners reach, by a shortest path from each. Texts only: it keeps nothing alive."""

    first_path: str
    second_path: str
    type_name: str
    first_owner: str
    second_owner: str

    def __str__(self) -> str:
        return f"{self.first_path} is {self.second_path} ({self.type_name})"


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What the walk over all live contexts found: each object that two users share, by both paths."""

    contexts: int
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        """True when nothing is shared."""
        return not self.findings


def find_shared(roots: Iterable[Root], user_id: str | None = None) -> list[Finding]:
    """Every place where an owner's data lead into something mutable that an earlier owner reaches too.

    Owners are taken in the order of their first root. A finding names the object, the first owner who reaches it and
    the later one who came upon it. What lies below is not named again, unless that owner also gets there another way.
    No findings means that no two owners share anything mutable.

    An owned handle leads to its target in the data of another user alone: in the owner's, the context that made it has
    the target among its roots. With ``user_id``, all owners are parts of that user.
    """
    shapes = _SCALAR_SHAPES.copy()
    walks: dict[str, deque[_Node]] = {}
    for root in roots:
        shape = _shape_of(root.value, shapes)
        # A bare object() is nothing that anybody could write to, but as a session it stands for one.
        if not shape.inert or (root.opaque and type(root.value) is object):
            node = _Node(root.value, shape, root.owner, None, _TEXT, root.label, root.opaque)
            walks.setdefault(root.owner, deque()).append(node)
    if len(walks) < 2:
        return []
    visited: dict[int, _Node] = {}  # by whom first; holding the objects, so that no id is given out twice meanwhile
    findings: list[Finding] = []
    for owner, queue in walks.items():
        passed: set[int] = set()  # what is known from an earlier owner and was met in this walk already
        while queue:
            node = queue.popleft()
            place = id(node.value)
            known = visited.setdefault(place, node)
            if known is not node:
                if known.owner == owner or known.barren or place in passed:
                    continue
                passed.add(place)
                if node.shape.mutable or node.opaque:
                    findings.append(Finding(_path(known), _path(node), type_name(node.value), known.owner, owner))
                    continue
            if not node.opaque:
                children = (
                    _foreign_targets(node, user_id or owner, shapes) if node.shape.owned else _children(node, shapes)
                )
                queue.extend(children)
                node.barren = not (children or node.shape.mutable or node.shape.owned)
    return findings


_Step = tuple[int, Any, object]
_Reader = Callable[[Any], Iterable[_Step]]
"""Reads the objects that an object holds. The first two fields of a step say how it is written in a path."""
_KEY: Final = 0  # [key], or [index]
_NAME: Final = 1  # .name
_TEXT: Final = 2  # as it is


class _Shape:
    """What the objects of a type are to the walk: whether they can be written to, and what reads what they hold."""

    __slots__ = ("inert", "kind", "mutable", "owned", "readers")

    def __init__(
        self, kind: type, mutable: bool = False, readers: Iterable[_Reader] = (), *, owned: bool = False
    ) -> None:
        self.kind = kind  # held, so that its id stays its own
        self.mutable = mutable
        self.readers = tuple(readers)
        self.owned = owned
        self.inert = not mutable and not self.readers and not owned


class _Node:
    """An object on a walk, and how it was come upon. ``barren`` if it is immutable and holds nothing of interest."""

    __slots__ = ("barren", "form", "opaque", "owner", "parent", "shape", "value", "what")

    def __init__(
        self,
        value: object,
        shape: _Shape,
        owner: str,
        parent: "_Node | None",
        form: int,
        what: Any,
        opaque: bool = False,
    ) -> None:
        self.value = value
        self.shape = shape
        self.owner = owner
        self.parent = parent
        self.form = form
        self.what = what
        self.opaque = opaque
        self.barren = False


def _children(node: _Node, shapes: dict[int, _Shape]) -> list[_Node]:
    children: list[_Node] = []
    for reader in node.shape.readers:
        for form, what, child in reader(node.value):
            shape = shapes.get(id(type(child))) or _shape_of(child, shapes)
            if not shape.inert:
                children.append(_Node(child, shape, node.owner, node, form, what))
    return children


def _foreign_targets(node: _Node, user_id: str, shapes: dict[int, _Shape]) -> list[_Node]:
    """What a handle that came into another user's data stands for; nothing for one that is the user's own."""
    ownership = ownership_of(node.value)
    if ownership.owner.user_id == user_id:
        return []
    return [
        _Node(target, _shape_of(target, shapes), node.owner, node, _TEXT, "<target>", opaque=True)
        for target in ownership.targets()
    ]


def _path(node: _Node) -> str:
    steps: list[_Node] = []
    while node.parent is not None:
        steps.append(node)
        node = node.parent
    texts: list[str] = []
    for step in reversed(steps):
        if step.form == _NAME:
            texts.append(f".{step.what}")
        elif step.form == _TEXT:
            texts.append(step.what)
        elif texts and texts[-1] == ".__dict__" and type(step.what) is str and step.what.isidentifier():
            texts[-1] = f".{step.what}"
        else:
            texts.append(f"[{key_text(step.what)}]")
    return path_text(node.what, texts)


def _all_of(iterate: Callable[[Any], Iterable[Any]], value: Any) -> list[Any]:
    """What ``iterate`` gives, taken in one go within C code: no other thread can change the container meanwhile."""
    return list(itertools.chain.from_iterable(map(iterate, (value,))))


_keys: Final[Callable[[Any], Iterable[Any]]] = vars(dict)["keys"]
_values: Final[Callable[[Any], Iterable[Any]]] = vars(dict)["values"]


def _items(value: Any) -> Iterator[_Step]:
    for key, item in zip(_all_of(_keys, value), _all_of(_values, value), strict=False):
        yield _TEXT, "<key>", key
        yield _KEY, key, item


def _indexed(kind: type) -> _Reader:
    iterate = vars(kind)["__iter__"]
    return lambda value: [(_KEY, index, item) for index, item in enumerate(_all_of(iterate, value))]


def _elements(kind: type) -> _Reader:
    iterate = vars(kind)["__iter__"]
    return lambda value: [(_TEXT, ELEMENT, item) for item in _all_of(iterate, value)]


def _function_parts(value: types.FunctionType) -> Iterator[_Step]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        for content in gc.get_referents(cell):  # none, when the variable has no value yet
            yield _TEXT, f"<variable {name}>", content
    yield _NAME, "__defaults__", value.__defaults__
    for name, default in list((value.__kwdefaults__ or {}).items()):
        yield _TEXT, f".__kwdefaults__[{name!r}]", default


def _slot(name: str, get: Callable[[Any], Any]) -> _Reader:
    def read(value: Any) -> Iterator[_Step]:
        try:
            item = get(value)
        except AttributeError:  # a slot without a value
            return
        yield _NAME, name, item

    return read


def _attributes(get: Callable[[Any], Any]) -> _Reader:
    # The dict itself: two objects may have the same one.
    return lambda value: ((_NAME, "__dict__", get(value)),)


def _frozen_attributes(get: Callable[[Any], Any]) -> _Reader:
    return lambda value: [(_NAME, name, item) for form, name, item in _items(get(value)) if form == _KEY]


def _ids(*kinds: Any) -> frozenset[int]:
    # Types are looked up by identity: a metaclass of the application's may define a hash and an equality.
    return frozenset(map(id, kinds))


_READERS: Final[dict[int, _Reader]] = {
    id(dict): _items,
    **{id(kind): _indexed(kind) for kind in (list, tuple, deque)},
    **{id(kind): _elements(kind) for kind in (set, frozenset)},
    id(types.FunctionType): _function_parts,
    id(types.BuiltinFunctionType): lambda value: ((_NAME, "__self__", value.__self__),),
    id(types.MappingProxyType): lambda value: [(_TEXT, "", item) for item in gc.get_referents(value)],
    id(weakref.ref): lambda value: ((_TEXT, "()", vars(weakref.ref)["__call__"](value)),),
}
_MUTABLE: Final = _ids(dict, list, set, deque, bytearray)
# Nobody can write to these either, as to the others above; the same goes for subclasses without attributes.
_IMMUTABLE: Final = _ids(
    *SCALARS,
    *(slice, types.GenericAlias, types.UnionType, types.MethodType, types.MethodWrapperType),
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
)
# The end of the walk, subclasses included: the process has them for everybody, or they are immutable by their contract.
_INERT: Final = _ids(*SINGLETONS, *(Shared, datetime.tzinfo, pathlib.PurePath, uuid.UUID, logging.Logger))
_OWNED: Final = _ids(Handle, OwnedMethod)
_TYPING: Final = frozenset({"typing", "typing_extensions"})  # Optional[int] and its like, which are cached

# What a class has, read from the type of types, so that neither the class nor its metaclass is asked.
_mro_of: Final[Callable[[type], tuple[type, ...]]] = vars(type)["__mro__"].__get__
_names_of: Final[Callable[[type], "types.MappingProxyType[str, Any]"]] = vars(type)["__dict__"].__get__
_DataclassParams: Final[Any] = vars(Finding)["__dataclass_params__"].__class__
_SCALAR_SHAPES: Final = {id(kind): _Shape(kind) for kind in SCALARS}


def _shape_of(value: object, shapes: dict[int, _Shape]) -> _Shape:
    kind: type[object] = type(value)
    shape = shapes.get(id(kind))
    if shape is None:
        shape = shapes[id(kind)] = _shape(kind)
    return shape


def _shape(kind: type) -> _Shape:
    mro, own = _mro_of(kind), _names_of(kind)
    if not _OWNED.isdisjoint(map(id, mro)):
        return _Shape(kind, owned=True)
    module: object = own.get("__module__")
    if not _INERT.isdisjoint(map(id, mro)) or (type(module) is str and module in _TYPING):
        return _Shape(kind)
    params: Any = own.get("__dataclass_params__")
    frozen: bool = type(params) is _DataclassParams and params.frozen
    mutable = False
    attributes: Callable[[Any], Any] | None = None
    readers: list[_Reader] = []
    for base in mro:
        mutable = mutable or id(base) in _MUTABLE
        if id(base) in _READERS:
            readers.append(_READERS[id(base)])
            continue
        members = [item for item in list(_names_of(base).values()) if _is_member(item, base)]
        # Only classes written in Python have __slots__; of others not known here anything must be expected.
        stateless = id(base) in _IMMUTABLE or ("__slots__" in _names_of(base) and not members)
        mutable = mutable or not (stateless or frozen)
        for member in members:
            if member.__name__ == "__dict__":
                attributes = member.__get__
            else:
                readers.append(_slot(member.__name__, member.__get__))
    if attributes is not None:
        readers.append(_attributes(attributes) if mutable else _frozen_attributes(attributes))
    return _Shape(kind, mutable, readers)


def _is_member(item: Any, base: type) -> bool:
    """Whether a class attribute gives access to what C code keeps for ``base``: a slot, or the dict of an instance."""
    if type(item) is types.MemberDescriptorType:
        return item.__objclass__ is base
    return type(item) is types.GetSetDescriptorType and item.__objclass__ is base and item.__name__ == "__dict__"
