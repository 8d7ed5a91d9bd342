"""The queue of a stream: whatever comes in which order, no item is lost, none comes twice, and the bound holds."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ucm_middleware import ConfigurationError
from ucm_middleware.agents.channel import Channel

STEPS = st.lists(
    st.sampled_from(["put", "take", "take", "cancel put", "cancel take", "second reader", "close", "turn", "turn"]),
    max_size=40,
)


class Ends:
    """One driver and one reader of a channel, each of which is busy with one call at a time."""

    def __init__(self, most: int) -> None:
        self.channel = Channel(most)
        self.most = most
        self.put: list[int] = []
        self.taken: list[int] = []
        self.said_over = False
        self._next = 0
        self._putting: asyncio.Task[None] | None = None
        self._taking: asyncio.Task[None] | None = None
        self._closed = False

    async def _put(self, item: int) -> None:
        await self.channel.put(item)
        self.put.append(item)

    async def _take(self) -> None:
        has_one, item = await self.channel.take()
        if has_one:
            assert not self.said_over
            self.taken.append(item)
        else:
            assert self._closed
            self.said_over = True

    async def do(self, step: str) -> None:
        match step:
            case "put" if not self._closed and _is_free(self._putting):
                self._putting = self._begin(self._put(self._next))
                self._next += 1
            case "take" if _is_free(self._taking):
                self._taking = self._begin(self._take())
            case "cancel put" if self._putting is not None:
                self._putting.cancel()
            case "cancel take" if self._taking is not None:
                self._taking.cancel()
            case "second reader" if not _is_free(self._taking):
                await self._read_beside()
            case "close" if _is_free(self._putting):
                self.channel.close()
                self._closed = True
            case "turn":
                await asyncio.sleep(0)
        assert len(self.put) - len(self.taken) <= self.most
        assert self.taken == self.put[: len(self.taken)] or not _is_free(self._putting)

    async def end(self) -> None:
        """Let the driver close it, and the reader read to the end."""
        while not _is_free(self._putting):
            await self.do("take")
            await asyncio.sleep(0)
        self.channel.close()
        self._closed = True
        while not self.said_over:
            await self.do("take")
            await asyncio.sleep(0)

    async def _read_beside(self) -> None:
        try:
            async with asyncio.timeout(0):
                await self._take()
        except (ConfigurationError, TimeoutError):
            pass  # as a second reader is told, or has to wait

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(work)


def _is_free(task: "asyncio.Task[None] | None") -> bool:
    if task is None:
        return True
    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
        if isinstance(error, ConfigurationError):  # the other reader was there first
            return True
        raise error
    return task.done()


@given(most=st.integers(1, 3), steps=STEPS)
def test_no_item_is_lost_and_none_comes_twice(most: int, steps: list[str]) -> None:
    async def run() -> None:
        ends = Ends(most)
        for step in steps:
            await ends.do(step)
        await ends.end()
        assert ends.taken == ends.put

    asyncio.run(run())
