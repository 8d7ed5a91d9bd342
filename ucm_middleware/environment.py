"""Configuration: which environment this process runs in, and settings that a context may overlay for itself.

The root holds a copy of the process environment and of the files, taken once. A context writes to an overlay of its
own; nothing here ever writes to ``os.environ``.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import NoReturn, Self, overload

from dotenv.parser import parse_stream

from ucm_middleware.errors import ConfigurationError, ContextIsolationError

ENVIRONMENT_VARIABLE = "UCM_ENVIRONMENT"
SECRET_VARIABLE = "UCM_SECRET"
PREVIOUS_SECRETS_VARIABLE = "UCM_SECRET_PREVIOUS"

_PROCESS_WIDE = (ENVIRONMENT_VARIABLE, SECRET_VARIABLE, PREVIOUS_SECRETS_VARIABLE)


class Environment(StrEnum):
    """Where the process runs. ``PRODUCTION`` is the default and the strict one."""

    PRODUCTION = "production"
    STAGING = "staging"
    DEVELOPMENT = "development"
    TESTING = "testing"


def process_environment() -> Environment:
    """What ``UCM_ENVIRONMENT`` of this process names, read anew at each call; production when it is unset or empty.

    Raises ``ConfigurationError`` for any other name: a misspelt ``producton`` must not pass for anything.
    """
    return _environment_named(os.environ.get(ENVIRONMENT_VARIABLE))


def _environment_named(name: str | None) -> Environment:
    if not name:
        return Environment.PRODUCTION
    try:
        return Environment(name)
    except ValueError:
        raise ConfigurationError(
            f"{ENVIRONMENT_VARIABLE} is {name[:40]!r}, which is no environment; "
            f"set it to one of {', '.join(Environment)}, or leave it unset for {Environment.PRODUCTION}"
        ) from None


class IsolatedEnvironment:
    """Settings by name: a root read once from files and the process environment, and overlays on top of it.

    ``files`` are UTF-8 ``.env`` files (one path or several); a later one wins over an earlier one, and the process
    environment wins over all. Values are literal: ``${NAME}`` is not expanded. ``environ`` stands in for
    ``os.environ``. Raises ``ConfigurationError``, naming the file, when one is missing, unreadable, not UTF-8 or
    malformed.

    The root is immutable. An overlay reads through to what it lies on and keeps its own writes to itself. Every method
    reads or writes each layer in one dictionary operation, so threads may share an instance without a lock; a read
    that meets a concurrent write sees the value from before or after it.
    """

    __slots__ = ("_environment", "_own", "_parent")

    _environment: Environment
    _own: dict[str, str | None]  # None hides the parent's value
    _parent: Self | None

    def __init__(self, files: str | Path | Iterable[str | Path] = (), environ: Mapping[str, str] | None = None) -> None:
        self._own = {}
        self._parent = None
        for file in (files,) if isinstance(files, str | Path) else files:
            self._own.update(_read_file(file))
        # The system's own names are taken as they are: Windows has some that begin with "=".
        self._own.update(os.environ if environ is None else _checked(environ))
        self._environment = _environment_named(self._own.get(ENVIRONMENT_VARIABLE))

    @property
    def environment(self) -> Environment:
        """What ``UCM_ENVIRONMENT`` named when the root was made, in the process environment or else in a file."""
        return self._environment

    @property
    def is_production(self) -> bool:
        return self._environment is Environment.PRODUCTION

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: str) -> str: ...
    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of ``name``, or ``default`` when it is not set. A name set to nothing has the value ``""``."""
        for layer in self._layers():
            try:
                value = layer._own[name]
            except KeyError:
                continue
            return default if value is None else value
        return default

    def require(self, name: str) -> str:
        """The value of ``name``. Raises ``ConfigurationError`` when it is not set, or set to nothing."""
        value = self.get(name)
        if not value:
            found = "not set" if value is None else "empty"
            raise ConfigurationError(f"{name} is {found}; set it in the process environment or in a settings file")
        return value

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def names(self) -> frozenset[str]:
        """Every name that has a value here."""
        names: set[str] = set()
        for layer in reversed(list(self._layers())):
            for name, value in layer._own.copy().items():
                if value is None:
                    names.discard(name)
                else:
                    names.add(name)
        return frozenset(names)

    def overlay(self, values: Mapping[str, str] | None = None) -> Self:
        """A new layer on top of this one, with ``values`` set in it. What is written to it is visible in it alone."""
        cls = type(self)
        child = cls.__new__(cls)
        child._own = {}
        child._parent = self
        child._environment = self._environment
        for name, value in (values or {}).items():
            child.set(name, value)
        return child

    def set(self, name: str, value: str) -> None:
        """Set ``name`` in this overlay.

        Raises ``ContextIsolationError`` on the root, and ``ConfigurationError`` for a name that is empty or contains
        ``=`` or NUL, for a value with NUL, and for ``UCM_ENVIRONMENT``, ``UCM_SECRET`` and ``UCM_SECRET_PREVIOUS``: no
        context may loosen the rules for itself.
        """
        self._writable(name)[_checked_name(name)] = _checked_value(name, value)

    def unset(self, name: str) -> None:
        """Hide ``name`` in this overlay, whether or not it has a value below. Raises as ``set`` does."""
        self._writable(name)[_checked_name(name)] = None

    def clear(self) -> None:
        """Forget what was written to this overlay: from here on it shows what it lies on. Raises on the root."""
        self._writable().clear()

    def _writable(self, name: str | None = None) -> dict[str, str | None]:
        if self._parent is None:
            raise ContextIsolationError(
                "the settings of the process are shared by every user and cannot be changed; "
                "change context.environment, or an overlay() of these"
            )
        if name in _PROCESS_WIDE:
            raise ConfigurationError(f"{name} holds for the whole process; set it there before the process starts")
        return self._own

    def _layers(self) -> Iterator[Self]:
        layer: Self | None = self
        while layer is not None:
            yield layer
            layer = layer._parent

    def __copy__(self) -> Self:
        """An overlay on the same parent, with the same writes so far. The root, being immutable, is its own copy."""
        return self if self._parent is None else self._copy_onto(self._parent)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """As ``copy``, and the overlays below are copied too: no later write to any of them reaches the result."""
        return self if self._parent is None else self._copy_onto(copy.deepcopy(self._parent, memo))

    def _copy_onto(self, parent: Self) -> Self:
        twin = parent.overlay()
        twin._own = self._own.copy()
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError("settings hold secrets and are not pickled; make an IsolatedEnvironment in the other process")

    def __repr__(self) -> str:
        own = f"{len(self._own)} names" if self._parent is None else f"overlay of {sorted(self._own)}"
        return f"<{type(self).__name__} {self._environment}: {own}>"


def _read_file(file: str | Path) -> dict[str, str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"settings file {file} cannot be read: {error.strerror}") from error
    except ValueError:  # bytes that are no UTF-8, or NUL in the path; the cause would carry the content of the file
        raise ConfigurationError(f"settings file {file} cannot be read: it is not UTF-8 text") from None
    values: dict[str, str] = {}
    # dotenv_values() would log a malformed line and go on without it; its parser says which line that is.
    for binding in parse_stream(StringIO(text)):
        source = binding.original.string
        line = binding.original.line + source[: len(source) - len(source.lstrip())].count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise ConfigurationError(f"settings file {file}, line {line}: expected NAME=value, with quotes closed")
        if binding.key is not None and binding.value is not None:
            try:
                values[_checked_name(binding.key)] = _checked_value(binding.key, binding.value)
            except ConfigurationError as error:
                raise ConfigurationError(f"settings file {file}, line {line}: {error}") from None
    return values


def _checked(values: Mapping[str, str]) -> dict[str, str]:
    return {_checked_name(name): _checked_value(name, value) for name, value in values.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name or "=" in name or "\0" in name:
        raise ConfigurationError("a setting has a name that is not one; use non-empty text without '=' and NUL")
    return name


def _checked_value(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigurationError(f"the value of {name!r} is not text without NUL; convert it to such text first")
    return value
