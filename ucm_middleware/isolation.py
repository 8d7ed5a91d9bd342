"""Copying at the boundary: what an application hands to a context becomes that context's own.

``copy_data`` is the copy, ``Shared`` the marker for what two contexts hold in common on purpose. What is shared all the
same, because it was put there later or because a class copies as itself, is found by ``sharing.find_shared``.
"""

import copy
import datetime
import decimal
import fractions
import operator
import pathlib
import re
import types
import uuid
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, Generic, TypeVar, cast, final

from ucm_middleware.errors import InvalidContextError

T_co = TypeVar("T_co", covariant=True)
Memo = dict[int, Any]


@final
class Shared(Generic[T_co]):
    """Marks a value that contexts share on purpose: a pool, a cache with its own locking, a model.

    A copy of the data holds the very same marker, and the check for shared objects stops at it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    @property
    def value(self) -> T_co:
        """What is shared, itself and not a copy."""
        return self._value

    def __copy__(self) -> "Shared[T_co]":
        return self

    def __deepcopy__(self, memo: Memo) -> "Shared[T_co]":
        return self

    def __repr__(self) -> str:
        # The type only: the value may hold a credential, and a repr ends up in logs.
        return f"Shared({type_name(self._value)})"


# Values of exactly these types pass as they are: nobody can write to them, so two contexts may hold the same one.
# Subclasses do not, since their instances may have attributes.
SCALARS: Final[frozenset[type]] = frozenset(
    {
        *(str, int, float, bool, types.NoneType, bytes, complex, range, object, type),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, fractions.Fraction, uuid.UUID, re.Pattern, re.Match),
        *(pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
        *(types.EllipsisType, types.NotImplementedType, types.ModuleType, types.CodeType),
    }
)
# These belong to the process and are the same for everybody, as are all their subclasses.
SINGLETONS: Final = (type, types.ModuleType, Enum)

# The names of a context's own fields: data under them could be taken for the identity.
RESERVED_KEYS: Final = frozenset(
    {
        *("user_id", "thread_id", "run_id", "request_id", "websocket_client_id", "created_at", "operation_depth"),
        *("parent_request_id", "db_session"),
    }
)

COPIED_FOR: Final = 0
"""Where the memo of a copy has the user that the copy is for; no object has this id."""

ELEMENT: Final = "<element>"  # where an element of a set is in a path
_SHOWN_STEPS = 12
_SHOWN_KEY = 40
_SHOWN_BITS = 128
_SHOWN_TYPES = frozenset(map(id, (str, bytes, int, float, bool, types.NoneType)))
_type_of: Callable[[object], type[object]] = type
_name_of: Callable[[type], str] = vars(type)["__name__"].__get__
_REMEDY = "make it copyable, or wrap it in Shared(...) to share it on purpose"


class RefusedError(Exception):
    """On its way up from the value that cannot be copied; every container on the way adds the step that led down."""

    def __init__(self, rule: str, remedy: str = _REMEDY) -> None:
        super().__init__(rule)
        self.rule = rule
        self.remedy = remedy
        self.steps: list[str] = []


def copy_data(
    data: Mapping[str, object] | None,
    field: str,
    user_id: str | None = None,
    reserved: frozenset[str] = RESERVED_KEYS,
) -> dict[str, object]:
    """A copy of ``data`` that shares nothing mutable with it, except what is wrapped in ``Shared``.

    Objects that occur twice, and cycles, are kept: the copy has the shape of the original. Containers are copied here,
    all other objects by ``copy.deepcopy``, so by the rules of their class. ``field`` names the data in messages.
    Owned handles pass as they are into the data of ``user_id``, when that is their owner. ``reserved`` are keys that
    there may not be.

    Raises ``InvalidContextError``, whose ``field`` is the path of the value, for what is no mapping with ``str`` keys,
    for a reserved key, for nesting beyond the recursion limit, and for a value that cannot be copied: a lock, a
    connection, a function that closes over variables or has mutable defaults.
    """
    kind = _type_of(data)
    if data is None or (kind is dict and not data):
        return {}
    if kind is not dict:
        data = _plain_dict(data, field)
    for key in data:
        if type(key) is not str:
            data = _plain_dict(data, field)
            break
    if not reserved.isdisjoint(data):
        key = min(reserved.intersection(data))
        raise InvalidContextError(f"{field}[{key!r}]", "is reserved, it names a field of the context", "rename the key")
    try:
        return cast("dict[str, object]", _copy(data, {COPIED_FOR: user_id}))
    except RefusedError as refused:
        raise InvalidContextError(path_text(field, refused.steps[::-1]), refused.rule, refused.remedy) from None
    except RecursionError:
        raise InvalidContextError(
            field,
            "is nested deeper than the interpreter's recursion limit allows",
            "flatten it, or wrap the deep part in Shared(...) to share it on purpose",
        ) from None


def _plain_dict(data: object, field: str) -> dict[str, object]:
    """The same values under keys that are exactly ``str``: a member of a ``StrEnum`` may have attributes of its own."""
    if not isinstance(data, Mapping):
        raise InvalidContextError(field, f"must be a mapping, not {type_name(data)}", "give a dict with str keys")
    plain: dict[str, object] = {}
    try:
        pairs = list(cast("Mapping[object, object]", data).items())
    except Exception as error:  # noqa: BLE001 - a mapping of the application's own may raise anything
        raise InvalidContextError(field, f"cannot be read ({type_name(error)})", "give a dict with str keys") from None
    for key, value in pairs:
        if not isinstance(key, str):
            raise InvalidContextError(
                f"{field}[{key_text(key)}]", f"keys must be str, not {type_name(key)}", "give a dict with str keys"
            )
        plain[str.__str__(key)] = value
    return plain


def _copy(value: Any, memo: Memo) -> Any:
    """A copy of any value but a scalar. Dicts and lists are done here and not in functions of their own: calls cost."""
    place = id(value)
    if place in memo:
        return memo[place]
    kind = _type_of(value)
    item: Any = None
    if kind is dict:
        target = memo[place] = value.copy()
        key: Any = None
        try:
            for key, item in target.items():
                if type(key) is not str and type(key) not in SCALARS:
                    break
                if type(item) not in SCALARS:
                    target[key] = _copy(item, memo)  # an existing key: the dict keeps its size while it is iterated
            else:
                return target
        except Exception as error:  # noqa: BLE001 - from the copy hooks of a class, which may raise anything
            raise _located(error, item, f"[{key_text(key)}]") from None
        return _refill(target, value, memo)
    if kind is list:
        copies: list[Any] = []
        memo[place] = copies
        try:
            for item in tuple(value):  # so that it ends, even if a copy hook adds to the list
                copies.append(item if type(item) in SCALARS else _copy(item, memo))
        except Exception as error:  # noqa: BLE001 - as above
            raise _located(error, item, f"[{len(copies)}]") from None
        return copies
    return _COPIERS.get(kind, _copy_other)(value, memo)


def _copy_dict(source: Any, memo: Memo) -> Any:
    target = memo[id(source)] = source.copy()
    return _refill(target, source, memo)


def _refill(target: dict[Any, Any], source: dict[Any, Any], memo: Memo) -> dict[Any, Any]:
    """Builds a dict anew, in order: a copied key has another hash. What has been copied before is in the memo."""
    pairs = list(source.items())
    target.clear()
    for key, value in pairs:
        own_key, own_value = _copies((key, value), memo, f"[{key_text(key)}]")
        target[own_key] = own_value
    return target


def _copy_default_dict(source: defaultdict[Any, Any], memo: Memo) -> defaultdict[Any, Any]:
    target = memo[id(source)] = source.copy()
    target.default_factory = _copies((source.default_factory,), memo, ".default_factory")[0]
    _refill(target, source, memo)
    return target


def _copy_deque(source: deque[Any], memo: Memo) -> deque[Any]:
    target = memo[id(source)] = deque[Any](maxlen=source.maxlen)
    target.extend(_copies(source, memo))
    return target


def _copy_bytearray(source: bytearray, memo: Memo) -> bytearray:
    target = memo[id(source)] = source.copy()
    return target


def _copy_set(source: set[Any], memo: Memo) -> set[Any]:
    target = memo[id(source)] = source.copy()
    if not SCALARS.issuperset(map(type, source)):
        target.clear()
        target.update(_copies(source, memo, ELEMENT))
    return target


def _copy_fixed(source: Any, memo: Memo) -> object:
    """A tuple or a frozenset: itself when nothing in it has to be copied."""
    if SCALARS.issuperset(map(type, source)):
        return source
    copies = _copies(source, memo, ELEMENT if _type_of(source) is frozenset else "")
    if all(map(operator.is_, source, copies)):
        return source
    # In the memo already when it is part of a cycle, which then came upon it a second time and finished it there.
    return memo.setdefault(id(source), type(source)(copies))


def _copies(values: Iterable[Any], memo: Memo, step: str = "") -> list[Any]:
    """A copy of each value. ``step`` is their place in the path of a refused one, their index when it is empty."""
    copies: list[Any] = []
    value: Any = None
    try:
        for value in tuple(values):
            copies.append(value if type(value) in SCALARS else _copy(value, memo))
    except Exception as error:  # noqa: BLE001 - from the copy hooks of a class, which may raise anything
        raise _located(error, value, step or f"[{len(copies)}]") from None
    return copies


def _copy_function(source: types.FunctionType, memo: Memo) -> object:
    if source.__closure__:
        raise RefusedError(
            "is a function that closes over variables, which a copy would share",
            "pass a function without a closure, or wrap it in Shared(...) to share it on purpose",
        )
    defaults = (*(source.__defaults__ or ()), *(source.__kwdefaults__ or {}).values())
    if any(type(value) not in SCALARS and _copy(value, memo) is not value for value in defaults):
        raise RefusedError(
            "is a function with mutable defaults, which a copy would share",
            "make the defaults None, or wrap it in Shared(...) to share it on purpose",
        )
    return source


def _copy_builtin(source: types.BuiltinFunctionType, memo: Memo) -> object:
    """``len`` is itself, ``[].append`` becomes the method of a copy, as ``deepcopy`` has it for methods of classes."""
    copied = _copy(source.__self__, memo)
    return source if copied is source.__self__ else getattr(copied, source.__name__)


def _copy_other(source: object, memo: Memo) -> object:
    return source if issubclass(type(source), SINGLETONS) else copy.deepcopy(source, memo)


_COPIERS: Final[dict[type, Callable[[Any, Memo], object]]] = {
    OrderedDict: _copy_dict,
    defaultdict: _copy_default_dict,
    deque: _copy_deque,
    set: _copy_set,
    bytearray: _copy_bytearray,
    tuple: _copy_fixed,
    frozenset: _copy_fixed,
    types.FunctionType: _copy_function,
    types.BuiltinFunctionType: _copy_builtin,
}


def _located(error: Exception, value: object, step: str) -> Exception:
    """``error`` as a refusal of ``value``, with the step to it; the recursion limit's error stays what it is."""
    if isinstance(error, RecursionError):
        return error
    if not isinstance(error, RefusedError):
        error = RefusedError(f"{type_name(value)} cannot be copied ({type_name(error)})")
    error.steps.append(step)
    return error


def type_name(value: object) -> str:
    """The name of the type of ``value``, without asking the value or its class, which may lie or raise."""
    return _name_of(_type_of(value))


def key_text(key: object) -> str:
    """A key as it is shown in a path: cut to 40 characters, and without running a ``__repr__`` of the application's."""
    if id(type(key)) not in _SHOWN_TYPES or (isinstance(key, int) and key.bit_length() > _SHOWN_BITS):
        return f"<{type_name(key)}>"
    text = repr(key)
    return text if len(text) <= _SHOWN_KEY else f"{text[: _SHOWN_KEY - 3]}..."


def path_text(start: str, steps: Sequence[str]) -> str:
    """``start`` and the steps from it, the middle left out when they are very many."""
    if len(steps) > _SHOWN_STEPS:
        half = _SHOWN_STEPS // 2
        steps = [*steps[:half], " ... ", *steps[-half:]]
    return start + "".join(steps)
