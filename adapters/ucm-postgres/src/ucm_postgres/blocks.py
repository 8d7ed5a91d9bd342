"""What blocks of a transaction have in common, in tasks and in threads."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token
from typing import Any, Final, TypeVar

from ucm_middleware import UserExecutionContext, revoke_handle
from ucm_postgres.binding import Binding

T = TypeVar("T")

FAILED_MESSAGE: Final = (
    "a statement of this transaction failed, so that nothing of it can be committed; let its error through, or run "
    "what may fail in a savepoint, a block of its own"
)
LOST_MESSAGE: Final = "the connection was lost before COMMIT, and the transaction is rolled back with it"

ENDED_MESSAGE: Final = (
    "a statement has ended the transaction inside of its block, or reset all settings, and what came after it ran for "
    "no user; leave that to the end of the block, and let blocks inside of it be the savepoints"
)

BUSY_MESSAGE: Final = (
    "something is still under way where its block ends (a pipeline, a COPY, or rows that were not read to their end), "
    "so that nothing of it can be committed; end it inside of the block"
)


class Nesting:
    """The blocks inside of a transaction: one of them is the innermost, whichever tasks or threads work in it.

    Savepoints are a stack of the server's. Were those of two tasks to overlap, to roll one back would undo what the
    other has ended well.
    """

    __slots__ = ("_depth", "_lock")

    def __init__(self) -> None:
        self._depth = 0
        self._lock = threading.Lock()

    @contextmanager
    def savepoint(self, depth: int) -> Generator[None]:
        """A block of code that is ``depth`` blocks deep. Raises RuntimeError when another's block is open."""
        with self._lock:
            self.require_innermost(depth)
            self._depth = depth + 1
        try:
            yield
        finally:
            self._depth = depth

    def require_innermost(self, depth: int) -> None:
        """Raise RuntimeError unless the block so deep is the innermost one: before it begins another, and ends well."""
        if self._depth != depth:
            raise RuntimeError(
                "another task or thread is inside of a block of this transaction, and savepoints cannot overlap; let "
                "them take turns, and end before the block that they were started in"
            )


@contextmanager
def inside(variable: ContextVar[T], value: T) -> Generator[None]:
    """The variable has the value in the block. A generator that is closed elsewhere changes nothing there."""
    token = variable.set(value)
    try:
        yield
    finally:
        _leave(variable, token)


def is_same(binding: Binding, outer: UserExecutionContext, context: UserExecutionContext) -> bool:
    """Whether a block of ``context`` may be part of a transaction of ``outer``: the same user in the same role."""
    if outer is context:
        return True
    return outer.user_id == context.user_id and binding.role_for(outer) == binding.role_for(context)


def revoke(handle: Any) -> None:
    """Revoke a handle when its block ends, in whoever's code: a generator may be collected in another user's."""
    Context().run(revoke_handle, handle)


def outcome_is_unknown(error: BaseException | None) -> bool:
    """Whether a COMMIT that failed so may have been done all the same: it is not the server that says no."""
    state: object = getattr(error, "sqlstate", None)
    return not isinstance(state, str) or state.startswith(("08", "57P"))  # the connection, or the server, went away


def _leave(variable: ContextVar[T], token: Token[T]) -> None:
    try:
        variable.reset(token)
    except ValueError:
        return  # it is another Context, where nothing was set
