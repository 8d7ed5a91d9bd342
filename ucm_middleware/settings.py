"""What a manager or a middleware is given, checked before anything is made of it."""

import sys

from ucm_middleware.audit.ledger import DurableLedger, Ledger
from ucm_middleware.errors import ConfigurationError, InvalidContextError
from ucm_middleware.expiry import LONGEST_TTL, checked_ttl


def require_kind(name: str, given: object, kind: type, example: str) -> None:
    """Raise ConfigurationError for what is neither None nor an object of the kind.

    A class is none, though it has the methods of a port. What was given is not shown: it may be a secret.
    """
    if isinstance(given, type):
        found = f"the class {given.__name__} itself"
    elif given is None or isinstance(given, kind):
        return
    else:
        found = type(given).__name__
    raise ConfigurationError(f"{name} is no {kind.__name__} but {found}; give one, such as {example}")


def require_function(name: str, given: object, example: str) -> None:
    """Raise ConfigurationError for what cannot be called."""
    if not callable(given):
        raise ConfigurationError(f"{name} is no function but {type(given).__name__}; give one, such as {example}")


def checked_life(ttl: object) -> float | None:
    """The ``ttl`` that contexts have where none is given. Raises ConfigurationError for what is no sensible one."""
    try:
        return checked_ttl(ttl)
    except InvalidContextError as error:
        raise ConfigurationError(f"ttl {error.rule}; {error.remedy}") from None


def check_audit(audit: object, ledger: Ledger | None) -> None:
    """Raise ConfigurationError for another mode, and for one that does not go with this ledger."""
    if audit not in ("strict", "async", "off"):
        raise ConfigurationError(f"audit must be 'strict', 'async' or 'off', not {audit!r}")
    if audit == "off" and ledger is not None:
        raise ConfigurationError("audit is 'off', and a ledger is given; leave one of the two out")
    if audit == "strict" and not isinstance(ledger, DurableLedger):
        raise ConfigurationError(
            "audit is 'strict', which needs a ledger that keeps records for good: "
            "ledger=SQLiteLedger('audit.db', keys='audit-keys.db')"
        )


def checked_guard(guard: object) -> str:
    """The word as it was given. Raises ConfigurationError for another one."""
    if guard not in ("closed", "open"):
        raise ConfigurationError(f"guard must be 'closed' or 'open', not {guard!r}")
    return str(guard)


def require_gil() -> None:
    """Raise ConfigurationError on an interpreter that runs without."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ConfigurationError(
            "this interpreter runs without the GIL, on which the table of live contexts relies; "
            "start it with PYTHON_GIL=1, or use a build that has it"
        )


def checked_limit(name: str, limit: object, default: int) -> int:
    """The limit, or the default for None. Raises ConfigurationError for what is no whole number of at least 1."""
    if limit is None:
        return default
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {limit!r}")
    return limit


def checked_connections(connections: int | None, contexts: int) -> int:
    """How many of a user's contexts may be connections: four fifths for None. Raises ConfigurationError likewise, and
    for more than there may be contexts.
    """
    limit = checked_limit("max_connections_per_user", connections, max(1, contexts * 4 // 5))
    if limit > contexts:
        raise ConfigurationError(
            f"max_connections_per_user is {limit}, and a user may have {contexts} contexts in all, each connection one "
            "of them; raise max_contexts_per_user too"
        )
    return limit


def checked_drain_timeout(timeout: object) -> float:
    """Seconds as a float. Raises ConfigurationError for what is no finite number of at least 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout <= LONGEST_TTL:
        raise ConfigurationError(f"drain_timeout must be a number of seconds of at least 0, not {timeout!r}")
    return float(timeout)
