"""What a context's code still holds when the context closes: given back by the teardown."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from ucm_middleware import UserExecutionContext

T = TypeVar("T")


class Leftovers(Generic[T]):
    """Watches transactions by context. ``abandon`` is called at the teardown for each that is still under way.

    A context gets one release for all of them, whatever their number: a connection's context may live for days.
    """

    __slots__ = ("_abandon", "_watched")

    def __init__(self, abandon: Callable[[T], Awaitable[None] | None]) -> None:
        self._abandon = abandon
        self._watched: WeakKeyDictionary[UserExecutionContext, _Watched[T]] = WeakKeyDictionary()

    @contextmanager
    def watch(self, context: UserExecutionContext, transaction: T) -> Generator[None]:
        """Inside of the block, the transaction is under way. Raises ContextClosedError."""
        watched = self._watched.get(context)
        if watched is None:
            watched = context.closing(_Watched(self._abandon), name="transactions")
            self._watched[context] = watched
        watched.add(transaction)
        try:
            yield
        finally:
            watched.discard(transaction)


class _Watched(set[T]):
    """The transactions of one context."""

    def __init__(self, abandon: Callable[[T], Awaitable[None] | None]) -> None:
        super().__init__()
        self._abandon = abandon

    def close(self) -> Awaitable[None] | None:
        """Let go of those that are left."""
        rest = [awaitable for each in tuple(self) if (awaitable := self._abandon(each)) is not None]
        return _all(rest) if rest else None


async def _all(rest: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*rest)  # at once: the teardown has so much time for all of them
