"""The context that the running code belongs to: the package's one ContextVar."""

from contextvars import ContextVar, Token

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextNotFoundError


class Grant:
    """The right to touch other users' contexts, alive as long as its ``privileged`` block.

    Tasks started inside the block inherit the object, and it dies for them too when the block ends.
    """

    __slots__ = ("_covers", "alive", "context", "reason")

    def __init__(self, reason: str, users: frozenset[str] | None, context: UserExecutionContext | None) -> None:
        self.reason = reason
        self.alive = True
        self.context = context
        self._covers = users

    def covers(self, user_id: str | None) -> bool:
        """True when the grant is alive and names the user; None stands for all users at once."""
        return self.alive and (self._covers is None or user_id in self._covers)


_ambient: ContextVar[UserExecutionContext | Grant | None] = ContextVar("ucm_middleware_ambient", default=None)
Ambient = Token[UserExecutionContext | Grant | None]
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


def ambient_context() -> UserExecutionContext | None:
    """The context that this code runs in, open or not; None outside."""
    value = _ambient.get()
    return value.context if isinstance(value, Grant) else value


def ambient_grant() -> Grant | None:
    """The grant that this code runs under, if it is alive."""
    value = _ambient.get()
    return value if isinstance(value, Grant) and value.alive else None


def enter(value: UserExecutionContext | Grant) -> Ambient:
    """Make a context, or a grant, the one that the code from here on runs in."""
    return _ambient.set(value)


def leave(token: Ambient) -> None:
    """Undo ``enter``, in the same task and Context."""
    _ambient.reset(token)
