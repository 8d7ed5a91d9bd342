"""What plugins wrap the messages of a WebSocket with."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.dispatch import Around
from ucm_middleware.resources import Resource
from ucm_middleware.types import Message, Receive


class Messages:
    """Stands between the server and the app: a message is being handled until the app asks for the next one.

    What was entered for the last message is left at the context's teardown, like everything on it.
    """

    __slots__ = ("_around", "_context", "_entered", "_receive")

    def __init__(
        self, context: UserExecutionContext, around: Around[UserExecutionContext, Message], receive: Receive
    ) -> None:
        self._context = context
        self._around = around
        self._receive = receive
        self._entered: list[Resource] = []

    async def receive(self) -> Message:
        """The next message, once it is wrapped. Raises what a plugin raises: the message is then not handled."""
        await self._leave()
        message = await self._receive()
        if message["type"] == "websocket.receive":
            self._entered = await self._context._enter_around(self._around(self._context, message))
        return message

    async def _leave(self) -> None:
        entered, self._entered = self._entered, []
        if entered:
            failures = self._context.lifetime.failures
            await self._context._leave_around(entered, None)
            if new := self._context.lifetime.failures[len(failures) :]:
                raise new[0].error
