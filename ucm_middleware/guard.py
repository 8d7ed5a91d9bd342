"""The one place that decides who may touch whose contexts."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from enum import Enum
from typing import Final, Literal

from ucm_middleware.ambient import Grant, ambient_grant, enter, leave
from ucm_middleware.audit.records import AskedFor, UserMention
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.dispatch import Hooks
from ucm_middleware.errors import CrossUserAccessError, InvalidContextError
from ucm_middleware.ids import validate_id


class Everyone(Enum):
    EVERYONE = "everyone"


EVERYONE: Final = Everyone.EVERYONE
"""Stands for all users in ``manager.privileged(users=EVERYONE)``."""


class Guard:
    """Decides by the context that the asking code runs in.

    Code in a user's context may touch what is that user's. Code in no context is trusted, until the manager serves a
    middleware: then it must say what it is for, in a ``privileged`` block. A guard made open goes on trusting it.
    """

    __slots__ = ("_hooks", "_is_open", "_serving", "_trail")

    def __init__(self, trail: AuditTrail, hooks: Hooks, *, is_open: bool) -> None:
        self._trail = trail
        self._hooks = hooks
        self._is_open = is_open
        self._serving = False

    def serve(self) -> None:
        """Trust code in no context no longer: from now on the manager serves a middleware."""
        self._serving = True

    def admits(self, user_id: str | None) -> bool:
        """Whether the asking code may touch this user's contexts; None stands for all users at once.

        Raises ContextClosedError for code that outlived its own context.
        """
        context = self.acting()
        if context is not None and context.user_id == user_id:
            return True
        return self.is_granted(user_id) or (context is None and (self._is_open or not self._serving))

    def is_granted(self, user_id: str | None) -> bool:
        """Whether the asking code runs in a ``privileged`` block of this guard that names the user."""
        grant = self._grant()
        return grant is not None and grant.covers(user_id)

    def _grant(self) -> Grant | None:
        grant = ambient_grant()
        return grant if grant is not None and grant.guard is self else None

    def acting_user(self) -> str | None:
        """The user that the asking code runs for; None for code in no context. Raises ContextClosedError as above."""
        context = self.acting()
        return None if context is None else context.user_id

    def acting(self) -> UserExecutionContext | None:
        """The context that the asking code runs in, if it proves anything here. Raises ContextClosedError as above."""
        context = ambient_context()
        if context is None:
            return None
        context.require_usable()
        host = context.host
        if self._serving and not self._is_open and (host is None or host.guard is not self):
            return None  # made by hand, or another manager's: it proves nothing here
        return context

    def require(self, user_id: str, action: str, asked: AskedFor | None = None) -> None:
        """Raise CrossUserAccessError, and record it, unless the asking code may touch this user's contexts.

        ``asked`` is what was asked for, if that is more than the user.
        """
        if not self.admits(user_id):
            raise self.denied(action, asked or UserMention(user_id))

    def require_everyone(self, action: str) -> None:
        """The same for what concerns all users at once."""
        if not self.admits(None):
            raise self.denied(action, "everyone")

    def visible_users(self, action: str) -> frozenset[str] | None:
        """Whose contexts a listing shows to the asking code: its own user's, and those it is granted; None for all.

        Raises CrossUserAccessError, and records it, for code that runs neither in a context nor under a grant.
        """
        if self.admits(None):
            return None
        context, grant = self.acting(), self._grant()
        if context is None and grant is None:
            raise self.denied(action, "everyone")
        users = set(() if grant is None else grant.users or ())
        return frozenset(users if context is None else {*users, context.user_id})

    def require_unbound(self, context: UserExecutionContext) -> None:
        """Raise CrossUserAccessError unless the asking code may give this anonymous context its user."""
        ambient = ambient_context()
        if ambient is not None and ambient is not context and not self.admits(context.user_id):
            raise self.denied("bind", UserMention(context.user_id))

    @contextmanager
    def privileged(self, reason: str, users: Collection[str] | Literal[Everyone.EVERYONE]) -> Generator[Grant]:
        """Record, then grant, access to the contexts of the users named, until the block ends."""
        if not reason.strip():
            raise InvalidContextError("reason", "is empty", "say what the access is for; it goes into the audit trail")
        if isinstance(users, str):
            raise InvalidContextError("users", "is text, not a collection of ids", "give a list, such as ['alice']")
        named = None if users is EVERYONE else frozenset(validate_id(user, "users") for user in users)
        context = ambient_context()
        self._trail.privileged(context, reason, None if named is None else sorted(named))
        self._trail.settle()
        grant = Grant(self, reason, named, context)
        token = enter(grant)
        try:
            yield grant
        finally:
            grant.end()
            leave(token)

    def denied(self, action: str, asked_for: AskedFor) -> CrossUserAccessError:
        """Record a denial. Returns the error to raise, which is the same for what is foreign and what is missing.

        Of what was asked for, users are given as a ``UserMention``.
        """
        actor = self.acting()
        self._trail.denied(actor, action, asked_for)
        self._hooks.access_denied(None if actor is None else actor.user_id, action)
        if actor is None:
            return CrossUserAccessError(
                f"{action}: this code runs in no user's context; enter one, or wrap the access in "
                "manager.privileged(reason=..., users=[...])"
            )
        return CrossUserAccessError(
            f"{action}: what was asked for does not belong to the user that this code runs for; "
            "if it must cross users, wrap it in manager.privileged(reason=..., users=[...])"
        )
