"""Users who act in turns, each with a context that stays open meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from contextvars import copy_context
from types import TracebackType
from typing import Any, Self, TypeVar

from ucm_middleware import UserExecutionContext, managed_user_context
from ucm_middleware.testing import Users

T = TypeVar("T")


class Actor:
    """``with Actor(users, "alice") as alice: await alice.do(coroutine)`` does that in this user's context."""

    def __init__(self, users: Users, user_id: str) -> None:
        self.context: UserExecutionContext = users.context(user_id)
        self._variables = copy_context()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._variables.run(self._stack.enter_context, managed_user_context(self.context))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._variables.run(self._stack.__exit__, kind, error, traceback)

    async def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.get_running_loop().create_task(coroutine, context=self._variables)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        return self._variables.run(function, *args)
