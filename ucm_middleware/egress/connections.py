"""WebSocket messages that an application sends itself; its events are looked at in the hub."""

from collections.abc import Awaitable

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.answers import BlockingAnswer, answer_for
from ucm_middleware.egress.exchange import Exchange
from ucm_middleware.egress.guard import EgressGuard
from ucm_middleware.egress.tokens import as_bytes
from ucm_middleware.types import Message, Send


class WatchedMessages:
    """A ``send`` for a connection: each message is looked at once it has left, or before where hits are held back. A
    handshake that is denied is an answer as others are.
    """

    __slots__ = ("_answer", "_context", "_exchange", "_guard", "_send")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        self._guard = guard
        self._context = context
        self._exchange = exchange
        self._send = send
        self._answer = answer_for(guard)(guard, context, exchange, send)

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, if nothing that must be held back is in it."""
        if message["type"] == "websocket.send":
            return self._send_message(message)
        if message["type"] == "websocket.close":
            return self._send_close(message)
        return self._answer.send(message)

    async def _send_message(self, message: Message) -> None:
        data = message.get("text") or message.get("bytes") or b""
        if self._guard.policy.block:
            if not is_held_back(self._guard, self._context, self._exchange, data):
                await self._send(message)
        else:
            await self._send(message)
            look_at(self._guard, self._context, self._exchange, data)

    async def _send_close(self, message: Message) -> None:
        reason = message.get("reason")
        if reason and is_held_back(self._guard, self._context, self._exchange, reason):
            message = {**message, "reason": ""}
        await self._send(message)
        if reason and not self._guard.policy.block:
            look_at(self._guard, self._context, self._exchange, reason)

    async def finish(self) -> None:
        """The app has ended: what was held back of a denial is sent."""
        if isinstance(self._answer, BlockingAnswer):
            await self._answer.finish()

    def tell(self) -> None:
        """The connection is over: tell what was found in an answer that denied it."""
        self._answer.tell()


def look_at(guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, data: object) -> bool:
    """Look at a message that was sent, or would be. Whether there is another's value in it, which is on record then."""
    text = as_bytes(data)
    hits = guard.hits(text, context.user_id, exchange, "websocket")
    if hits:
        guard.report(context.user_id, hits, is_blocked=guard.policy.block)
    if not (hits and guard.policy.block):
        guard.learn(context.user_id, exchange, text)
    return bool(hits)


def is_held_back(guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, data: object) -> bool:
    """Whether a message must not be sent."""
    return guard.policy.block and look_at(guard, context, exchange, data)
