"""Closing the toolsets of runs: each when no run uses it any more."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from google.adk.tools.base_toolset import BaseToolset

logger = logging.getLogger(__name__)

_LONGEST: Final = 10.0
"""Seconds that a toolset may take to close."""


class Toolsets:
    """The toolsets of all runs that are under way."""

    def __init__(self) -> None:
        self._users: dict[int, int] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def used(self, toolsets: Iterable[BaseToolset]) -> AsyncGenerator[None]:
        """Inside of the block nobody else closes them; after it they are closed, unless another run uses them."""
        ours = list(toolsets)
        for toolset in ours:
            self._users[id(toolset)] = self._users.get(id(toolset), 0) + 1
        try:
            for toolset in ours:
                if (closing := self._closing.get(id(toolset))) is not None:
                    await asyncio.wait((closing,))
            yield
        finally:
            unused: list[BaseToolset] = []
            for toolset in ours:
                self._users[id(toolset)] -= 1
                if not self._users[id(toolset)]:
                    del self._users[id(toolset)]
                    unused.append(toolset)
            # All at once: whoever waits may be cancelled.
            if closing_now := [self._close(toolset) for toolset in unused]:
                await asyncio.wait(closing_now)

    def _close(self, toolset: BaseToolset) -> "asyncio.Task[None]":
        async def close() -> None:
            try:
                async with asyncio.timeout(_LONGEST):
                    await toolset.close()
            except Exception:
                # One that cannot be closed is no reason for the run's result to be lost.
                logger.exception("toolset %s could not be closed", type(toolset).__name__)
            finally:
                self._closing.pop(id(toolset), None)

        self._closing[id(toolset)] = task = asyncio.create_task(close())
        return task
