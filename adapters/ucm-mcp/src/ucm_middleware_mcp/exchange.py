"""One HTTP request, as long as messages that it brought are being handled."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import anyio

from ucm_middleware.types import Scope

EXCHANGE: Final = "ucm_middleware_mcp.exchange"
"""The scope key of the exchange."""

TURNS: Final = 16
"""How many turns of the event loop a message gets to come from the end of its request to its handler. The transports
of the SDK need four at most; one that took longer would find its request's context closed, and be refused.
"""


class Exchange:
    """The calls that came with one request: its context must not close under them, and they must not outlive it."""

    __slots__ = ("_calls", "_idle", "resumable")

    def __init__(self) -> None:
        self._calls: set[anyio.CancelScope] = set()
        self._idle: asyncio.Event | None = None
        self.resumable = False
        """Whether the client may come back later for what is answered."""

    @contextmanager
    def call(self) -> Generator[anyio.CancelScope]:
        """Around the handling of one message. The scope given is cancelled when the client has gone for good."""
        with anyio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                yield scope
            finally:
                self._calls.discard(scope)
                if self._idle is not None and not self._calls:
                    self._idle.set()

    async def settle(self, *, wait: bool) -> None:
        """After the transport is through with the request: let the calls end, or cancel them, and wait for that."""
        if wait:
            for _ in range(TURNS):
                if self._calls:
                    break
                await asyncio.sleep(0)
        else:
            for scope in self._calls:
                scope.cancel()
        if self._calls:
            self._idle = asyncio.Event()
            await self._idle.wait()


def exchange_of(request: Any) -> Exchange | None:
    """That of the request that brought a message; None on transports without requests."""
    scope: Scope | None = getattr(request, "scope", None)
    found = None if scope is None else scope.get(EXCHANGE)
    return found if isinstance(found, Exchange) else None
