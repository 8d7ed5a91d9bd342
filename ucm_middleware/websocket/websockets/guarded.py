"""Messages that handlers of the websockets library send, under the egress guard: whole, or in fragments."""

# What a message is, is found out by looking: the checker knows of no kind of its fragments.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.connections import look_at
from ucm_middleware.egress.exchange import Exchange
from ucm_middleware.egress.guard import EgressGuard
from ucm_middleware.egress.tokens import as_bytes


class Outgoing:
    """One message. ``message`` is what to send in its place: the same, but fragments are noted as they are sent. Where
    hits are held back, they are put together first, so that none of them leaves before all were looked at.
    """

    __slots__ = ("_context", "_exchange", "_guard", "_parts", "message")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, message: Any) -> None:
        self._guard = guard
        self._context = context
        self._exchange: Exchange = context._exchange  # pyright: ignore[reportPrivateUsage]
        self._parts: list[Any] = []
        self.message: Any = message
        if isinstance(message, str | bytes | bytearray | memoryview):
            self._parts.append(message)
        elif isinstance(message, AsyncIterable):
            self.message = self._noted_async(message)
        elif isinstance(message, Iterable) and not isinstance(message, dict):
            self.message = self._noted(message)

    def must_stay(self) -> bool:
        """Whether it must not be sent: asked before it is. Fragments that come one by one are taken in."""
        if not self._guard.policy.block:
            return False
        if not self._parts and isinstance(self.message, Iterator):
            self.message = list(self.message)
        return self._look()

    async def must_stay_soon(self) -> bool:
        """The same of fragments that are waited for."""
        if self._guard.policy.block and isinstance(self.message, AsyncIterator):
            self.message = [part async for part in self.message]
            return self._look()
        return self.must_stay()

    def was_sent(self) -> None:
        """It has left."""
        if not self._guard.policy.block:
            self._look()

    def _look(self) -> bool:
        return look_at(self._guard, self._context, self._exchange, b"".join(map(as_bytes, self._parts)))

    def _noted(self, fragments: Iterable[Any]) -> Iterator[Any]:
        for fragment in fragments:
            self._parts.append(fragment)
            yield fragment

    async def _noted_async(self, fragments: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for fragment in fragments:
            self._parts.append(fragment)
            yield fragment
