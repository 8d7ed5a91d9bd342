"""Which context a connection is used for, and whether the running code may use it."""

import weakref
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection

from ucm_middleware import (
    ContextNotFoundError,
    CrossUserAccessError,
    UnauthenticatedError,
    UserExecutionContext,
    current_context,
)

LEASE: Final = "ucm_lease"
"""The execution option under which a session of the adapter's carries its lease."""


class Lease:
    """What a session lets the engine know, whose it is, and the engine the teardown, what its connection is.

    Weakly, since both refer to it.
    """

    __slots__ = ("_connection", "_owner", "has_committed")

    def __init__(self, owner: UserExecutionContext) -> None:
        self._owner = weakref.ref(owner)
        self._connection: weakref.ref[Connection] | None = None
        self.has_committed = False
        """Whether a transaction of the session's was committed."""

    @property
    def owner(self) -> UserExecutionContext | None:
        """The context; None when it is gone."""
        return self._owner()

    @property
    def connection(self) -> Connection | None:
        """The connection that the session began on last, while there is one."""
        return None if self._connection is None else self._connection()

    def take(self, connection: Connection) -> None:
        """A transaction begins on this one."""
        self._connection = weakref.ref(connection)


def running_context() -> UserExecutionContext | None:
    """The context that the code runs in, or None. Raises ContextClosedError in code that outlived its own."""
    try:
        return current_context()
    except ContextNotFoundError:
        return None


def require_user(context: UserExecutionContext) -> UserExecutionContext:
    """The same context. Raises UnauthenticatedError for an anonymous one, ContextClosedError for a closed one."""
    context.require_usable()
    if context.is_anonymous:
        raise UnauthenticatedError(
            "the database was asked in a context without a user; identify the user first, or ask over an engine of "
            "your own for what anonymous users may see"
        )
    return context


def owner_of(options: Mapping[str, Any], database: str) -> UserExecutionContext:
    """The context that a transaction begins for: the session's own, else the one that the code runs in.

    Raises ContextNotFoundError where there is neither, UnauthenticatedError for an anonymous one, ContextClosedError
    for a closed one, and CrossUserAccessError, recorded, for another user's session.
    """
    lease: Lease | None = options.get(LEASE)
    owner = None if lease is None else lease.owner
    if owner is not None:
        require_access(owner, f"transaction on {database}")
        return require_user(owner)
    context = running_context()
    if context is None or lease is not None:
        raise ContextNotFoundError(
            f"a transaction on the database {database!r} was begun outside of a user's context; begin it in a request "
            "behind UserContextMiddleware or in managed_user_context(), or give migrations and other work for no user "
            "an engine of their own"
        )
    return require_user(context)


def require_access(owner: UserExecutionContext, action: str) -> None:
    """Raise unless the running code may go on with what was begun for ``owner``.

    CrossUserAccessError, recorded, in another user's context; ContextClosedError in code that outlived its own. Code
    in no context has been given the session, and that is its permission as long as the owner is open.
    """
    context = running_context()
    if context is owner:
        return
    if context is None:
        owner.require_usable()
    elif context.user_id != owner.user_id:
        host = owner.host or context.host
        if host is None:
            raise CrossUserAccessError(f"{action}: this code runs in another user's context")
        host.require_owner(owner.user_id, action)
        owner.require_usable()


def require_same_user(context: UserExecutionContext, user_id: str, action: str) -> None:
    """Raise CrossUserAccessError, recorded, where the context is not of this user, whose the database is."""
    if context.user_id != user_id:
        if context.host is not None:
            context.host.require_owner(user_id, action)
        raise CrossUserAccessError(f"{action}: it is another user's, and begins in that user's context alone")
