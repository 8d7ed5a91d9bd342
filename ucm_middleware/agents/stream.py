"""A stream of an agent, as its reader sees it."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ucm_middleware.agents.channel import Channel
from ucm_middleware.agents.launch import Launch
from ucm_middleware.current import ambient_context
from ucm_middleware.errors import ConfigurationError, UserContextError

logger = logging.getLogger(__name__)


class AgentStream:
    """``async with manager.stream_with_agent(...) as stream:`` and in it ``async for item in stream:``.

    The run begins with the block, in a task of its own in the Context of whoever entered it, and is cancelled when the
    block ends before it does. Whoever iterates, in whichever task of the same event loop, changes nothing about who
    runs; in another user's context the items are refused with CrossUserAccessError, which is recorded.

    Iterating raises what ``execute_with_agent`` raises.
    """

    __slots__ = ("_channel", "_launch", "_require_owner", "_start", "_user_id")

    def __init__(
        self,
        user_id: str,
        channel: Channel,
        start: Callable[[Channel], Launch],
        require_owner: Callable[[str, str], None],
    ) -> None:
        self._user_id = user_id
        self._channel = channel
        self._start = start
        self._require_owner = require_owner
        self._launch: Launch | None = None

    @property
    def result(self) -> Any:
        """What the stream came to, once it has ended well: what its framework's adapter says, and else None."""
        self._require_reader()
        launch = self._launch
        if launch is None or not launch.task.done() or launch.task.cancelled() or launch.task.exception() is not None:
            raise ConfigurationError("the stream has no result: it has not ended, or not well; iterate to its end")
        return launch.task.result()

    async def __aenter__(self) -> Self:
        if self._launch is not None:
            raise ConfigurationError("a stream is entered once; ask the manager for another")
        self._launch = launch = self._start(self._channel)
        launch.when_over(self._channel.close)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        launch = self._launch
        if launch is None:
            raise ConfigurationError("a stream of an agent is read inside of `async with` only; enter it")
        if launch.task.get_loop() is not asyncio.get_running_loop():
            raise ConfigurationError("a stream of an agent is read on the event loop that it was entered on")
        self._require_reader()
        has_one, item = await self._channel.take()
        if has_one:
            return item
        await launch.outcome()
        raise StopAsyncIteration

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        launch = self._launch
        assert launch is not None
        self._channel.drop()
        await launch.stop()
        task = launch.task
        raised = task.exception() if task.done() and not task.cancelled() else None
        # Iterating has raised it already, or nobody reads on and the end is what was wanted.
        if raised is not None and error is None and not isinstance(raised, UserContextError):
            logger.warning("a stream that was broken off failed: %s", type(raised).__name__)

    def _require_reader(self) -> None:
        here = ambient_context()
        if here is not None and here.user_id != self._user_id:
            self._require_owner(self._user_id, "stream of an agent")
