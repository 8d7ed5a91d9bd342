"""Who owns what is stored: the user of the context that the code runs in, under keys that no other user has."""

import asyncio
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from ucm_middleware import CrossUserAccessError, UserExecutionContext, current_context

_USER: Final = "adk_user"
_APP: Final = "adk_app"
_SESSION: Final = "adk_session"
_ALL: Final = "all"


@dataclass(slots=True, eq=False)
class Owner:
    """The user of one context, by the names that ADK's services know them by.

    There is a name under each secret, the current one's first; one, except during a rotation. A name is 54 characters
    of ``a-z``, ``0-9`` and ``_``: no store folds two of them into one, and none can be mistaken for a path.
    """

    user_id: str
    users: tuple[str, ...]
    _apps: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    _sessions: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def user(self) -> str:
        """The name to store under."""
        return self.users[0]

    def apps(self, context: UserExecutionContext, app_name: str) -> tuple[str, ...]:
        """The names of an app of this user's own."""
        found = self._apps.get(app_name)
        if found is None:
            found = self._apps[app_name] = context.candidate_keys(_APP, app_name)
        return found

    def sessions(self, context: UserExecutionContext, session_id: str) -> tuple[str, ...]:
        """The names of what the client calls its session. Raises InvalidContextError for a bad id."""
        found = self._sessions.get(session_id)
        if found is None:
            found = self._sessions[session_id] = context.candidate_keys(_SESSION, session_id)
        return found

    def check_session(self, context: UserExecutionContext, session_id: str, found: str, user: str) -> None:
        """Raise CrossUserAccessError, recorded, unless a session that was loaded is this user's and this one."""
        if found in self.sessions(context, session_id) and user in self.users:
            return
        context.check_key(_SESSION, session_id, found)
        context.check_key(_USER, _ALL, user)


class Owners:
    """The owners that contexts stand for, worked out once for each."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[UserExecutionContext, Owner] = WeakKeyDictionary()

    def current(self, user_id: str | None, action: str) -> tuple[UserExecutionContext, Owner]:
        """The context that the code runs in, and its user. ``user_id`` is what the caller says: that user, or None.

        Raises ContextNotFoundError outside of a context, ContextClosedError, and CrossUserAccessError, recorded, for
        any other user.
        """
        context = current_context()
        require_same_user(context, user_id, action)
        owner = self._known.get(context)
        if owner is None:
            owner = Owner(context.user_id, context.candidate_keys(_USER, _ALL))
            self._known[context] = owner
        return context, owner


class Moves:
    """What is under way from the names under one secret to those under another: in this process, each thing once."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    def only_one(self, name: str) -> asyncio.Lock:
        """For ``async with``, around a look at what stands under an earlier name and the move of it."""
        return self._locks.setdefault((id(asyncio.get_running_loop()), name), asyncio.Lock())


def require_same_user(context: UserExecutionContext, user_id: str | None, action: str) -> None:
    """Raise CrossUserAccessError, recorded, unless ``user_id`` is None or the context's own user."""
    if user_id is None or user_id == context.user_id:
        return
    if context.host is not None:
        context.host.require_owner(user_id, action)
    # With a grant too: what is stored goes by the context, and would be this user's under another's name.
    raise CrossUserAccessError(f"{action}: this code runs in another user's context")


def aligned(*names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What goes together under each secret, the current one's first. A plugin that derives keys gives one for all."""
    secrets = max(map(len, names))
    return list(zip(*(each + each[-1:] * (secrets - len(each)) for each in names), strict=True))
