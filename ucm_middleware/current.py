"""The package's one ContextVar: what the running code belongs to."""

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext


class Inside(Protocol):
    """What code can run inside of: a context, a grant, or the release of a resource."""

    @property
    def context(self) -> "UserExecutionContext | None":
        """The context that this belongs to; None for a grant to code that runs in none."""
        ...


ambient: ContextVar[Inside | None] = ContextVar("ucm_middleware_ambient", default=None)


def ambient_context() -> "UserExecutionContext | None":
    """The context that this code runs in, open or not; None outside."""
    value = ambient.get()
    return None if value is None else value.context


class Release:
    """Marks the code of a release: only that code, and what it starts, may still use the context."""

    __slots__ = ("context",)

    def __init__(self, context: "UserExecutionContext") -> None:
        self.context = context

    def enter(self) -> Token[Inside | None]:
        """Begin a release, here."""
        return ambient.set(self)

    def leave(self, token: Token[Inside | None]) -> None:
        """End it."""
        ambient.reset(token)

    def is_here(self) -> bool:
        """Whether the asking code is, or was started by, a release."""
        value: object = ambient.get()
        while value is not None and value is not self:
            value = getattr(value, "outer", None)  # a grant that was taken inside of the release
        return value is self
