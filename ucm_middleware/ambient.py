"""The context that the running code belongs to, and the grants it may hold."""

from contextvars import Token

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import Inside, ambient, ambient_context
from ucm_middleware.errors import ContextNotFoundError


class Grant:
    """The right to touch other users' contexts, alive as long as its ``privileged`` block.

    Tasks started inside the block inherit the object, and it dies for them too when the block ends.
    """

    __slots__ = ("_alive", "context", "guard", "outer", "reason", "users")

    def __init__(
        self, guard: object, reason: str, users: frozenset[str] | None, context: UserExecutionContext | None
    ) -> None:
        self.guard = guard
        self.reason = reason
        self._alive = True
        self.context = context
        self.users = users
        self.outer = ambient.get()

    @property
    def alive(self) -> bool:
        return self._alive

    def end(self) -> None:
        """Take the right away, from whoever holds the object. There is no way back."""
        self._alive = False

    def covers(self, user_id: str | None) -> bool:
        """True when the grant is alive and names the user; None stands for all users at once."""
        return self._alive and (self.users is None or user_id in self.users)


Ambient = Token[Inside | None]
"""What ``enter`` gives and ``leave`` takes."""


def current_context() -> UserExecutionContext:
    """The context that this code runs in.

    Raises ContextNotFoundError outside of one, and ContextClosedError in code that outlived it.
    """
    context = ambient_context()
    if context is None:
        raise ContextNotFoundError(
            "no user context here: this code runs outside of a request, a connection and managed_user_context(); "
            "is UserContextMiddleware added to the app?"
        )
    context.require_usable()
    return context


def ambient_grant() -> Grant | None:
    """The grant that this code runs under, if it is alive."""
    value = ambient.get()
    return value if isinstance(value, Grant) and value.alive else None


def enter(value: UserExecutionContext | Grant) -> Ambient:
    """Make a context, or a grant, the one that the code from here on runs in."""
    return ambient.set(value)


def leave(token: Ambient) -> None:
    """Undo ``enter``."""
    try:  # contextlib.suppress costs more than all the rest of this
        ambient.reset(token)
    except ValueError:
        return  # a generator that was broken off is closed in another Context than it entered in: nothing to undo there
