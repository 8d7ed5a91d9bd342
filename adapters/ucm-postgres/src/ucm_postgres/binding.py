"""Binding: what a transaction is told of its user, before anything else."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ucm_middleware import ConfigurationError, UnauthenticatedError, UserExecutionContext
from ucm_postgres.signing import sign

SETTING: Final = "app.user_id"
"""Where policies read the user by default."""

MAX_ROLE_BYTES: Final = 63
"""The longest name of a role, in bytes; PostgreSQL's NAMEDATALEN less one."""

_CUSTOM_SETTING: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True, slots=True)
class Binding:
    """How a transaction is tied to the user of a context.

    ``setting`` is the custom setting that the policies read: a dotted name, such as ``app.user_id``. ``role`` is the
    role that each transaction takes on (SET LOCAL ROLE), one for all users; ``role_of`` names one for each context
    instead. ``signed`` is the hardened mode: the value carries a MAC that the database checks (see ``signing``).

    Raises ConfigurationError for a setting that is no custom one, for a role that cannot be one, and for both of
    ``role`` and ``role_of``.
    """

    setting: str = SETTING
    role: str | None = None
    role_of: Callable[[UserExecutionContext], str] | None = None
    signed: bool = False

    def __post_init__(self) -> None:
        if not _CUSTOM_SETTING.fullmatch(self.setting):
            raise ConfigurationError(
                f"setting is {self.setting!r}, which is no custom setting of PostgreSQL; give two names of ASCII "
                f"letters, digits and underscores with a dot between them, such as {SETTING}"
            )
        if self.role is not None:
            if self.role_of is not None:
                raise ConfigurationError("role and role_of are both given; give one role for all, or one for each")
            _check_role(self.role, "role")

    @property
    def about(self) -> dict[str, object]:
        """What the records of each transaction say of how it is tied to its user. None stands for what is not so."""
        return {"bound_by": self.setting, "role": self.role, "signed": self.signed or None}

    def settings(self, context: UserExecutionContext) -> tuple[tuple[str, str], ...]:
        """The (name, value) pairs for ``set_config(name, value, true)`` at the beginning of a transaction.

        Nothing has been asked of the database by then. Give the values as parameters, never as part of the SQL. The
        role goes by the name ``role``.

        Raises UnauthenticatedError for an anonymous context, ContextClosedError for a closed one, and
        ConfigurationError for a role that cannot be one, and in the hardened mode for a context without a manager.
        """
        self.require_user(context)
        value = sign(context) if self.signed else context.user_id
        role = self.role_for(context)
        return ((self.setting, value),) if role is None else ((self.setting, value), ("role", role))

    def role_for(self, context: UserExecutionContext) -> str | None:
        """The role that the context's transactions take on, None for the login's own. Raises ConfigurationError."""
        return self.role if self.role_of is None else _check_role(self.role_of(context), "what role_of gives")

    def require_user(self, context: UserExecutionContext) -> None:
        """Raise as ``settings`` does for a context that is anonymous or closed: before a connection is waited for."""
        context.require_usable()
        if context.is_anonymous:
            raise UnauthenticatedError(
                "a transaction was begun in a context without a user; identify the user first, or ask the database "
                "over a connection of your own for what anonymous users may see"
            )


def _check_role(role: object, field: str) -> str:
    if not isinstance(role, str):
        raise ConfigurationError(f"{field} is {type(role).__name__}, which is no name of a role; give a str")
    # To PostgreSQL, the role named none is the way back to the login's own.
    if not role or role == "none" or "\0" in role or len(role.encode(errors="replace")) > MAX_ROLE_BYTES:
        raise ConfigurationError(
            f"{field} cannot be the name of a role: that has 1 to {MAX_ROLE_BYTES} bytes, no NUL, and is not none; "
            "name a role that the login is a member of"
        )
    return role
