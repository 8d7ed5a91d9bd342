"""One WebSocket connection to an app."""

import json
from types import TracebackType
from typing import Any, Self

from ucm_middleware.testing.conversation import Conversation
from ucm_middleware.testing.exchange import Response, response_of
from ucm_middleware.types import ASGIApp, Message, Scope

ABNORMAL = 1006
"""The close code that stands for none: nobody said why."""


class ConnectionRefused(Exception):  # noqa: N818 - named for what happened, as asyncio and websockets do
    """The app did not accept the handshake: ``response`` is its denial, None when it closed with ``code`` instead."""

    def __init__(self, response: Response | None, code: int | None) -> None:
        how = f"close code {code}" if response is None else f"status {response.status}: {response.text}"
        super().__init__(f"the app refused the WebSocket with {how}")
        self.response = response
        self.code = code


class ConnectionEnded(Exception):  # noqa: N818
    """The app closed the connection, with ``code`` and ``reason``; 1006 when it ended without closing."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the app closed the WebSocket with {code} {reason!r}")
        self.code = code
        self.reason = reason


class WebSocket(Conversation):
    """``async with drive.websocket("/ws") as socket:`` is an accepted connection; at the end of the block the client
    goes, and the app must then end.

    Entering raises ConnectionRefused. ``receive_*`` raise ConnectionEnded when the app has closed, and what the app
    raised when it has failed.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self._over = False
        self.subprotocol: str | None = None
        super().__init__(app, scope)

    def __str__(self) -> str:
        return f"WebSocket {self.scope['path']}"

    async def __aenter__(self) -> Self:
        self.begin({"type": "websocket.connect"})
        message = await self.next()
        if message is not None and message["type"] == "websocket.accept":
            self.subprotocol = message.get("subprotocol")
            return self
        await self.ended()
        if message is None:
            raise AssertionError(f"{self}: the app ended without an answer to the handshake")
        if message["type"] == "websocket.close":
            raise ConnectionRefused(None, message.get("code", 1000))
        raise ConnectionRefused(response_of(self.sent, "websocket.http.response"), None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()
        if error is None:
            await self.ended()
            return
        try:
            await self.ended()
        except Exception as raised:  # noqa: BLE001 - the error of the block goes first, and names this one
            error.add_note(f"the app then ended with {raised!r}")

    def send_text(self, data: str) -> None:
        """Let the app have a text message."""
        self.begin({"type": "websocket.receive", "text": data})

    def send_bytes(self, data: bytes) -> None:
        """Let the app have a binary message."""
        self.begin({"type": "websocket.receive", "bytes": data})

    def send_json(self, data: Any) -> None:
        """Let the app have a value as JSON text."""
        self.send_text(json.dumps(data))

    async def receive_text(self) -> str:
        """The app's next message, which must be text."""
        return str((await self._received())["text"])

    async def receive_bytes(self) -> bytes:
        """The app's next message, which must be binary."""
        return bytes((await self._received())["bytes"])

    async def receive_json(self) -> Any:
        """The app's next message, which must be text, parsed."""
        return json.loads(await self.receive_text())

    def disconnect(self, code: int = 1005, reason: str = "") -> None:
        """The client goes; nothing when the connection is over already. 1005 is what is told when no code was sent."""
        if not self._over:
            self._over = True
            self.begin({"type": "websocket.disconnect", "code": code, "reason": reason})

    async def _received(self) -> Message:
        message = await self.next()
        if message is None:
            await self.ended()
            raise ConnectionEnded(ABNORMAL, "the app ended without closing the connection")
        if message["type"] == "websocket.close":
            raise ConnectionEnded(message.get("code", 1000), message.get("reason") or "")
        return message

    async def _send(self, message: Message) -> None:
        if self._over:
            raise OSError(f"{self}: the connection is over")  # as the specification has it since 2.4
        if message["type"] == "websocket.close":
            self.disconnect(message.get("code", 1000), message.get("reason") or "")
        await super()._send(message)
