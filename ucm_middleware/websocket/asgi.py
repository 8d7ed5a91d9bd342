"""One WebSocket connection of an ASGI server: its events, its limits, and a context for each message on request."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import Awaitable
from typing import Final
from urllib.parse import parse_qs

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient
from ucm_middleware.events.channel import Connection, LastEvent
from ucm_middleware.events.hub import Hub
from ucm_middleware.events.outbox import TaskOutbox
from ucm_middleware.lifetime import INTERRUPTING
from ucm_middleware.types import Message, Receive, Send
from ucm_middleware.websocket.limits import MessageLimits, Meter

OPERATION: Final = "message"
"""What the child context of a message is called."""

MOST_DIGITS: Final = 18
MOST_FIELDS: Final = 100


class AsgiConnection:
    """Stands between the server and the app. It reads nothing by itself: each message goes to the app's ``receive``.

    With ``per_message``, a message is handled in a child context of its own, which is the current one from when the app
    receives the message until it asks for the next.
    """

    __slots__ = ("_after", "_child", "_context", "_hub", "_lifetime", "_meter", "_per_message", "_receive", "_send")

    def __init__(
        self,
        context: UserExecutionContext,
        hub: Hub,
        limits: MessageLimits,
        receive: Receive,
        send: Send,
        query: bytes,
        *,
        per_message: bool,
    ) -> None:
        self._context = context
        self._lifetime = context._lifetime
        self._hub = hub
        self._meter = Meter(limits, asyncio.get_running_loop().time)
        self._receive = receive
        self._send = send
        self._after = last_event(query)
        self._per_message = per_message
        self._child: UserExecutionContext | None = None

    async def receive(self) -> Message:
        """The next message. Raises MessageLimitError for one that is too much, ContextClosedError once the user may not
        go on."""
        if self._lifetime.reason is not None:
            require_not_cut_off(self._context)
        if self._child is not None:
            await self._leave_message()
        message = await self._receive()
        if message["type"] == "websocket.receive":
            self._meter.count(message.get("text") or message.get("bytes") or "")
            if self._per_message:
                self._child = child = self._context.create_child_context(OPERATION)
                ambient.set(child)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on. Events come from when the connection is accepted until it is closed."""
        if self._lifetime.reason is not None:
            require_not_cut_off(self._context)
        kind = message["type"]
        if kind != "websocket.send":
            if kind == "websocket.accept":
                return self._accept(message)
            if kind == "websocket.close":
                return self._close(message)
        return self._send(message)

    async def _accept(self, message: Message) -> None:
        await self._send(message)
        hub = self._hub
        outbox = TaskOutbox(self._send_event, asyncio.get_running_loop(), hub.policy, hub.lock)
        hub.join(Connection(self._context, outbox, self._after))

    async def _close(self, message: Message) -> None:
        await asyncio.sleep(0)  # who sends the app's last event may have been made just now, and comes before
        self._hub.leave(self._context)
        await self._send(message)

    def _send_event(self, text: str) -> Awaitable[None]:
        return self._send({"type": "websocket.send", "text": text})

    async def _leave_message(self) -> None:
        child, self._child = self._child, None
        ambient.set(self._context)
        if child is not None:
            await child.aclose("finished")


def require_not_cut_off(context: UserExecutionContext) -> None:
    """Raise ContextClosedError in a handler that revoked its own user, say: it is not cancelled; it ends here."""
    context.close_if_lost()
    reason = context._lifetime.reason
    if reason is not None and reason in INTERRUPTING:
        raise context._closed_error()


def last_event(query: bytes) -> LastEvent | None:
    """The last event that a client says it had: ``?epoch=...&last_sequence=...``. None when it says nothing."""
    if b"last_sequence=" not in query:
        return None
    try:
        given = parse_qs(query.decode("latin-1"), max_num_fields=MOST_FIELDS)
    except ValueError:
        return LastEvent(None, None)
    sequences, epochs = given.get("last_sequence", []), given.get("epoch", [])
    sequence = int(sequences[0]) if len(sequences) == 1 and _is_number(sequences[0]) else None
    epoch = epochs[0] if len(epochs) == 1 and _is_epoch(epochs[0]) else None
    return LastEvent(epoch, sequence)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def _is_epoch(text: str) -> bool:
    return text.isascii() and text.isalnum() and len(text) <= MOST_DIGITS
