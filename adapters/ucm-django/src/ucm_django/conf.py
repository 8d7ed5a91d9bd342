"""The settings of a project, all of which begin with ``UCM_``."""

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, cast

from django.conf import settings
from django.utils.module_loading import import_string

from ucm_middleware import ConfigurationError, UserContextManager
from ucm_postgres import Binding

Anonymous = Literal["refuse", "nobody"]
Reset = Literal["change", "begin"]

ENGINE: Final = "ucm_django.postgresql"
"""What stands under ``ENGINE`` of a database whose connections are tied to users."""


def binding() -> Binding:
    """``UCM_BINDING``: a ``ucm_postgres.Binding`` or its arguments as a mapping; the default binding without it."""
    given: Any = getattr(settings, "UCM_BINDING", None)
    if given is None:
        return Binding()
    if isinstance(given, Binding):
        return given
    if isinstance(given, Mapping):
        try:
            return Binding(**cast("Mapping[str, Any]", given))
        except TypeError as error:
            raise ConfigurationError(f"UCM_BINDING: {error}; give the arguments of ucm_postgres.Binding") from None
    raise ConfigurationError(
        f"UCM_BINDING is a {type(given).__name__}; give a ucm_postgres.Binding or a mapping of its arguments"
    )


def unbound_databases() -> frozenset[str]:
    """``UCM_UNBOUND_DATABASES``: the aliases whose connections are tied to nobody, such as the owner's for migrations.

    Raises ConfigurationError for what is no collection of aliases in ``DATABASES``.
    """
    given: Any = getattr(settings, "UCM_UNBOUND_DATABASES", ())
    if isinstance(given, str) or not isinstance(given, (list, tuple, set, frozenset)):
        raise ConfigurationError(
            f"UCM_UNBOUND_DATABASES is a {type(given).__name__}; give a list of aliases, such as ['owner']"
        )
    aliases = frozenset(map(str, cast("Collection[object]", given)))
    unknown = sorted(aliases - set(settings.DATABASES))
    if unknown:
        raise ConfigurationError(
            f"UCM_UNBOUND_DATABASES names {', '.join(unknown)}, which DATABASES has not; take it out, or correct it"
        )
    return aliases


def anonymous() -> Anonymous:
    """``UCM_ANONYMOUS``: "refuse" statements of contexts without a user, or run them as "nobody"."""
    given: Any = getattr(settings, "UCM_ANONYMOUS", "refuse")
    if given not in ("refuse", "nobody"):
        raise ConfigurationError(f"UCM_ANONYMOUS is {given!r}; give 'refuse' or 'nobody'")
    return "nobody" if given == "nobody" else "refuse"


def reset() -> Reset:
    """``UCM_RESET``: when a connection is brought back to a clean state.

    "change" is when it changes hands; "begin" is in each transaction, for a PgBouncer in transaction mode, where what
    is sent in between goes to somebody else's connection.
    """
    given: Any = getattr(settings, "UCM_RESET", "change")
    if given not in ("change", "begin"):
        raise ConfigurationError(f"UCM_RESET is {given!r}; give 'change' or 'begin'")
    return "begin" if given == "begin" else "change"


def manager() -> UserContextManager | None:
    """``UCM_MANAGER``: the manager of the project or the dotted path to it, such as "project.asgi.manager"; or None."""
    given: Any = getattr(settings, "UCM_MANAGER", None)
    if given is None or isinstance(given, UserContextManager):
        return given
    if isinstance(given, str):
        try:
            given = import_string(given)
        except ImportError as error:
            raise ConfigurationError(f"UCM_MANAGER: {error}; give the dotted path to the manager") from error
        if isinstance(given, UserContextManager):
            return given
    raise ConfigurationError(
        f"UCM_MANAGER is, or leads to, a {type(given).__name__}; give a UserContextManager or the dotted path to one"
    )
