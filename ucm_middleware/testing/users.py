"""Users to test with, and contexts that run for them."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.execution import managed_user_context
from ucm_middleware.manager import UserContextManager

NAMES: Final = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy")


class Users:
    """Makes distinct user ids: alice, bob, carol and so on, and when the names have run out user-11, user-12 ...

    Once the manager serves a middleware it does not trust code outside of any context: ``context`` and ``running`` then
    need a ``manager.privileged(reason=..., users=[...])`` block around them, as they would in the application.
    """

    __slots__ = ("_ids", "manager")

    def __init__(self, manager: UserContextManager) -> None:
        self.manager = manager
        self._ids = _distinct_ids()

    def new(self) -> str:
        """The id of a user that nobody else in this test is."""
        return next(self._ids)

    def take(self, number: int) -> list[str]:
        """So many new users: ``alice, bob = users.take(2)``."""
        return [self.new() for _ in range(number)]

    def context(self, user_id: str | None = None, **given: Any) -> UserExecutionContext:
        """A context, live in the manager, of this user or of a new one.

        Takes and raises what ``manager.create_isolated_context`` does.
        """
        return self.manager.create_isolated_context(self.new() if user_id is None else user_id, **given)

    @contextmanager
    def running(self, user_id: str | None = None, **given: Any) -> Generator[UserExecutionContext]:
        """``with users.running("alice") as context:`` runs the block as that user, and closes the context after it.

        For contexts with asynchronous resources use ``async with managed_user_context(users.context(...))``.
        """
        with managed_user_context(self.context(user_id, **given)) as context:
            yield context


def _distinct_ids() -> Iterator[str]:
    yield from NAMES
    for number in count(len(NAMES) + 1):
        yield f"user-{number}"
