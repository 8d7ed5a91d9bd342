"""What plugins wrap the messages of a WebSocket with."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.dispatch import Around
from ucm_middleware.resources import Resource
from ucm_middleware.types import Message, Receive


class Messages:
    """Stands between the server and the app: a message is being handled until the app asks for the next one.

    What was entered for the last message is left at the context's teardown, like everything on it.
    """

    __slots__ = ("_around", "_context", "_entered", "_receive", "_unwrapped")

    def __init__(
        self, context: UserExecutionContext, around: Around[UserExecutionContext, Message], receive: Receive
    ) -> None:
        self._context = context
        self._around = around
        self._receive = receive
        self._entered: list[Resource] = []
        self._unwrapped: Message | None = None

    async def receive(self) -> Message:
        """The next message, once it is wrapped. Raises what a plugin raises: the message is then not handled."""
        await self._leave()
        message, self._unwrapped = self._unwrapped, None
        if message is None:
            message = await self._receive()
        if message["type"] == "websocket.receive":
            try:
                self._entered = await self._context._enter_around(self._around(self._context, message))
            except asyncio.CancelledError:
                self._unwrapped = message  # for whoever stopped waiting, such as after a timeout, and asks again
                raise
        return message

    async def _leave(self) -> None:
        if not self._entered:
            return
        context = self._context
        failures = context.lifetime.failures
        await context._leave_around(self._entered, None if context.is_open else context._seen_error(None))
        self._entered = []  # only now: what a cancellation kept in is left the next time
        if new := context.lifetime.failures[len(failures) :]:
            raise new[0].error
