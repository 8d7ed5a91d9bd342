"""The spans of a WebSocket: one until it is accepted, and one for each message while that is handled."""

from collections.abc import Awaitable
from typing import Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.telemetry.spans import Spans, Traced
from ucm_middleware.types import Message, Receive, Send

_ANSWERS: Final = frozenset({"websocket.accept", "websocket.close", "websocket.http.response.start"})


class Conversation:
    """Stands between the server and the app: a message is being handled until the app asks for the next one."""

    __slots__ = ("_context", "_is_answered", "_receive", "_send", "_spans", "_traced")

    def __init__(
        self, spans: Spans, context: UserExecutionContext, traced: Traced, receive: Receive, send: Send
    ) -> None:
        self._spans = spans
        self._context = context
        self._traced = traced
        self._receive = receive
        self._send = send
        self._is_answered = False

    async def receive(self) -> Message:
        self._spans.end_message(self._traced)
        message = await self._receive()
        if message["type"] == "websocket.receive":
            self._spans.begin_message(self._context, self._traced)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if not self._is_answered and message["type"] in _ANSWERS:
            self._is_answered = True
            self._spans.accept(self._traced)
        return self._send(message)
