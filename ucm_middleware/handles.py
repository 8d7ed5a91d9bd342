"""Owned handles: stand-ins for what a context gives out, that work for its user, until it closes.

``isinstance`` takes a handle for its target, and so do the frameworks that ask it. Every use is checked: attributes,
calls, special methods, each step of what is lazy. What comes out of a use is

- the target itself: its handle;
- a method, an awaitable, an iterator, a context manager or another callable: owned like the handle it came from;
- what a context manager gives on entering: likewise, unless it is plain data;
- anything else: as it is.
"""

import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast, final

from ucm_middleware.current import ambient
from ucm_middleware.errors import ContextClosedError, InvalidContextError
from ucm_middleware.isolation import COPIED_FOR, SCALARS, Memo, RefusedError
from ucm_middleware.ownership import Ownership
from ucm_middleware.proxies import FORWARDED, KindTable, is_lazy, proxy_class

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext

T = TypeVar("T")

_DATA: Final = SCALARS | {list, dict, tuple, set, frozenset, bytearray}
_UNOWNED: Final[tuple[type, ...]] = (type, types.ModuleType)
_DESCRIPTORS: Final = frozenset({types.MethodDescriptorType, types.WrapperDescriptorType})
_BUILTIN_METHODS: Final = frozenset({types.BuiltinMethodType, types.MethodWrapperType})


def own(owner: "UserExecutionContext", target: T, name: str | None) -> T:
    """See ``UserExecutionContext.own``."""
    kind = type(target)
    if kind in _DATA or issubclass(kind, _UNOWNED):
        raise InvalidContextError("target", "is plain data, a class or a module", "give it out as it is")
    if issubclass(kind, (Handle, OwnedMethod, OwnedCoroutine)):
        raise InvalidContextError("target", "is owned already", "own what the handle was made for, or pass the handle")
    ownership = Ownership(owner, name or kind.__name__)
    handles = owner._handles
    if handles is not None:
        handles[id(ownership)] = ownership
    return cast("T", _handle(ownership, target, None))


def revoke_handle(handle: object) -> None:
    """Refuse every use of a handle from now on, and of all that came out of it; a call under way is not stopped.

    From any thread, and as often as one likes. Raises CrossUserAccessError in another user's context, and
    InvalidContextError for what is no handle from ``context.own``.
    """
    if not issubclass(type(handle), Handle):
        raise InvalidContextError("handle", f"is a {type(handle).__name__}, not owned", "give what context.own() gave")
    ownership = _ownership_of(handle)
    ownership.require_user()
    ownership.revoke()


def _refuse_copy(self: object, *_: object) -> NoReturn:
    raise TypeError("an owned handle is not copied or pickled: it belongs to one context of one process; pass it as is")


class Handle:
    """The base of all proxy classes. All that is looked up on an instance is the target's, but for ``_KEPT``."""

    __slots__ = ("__kind", "__ownership", "__parent", "__weakref__")

    # Not declared by name: nothing of a handle can be read through the handle.

    def __getattribute__(self, name: str) -> Any:
        if name in _KEPT:
            return object.__getattribute__(self, name)
        target = use(self)
        try:
            value = getattr(target, name)
        except AttributeError:
            if name == "__signature__" and callable(target):
                return _signature_of(target)
            raise
        kind = type(value)
        if kind is types.MethodType and value.__self__ is target:
            return OwnedMethod(self, value.__func__)
        if kind in _DATA:
            return value
        if kind in _BUILTIN_METHODS and value.__self__ is target:
            function = getattr(type(target), name, None)
            if type(function) in _DESCRIPTORS:
                return OwnedMethod(self, function)
        return give(self, value)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(use(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(use(self), name)

    # What is asked of every object is answered without a check, and tells nothing about the target but its type.

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return _kind_of(self)

    def __dir__(self) -> list[str]:
        return dir(_kind_of(self))

    def __repr__(self) -> str:
        ownership = _ownership_of(self)
        return f"<owned {_kind_of(self).__name__} of {ownership.owner.request_id} {ownership.state}>"

    def __str__(self) -> str:
        return Handle.__repr__(self)

    def __format__(self, spec: str) -> str:
        return format(Handle.__repr__(self), spec)

    __copy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse_copy

    def __deepcopy__(self, memo: Memo) -> "Handle":
        _require_own_data(self, memo)
        return self

    def __del__(self) -> None:
        _ownership_of(self).forget(id(self))


def _require_own_data(handle: Handle, memo: Memo) -> None:
    """Refuse a copy, except the one at the boundary of a context of the same user: there the handle passes as it is."""
    if COPIED_FOR not in memo:
        _refuse_copy(handle)
    if memo[COPIED_FOR] != _ownership_of(handle).owner.user_id:
        raise RefusedError(
            "is an owned handle, and not of the user that the data is for",
            "let that user's own context own() the object",
        )


def _signature_of(target: Callable[..., object]) -> inspect.Signature:
    """Asked for because the class of the handle has a ``__call__`` that takes anything."""
    try:
        return inspect.signature(target)
    except ValueError as error:
        raise AttributeError("__signature__") from error


# Read with the descriptors, since all other ways lead to the target.
_ownership_of: Final[Callable[[Any], Ownership]] = vars(Handle)["_Handle__ownership"].__get__
_parent_of: Final[Callable[[Any], Handle | None]] = vars(Handle)["_Handle__parent"].__get__
_kind_of: Final[Callable[[Any], type]] = vars(Handle)["_Handle__kind"].__get__
_set_ownership: Final[Callable[[Handle, Ownership], None]] = vars(Handle)["_Handle__ownership"].__set__
_set_parent: Final[Callable[[Handle, Handle | None], None]] = vars(Handle)["_Handle__parent"].__set__
_set_kind: Final[Callable[[Handle, type], None]] = vars(Handle)["_Handle__kind"].__set__


def ownership_of(owned: "Handle | OwnedMethod | OwnedCoroutine") -> Ownership:
    """What decides over a handle, or over a method or coroutine of one."""
    return _ownership_of(owned._handle if isinstance(owned, (OwnedMethod, OwnedCoroutine)) else owned)


def use(handle: object) -> Any:
    """The target, for one use of it by the asking code. Raises what ``Ownership.require`` raises."""
    ownership = _ownership_of(handle)
    if ambient.get() is not ownership.insider or not ownership.lifetime.permits_use:
        ownership.require()
    try:
        return ownership.targets[id(handle)]
    except KeyError:
        raise ownership.closed_error() from None


def give(handle: Handle, value: Any, *, entered: bool = False) -> Any:
    """What comes out of a use of the handle, as it may be given out; see the module. ``entered``: by a ``with``."""
    kind = type(value)
    if kind in _DATA:
        return value
    targets = _ownership_of(handle).targets
    node: Handle | None = handle
    while node is not None:
        if targets.get(id(node)) is value:
            return node
        node = _parent_of(node)
    if kind is types.CoroutineType:
        return OwnedCoroutine(handle, value)
    if issubclass(kind, _UNOWNED) or not (entered or _kinds[kind]):
        return value
    return _handle(_ownership_of(handle), value, handle)


def _handle(ownership: Ownership, target: object, parent: Handle | None) -> Handle:
    kind = type(target)
    handle: Handle = object.__new__(_classes[kind])
    _set_ownership(handle, ownership)
    _set_kind(handle, kind)
    _set_parent(handle, parent)
    ownership.keep(id(handle), target)
    return handle


@final
class OwnedMethod:
    """A method of a handle's target, bound to the handle: checked when it is called, whoever holds it by then."""

    __slots__ = ("_function", "_handle", "__weakref__")

    def __init__(self, handle: Handle, function: Callable[..., Any]) -> None:
        self._handle = handle
        self._function = function

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        handle = self._handle
        try:
            value = self._function(use(handle), *args, **kwargs)
        except StopIteration as stop:  # what a step of a coroutine or generator returns in the end
            raise StopIteration(give(handle, stop.value)) from None
        return value if type(value) in _DATA else give(handle, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return types.BuiltinMethodType if type(self._function) in _DESCRIPTORS else types.MethodType

    @property
    def __self__(self) -> Handle:
        return self._handle

    @property
    def __func__(self) -> Callable[..., Any]:
        return self._function

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._function.__doc__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)  # the name, the code, the annotations: what signatures are made of

    def __eq__(self, other: object) -> bool:
        if type(other) is not OwnedMethod:
            return NotImplemented
        return self._handle is other._handle and self._function == other._function

    def __hash__(self) -> int:
        return hash((id(self._handle), self._function))

    def __repr__(self) -> str:
        return f"<method {getattr(self._function, '__name__', '?')} of {self._handle!r}>"

    __copy__ = __reduce__ = __reduce_ex__ = _refuse_copy

    def __deepcopy__(self, memo: Memo) -> "OwnedMethod":
        _require_own_data(self._handle, memo)
        return self


@final
class OwnedCoroutine(Coroutine[Any, Any, Any]):
    """A coroutine that a method of the target made: checked again when it is first awaited, in whichever task."""

    __slots__ = ("_coroutine", "_handle", "_steps", "__weakref__")

    def __init__(self, handle: Handle, coroutine: "types.CoroutineType[Any, Any, Any]") -> None:
        self._handle = handle
        self._coroutine = coroutine
        self._steps: Generator[Any, Any, Any] | None = None

    def __await__(self) -> Generator[Any, Any, Any]:
        return _steps(self._handle, self._coroutine)

    def send(self, value: Any, /) -> Any:
        if self._steps is None:
            self._steps = _steps(self._handle, self._coroutine)
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        return (self._coroutine if self._steps is None else self._steps).throw(*error)

    def close(self) -> None:
        (self._coroutine if self._steps is None else self._steps).close()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return types.CoroutineType

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # the cr_... attributes, by which asyncio and inspect describe it

    def __repr__(self) -> str:
        return f"<coroutine {self._coroutine.__qualname__} of {self._handle!r}>"

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse_copy


def _steps(handle: Handle, coroutine: "types.CoroutineType[Any, Any, Any]") -> Generator[Any, Any, Any]:
    try:
        use(handle)
    except BaseException:
        coroutine.close()  # so that nothing complains of a coroutine never awaited
        raise
    return give(handle, (yield from coroutine.__await__()))


# The special methods. A proxy class has those that the type of its target has.


def _forwarder(name: str) -> Callable[..., Any]:
    entered = name == "__enter__"

    def special(self: Handle, /, *args: Any, **kwargs: Any) -> Any:
        target = use(self)
        try:
            value = getattr(type(target), name)(target, *args, **kwargs)
        except StopIteration as stop:
            raise StopIteration(give(self, stop.value)) from None
        return value if type(value) in _DATA else give(self, value, entered=entered)

    special.__name__ = special.__qualname__ = name
    return special


def _await(self: Handle) -> Generator[Any, Any, Any]:
    target = use(self)
    return give(self, (yield from type(target).__await__(target)))


async def _anext(self: Handle) -> Any:
    target = use(self)
    return give(self, await type(target).__anext__(target))


async def _aenter(self: Handle) -> Any:
    target = use(self)
    return give(self, await type(target).__aenter__(target), entered=True)


def _exit(self: Handle, *exc_info: Any) -> Any:
    target, late = _use_for_exit(self)
    if late is None or exc_info[0] is not None:
        return type(target).__exit__(target, *exc_info)
    type(target).__exit__(target, type(late), late, late.__traceback__)
    raise late


async def _aexit(self: Handle, *exc_info: Any) -> Any:
    target, late = _use_for_exit(self)
    if late is None or exc_info[0] is not None:
        return await type(target).__aexit__(target, *exc_info)
    await type(target).__aexit__(target, type(late), late, late.__traceback__)
    raise late


def _use_for_exit(handle: Handle) -> tuple[Any, ContextClosedError | None]:
    """A block that was entered can be left while the context closes, or else what it holds would stay taken: but its
    exit sees an error then, since an exit without one is how a transaction is told to commit.
    """
    ownership = _ownership_of(handle)
    try:
        return use(handle), None
    except ContextClosedError as late:
        ownership.require_user()
        if (target := ownership.targets.get(id(handle))) is None:
            raise
        return target, late


_METHODS: Final[dict[str, Any]] = {
    **{name: _forwarder(name) for name in FORWARDED},
    **{"__await__": _await, "__anext__": _anext, "__aenter__": _aenter, "__exit__": _exit, "__aexit__": _aexit},
}
_KEPT: Final = frozenset(_METHODS) | {
    name
    for name in vars(Handle)
    if not name.startswith("_Handle") and name not in ("__doc__", "__module__", "__slots__")
}
_classes: Final = KindTable(lambda kind: cast("type[Handle]", proxy_class(Handle, kind, _METHODS)))
_kinds: Final = KindTable(lambda kind: is_lazy(kind) and not issubclass(kind, (Handle, OwnedMethod, OwnedCoroutine)))
