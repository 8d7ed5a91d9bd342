"""What every pool checks in the same way, and how it says so."""

from typing import Final, Literal, get_args

from ucm_middleware import ConfigurationError, IsolationLevel
from ucm_postgres.binding import Binding

ResetMode = Literal["return", "begin"]
"""When connections are brought back to a clean state: as they go back to the pool, or as each transaction begins."""

LEVELS: Final[tuple[str, ...]] = get_args(IsolationLevel)

# invalid_parameter_value, undefined_object, insufficient_privilege: what SET ROLE is refused with.
_ROLE_REFUSED: Final = frozenset({"22023", "42704", "42501"})


def checked_reset(reset: object, pool: object, remedy: str) -> ResetMode:
    """The mode. Raises ConfigurationError for another word, and for a pool that resets nothing when it should."""
    if reset not in ("return", "begin"):
        raise ConfigurationError(f"reset is {reset!r}; give 'return', or 'begin' behind PgBouncer in transaction mode")
    if reset == "return" and getattr(pool, "_reset", None) is None:
        raise ConfigurationError(
            "the pool resets no connection as it comes back: SET, SET ROLE and temporary tables would reach the next "
            f"borrower; make it with {remedy}, or, behind PgBouncer in transaction mode, give reset='begin'"
        )
    return reset


def check_isolation_level(level: object) -> None:
    """Raise ConfigurationError unless it is a level, or None for the database's own."""
    if level is not None and level not in LEVELS:
        raise ConfigurationError(f"isolation_level is {level!r}; give one of {', '.join(LEVELS)}, or None")


def check_savepoint_level(level: object, outer: object) -> None:
    """Raise ConfigurationError when a block inside of a transaction asks for another level than that has."""
    if level is not None and level != outer:
        raise ConfigurationError(
            f"isolation_level is {level!r} for a block inside of a transaction, which is a savepoint and has the level "
            "of that; give it to the outermost block"
        )


def role_error(binding: Binding, error: BaseException) -> ConfigurationError | None:
    """What to say when it was for the role that a transaction could not begin; None when it was not."""
    if (binding.role is None and binding.role_of is None) or getattr(error, "sqlstate", None) not in _ROLE_REFUSED:
        return None
    role = "the role that role_of gives" if binding.role is None else f"the role {binding.role}"
    return ConfigurationError(
        f"the login cannot take on {role}: {error}; create it and grant it to the login, with "
        "GRANT role TO login WITH SET TRUE, INHERIT FALSE"
    )
