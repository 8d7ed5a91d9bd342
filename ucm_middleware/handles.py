"""Owned handles: stand-ins for what a context gives out, that work for its user, until it closes.

``isinstance`` takes a handle for its target, and so do the frameworks that ask it. Every use is checked: reading and
writing attributes, calls, special methods, each step of what is lazy. What comes out of a use is

- the target itself: its handle;
- a method, an awaitable, an iterator, a context manager or another callable: owned like the handle it came from;
- what a context manager gives on entering: likewise, unless it is plain data;
- an object of a type that a plugin names in ``ucm_owned_types``: likewise;
- anything else: as it is.
"""

import inspect
from collections.abc import Callable, Coroutine, Generator
from types import BuiltinMethodType, CoroutineType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast, final

from ucm_middleware.errors import ContextClosedError, InvalidContextError
from ucm_middleware.isolation import COPIED_FOR, SCALARS, Memo, RefusedError, type_name
from ucm_middleware.ownership import Cell, Ownership
from ucm_middleware.proxies import (
    BUILTIN_METHODS,
    FORWARDED,
    METHOD_DESCRIPTORS,
    KindTable,
    is_lazy,
    plain_methods,
    proxy_class,
)

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext

T = TypeVar("T")

_type_of: Final = cast("Callable[[Any], Any]", type)
_DATA: Final = SCALARS | {list, dict, tuple, set, frozenset, bytearray}
_PROCESS_WIDE: Final = (type, ModuleType)


def own(owner: "UserExecutionContext", target: T, name: str | None) -> T:
    """See ``UserExecutionContext.own``."""
    kind = type(target)
    if kind in _DATA or issubclass(kind, _PROCESS_WIDE):
        raise InvalidContextError("target", "is plain data, a class or a module", "give it out as it is")
    if issubclass(kind, (Handle, OwnedMethod)):
        raise InvalidContextError("target", "is owned already", "pass it on, or own what it was made for")
    return cast("T", _handle(Ownership(owner, name or type_name(target)), target, None))


def lend(owner: "UserExecutionContext", target: T, name: str) -> T:
    """What a parent gives to a child for as long as that lives: a handle, also of a handle; plain data as it is."""
    kind = type(target)
    if kind in _DATA or issubclass(kind, _PROCESS_WIDE):
        return target
    if issubclass(kind, Handle):
        cell = _cell_of(target)
        return cast("T", _handle(Ownership(owner, name, cell.ownership), cell.use(), None))
    return own(owner, target, name)


def revoke_handle(handle: object) -> None:
    """Refuse every use of a handle from now on, and of all that came out of it; a call under way is not stopped.

    From any thread, and as often as one likes. Raises CrossUserAccessError in another user's context, and
    InvalidContextError for what is no handle.
    """
    if not issubclass(type(handle), Handle):
        raise InvalidContextError("handle", f"is a {type_name(handle)}, not owned", "give what context.own() gave")
    ownership = _cell_of(handle).ownership
    ownership.require_user()
    ownership.revoke()


def _refuse_copy(self: object, *_: object) -> NoReturn:
    raise TypeError("an owned handle is not copied or pickled: it belongs to one context of one process; pass it as is")


class Handle:
    """The base of all proxy classes. What is looked up on an instance is the target's, but for the names ``_KEPT``."""

    __slots__ = ("__cell", "__weakref__")

    def __new__(cls, *_: object, **__: object) -> "Handle":
        raise TypeError("a handle is made by context.own()")

    def __getattribute__(self, name: str) -> Any:
        # Taking a method is not yet a use, calling it is: so it is not checked twice, and no code of the target runs.
        cell = _cell_of(self)
        kind = cell.methods.get(name)
        if kind is not None and (target := cell.target) is not None:
            value = getattr(target, name)
            if type(value) is MethodType and value.__self__ is target:
                return kind(self, cell, value.__func__)
        return _read(self, cell, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_cell_of(self).use(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_cell_of(self).use(), name)

    # What is asked of every object is answered without a check, and tells nothing of the target but its type.

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _cell_of(self).kind

    def __dir__(self) -> list[str]:
        return dir(_cell_of(self).kind)

    def __repr__(self) -> str:
        cell = _cell_of(self)
        ownership = cell.ownership
        return f"<owned {cell.kind.__name__} of {ownership.owner.request_id} {ownership.state}>"

    def __str__(self) -> str:
        return Handle.__repr__(self)

    def __format__(self, spec: str) -> str:
        return format(Handle.__repr__(self), spec)

    __copy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse_copy

    def __deepcopy__(self, memo: Memo) -> "Handle":
        """Refused, except at the boundary of a context of the same user: there the handle passes as it is."""
        if COPIED_FOR not in memo:
            _refuse_copy(self)
        if memo[COPIED_FOR] != _cell_of(self).ownership.owner.user_id:
            rule = "is an owned handle, and not of the user that the data is for"
            raise RefusedError(rule, "let that user's own context own() the object")
        return self

    def __del__(self) -> None:
        cell = _cell_of(self)
        cell.ownership.forget(cell)


# Read with the descriptor, since every other way leads to the target.
_cell_of: Final[Callable[[Any], Cell]] = vars(Handle)["_Handle__cell"].__get__
_set_cell: Final[Callable[[Handle, Cell], None]] = vars(Handle)["_Handle__cell"].__set__


def ownership_of(owned: Any) -> Ownership:
    """What decides over a handle, or over a method of one."""
    return _cell_of(owned._handle if issubclass(type(owned), OwnedMethod) else owned).ownership


def _handle(ownership: Ownership, target: object, parent: Handle | None) -> Handle:
    kind = type(target)
    proxy, methods = _kinds[kind]
    handle: Handle = object.__new__(proxy)
    cell = Cell(ownership, target, kind, methods, parent)
    _set_cell(handle, cell)
    ownership.keep(cell)
    return handle


def _read(handle: Handle, cell: Cell, name: str) -> Any:
    """An attribute that is no plain method."""
    if name in _KEPT:
        return object.__getattribute__(handle, name)
    target = cell.use()
    try:
        value = getattr(target, name)
    except AttributeError:
        if name == "__signature__" and callable(target):
            return _signature_of(target)
        raise
    kind = _type_of(value)
    if kind is MethodType and value.__self__ is target:
        return OwnedMethod(handle, cell, value.__func__)
    if kind in BUILTIN_METHODS and value.__self__ is target:
        function = getattr(_type_of(target), name, None)
        if type(function) in METHOD_DESCRIPTORS:
            return OwnedMethod(handle, cell, function)
    return give(handle, value)


def _signature_of(target: Callable[..., object]) -> inspect.Signature:
    """Asked for because the class of the handle has a ``__call__`` that takes anything."""
    try:
        return inspect.signature(target)
    except ValueError as error:
        raise AttributeError("__signature__") from error


def give(handle: Handle, value: Any, *, entered: bool = False) -> Any:
    """What came out of a use of the handle, as it may be given out; see the module. ``entered``: by a ``with``."""
    kind = _type_of(value)
    if kind in _DATA or issubclass(kind, (Handle, OwnedMethod, *_PROCESS_WIDE)):
        return value
    node: Handle | None = handle
    while node is not None:
        cell = _cell_of(node)
        if cell.target is value:
            return node
        node = cast("Handle | None", cell.parent)
    ownership = _cell_of(handle).ownership
    if entered or _is_lazy[kind] or issubclass(kind, ownership.also):
        return _handle(ownership, value, handle)
    return value


class OwnedMethod:
    """A method of a handle's target, bound to the handle: checked when it is called, whoever holds it by then."""

    __slots__ = ("__weakref__", "_cell", "_function", "_handle")

    def __init__(self, handle: Handle, cell: Cell, function: Any) -> None:
        self._handle = handle
        self._cell = cell
        self._function = function

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            value = self._function(self._cell.use(), *args, **kwargs)
        except StopIteration as stop:  # with what a coroutine or a generator returned
            raise StopIteration(give(self._handle, stop.value)) from None
        return value if type(value) in _DATA else give(self._handle, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return BuiltinMethodType if type(self._function) in METHOD_DESCRIPTORS else MethodType

    @property
    def __self__(self) -> Handle:
        return self._handle

    @property
    def __func__(self) -> Any:
        return self._function

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return cast("str | None", self._function.__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)  # the name, the code, the annotations: what signatures are made of

    def __eq__(self, other: object) -> bool:
        if not issubclass(type(other), OwnedMethod):
            return NotImplemented
        method = cast("OwnedMethod", other)
        return self._handle is method._handle and bool(self._function == method._function)

    def __hash__(self) -> int:
        return hash((id(self._handle), self._function))

    def __repr__(self) -> str:
        return f"<method {getattr(self._function, '__name__', '?')} of {self._handle!r}>"

    __copy__ = __reduce__ = __reduce_ex__ = _refuse_copy

    def __deepcopy__(self, memo: Memo) -> "OwnedMethod":
        Handle.__deepcopy__(self._handle, memo)
        return self


@final
class AsyncOwnedMethod(OwnedMethod):
    # An ``async def`` of the target: checked when it is called, and again when that is first awaited.

    __slots__ = ()
    __doc__ = vars(OwnedMethod)["__doc__"]  # pyright: ignore[reportIncompatibleMethodOverride] - the method's

    def __call__(self, /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        self._cell.use()
        coroutine: Any = _run(self._handle, self._cell, self._function, args, kwargs)
        coroutine.__qualname__ = self._function.__qualname__  # which asyncio and warnings show
        return cast("Coroutine[Any, Any, Any]", coroutine)


async def _run(handle: Handle, cell: Cell, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = await function(cell.use(), *args, **kwargs)
    return value if type(value) in _DATA else give(handle, value)


# The special methods. A proxy class has those that the type of its target has.


def _forwarder(name: str) -> Callable[..., Any]:
    entered = name == "__enter__"

    def special(self: Handle, /, *args: Any, **kwargs: Any) -> Any:
        target = _cell_of(self).use()
        try:
            value = getattr(_type_of(target), name)(target, *args, **kwargs)
        except StopIteration as stop:
            raise StopIteration(give(self, stop.value)) from None
        return give(self, value, entered=entered)

    special.__name__ = special.__qualname__ = name
    return special


def _await(self: Handle) -> Generator[Any, Any, Any]:
    cell = _cell_of(self)
    try:
        target = cell.use()
    except BaseException:
        if _type_of(cell.target) is CoroutineType:
            cell.target.close()  # so that nothing complains of a coroutine never awaited
        raise
    return give(self, (yield from _type_of(target).__await__(target)))


async def _anext(self: Handle) -> Any:
    target = _cell_of(self).use()
    return give(self, await _type_of(target).__anext__(target))


async def _aenter(self: Handle) -> Any:
    target = _cell_of(self).use()
    return give(self, await _type_of(target).__aenter__(target), entered=True)


def _exit(self: Handle, *exc_info: Any) -> Any:
    target, late = _use_for_exit(_cell_of(self))
    if late is None or exc_info[0] is not None:
        return _type_of(target).__exit__(target, *exc_info)
    _type_of(target).__exit__(target, type(late), late, late.__traceback__)
    raise late


async def _aexit(self: Handle, *exc_info: Any) -> Any:
    target, late = _use_for_exit(_cell_of(self))
    if late is None or exc_info[0] is not None:
        return await _type_of(target).__aexit__(target, *exc_info)
    await _type_of(target).__aexit__(target, type(late), late, late.__traceback__)
    raise late


def _use_for_exit(cell: Cell) -> tuple[Any, ContextClosedError | None]:
    """A block that was entered can be left until the teardown is through, or what it holds would stay taken. But its
    exit then sees an error, since an exit without one is how a transaction is told to commit.
    """
    try:
        return cell.use(), None
    except ContextClosedError as late:
        cell.ownership.require_user()
        if (target := cell.target) is None:
            raise
        return target, late


_METHODS: Final[dict[str, Any]] = {
    **{name: _forwarder(name) for name in FORWARDED},
    "__await__": _await,
    "__anext__": _anext,
    "__aenter__": _aenter,
    "__exit__": _exit,
    "__aexit__": _aexit,
}
_KEPT: Final = frozenset(_METHODS) | {
    name
    for name in vars(Handle)
    if not name.startswith("_Handle") and name not in ("__doc__", "__module__", "__slots__")
}


def _kind(kind: type) -> tuple[Any, dict[str, type[OwnedMethod]]]:
    methods = {
        name: AsyncOwnedMethod if is_async else OwnedMethod
        for name, is_async in plain_methods(kind)
        if name not in _KEPT
    }
    return proxy_class(Handle, kind, _METHODS), methods


_kinds: Final = KindTable(_kind)
_is_lazy: Final = KindTable(is_lazy)
