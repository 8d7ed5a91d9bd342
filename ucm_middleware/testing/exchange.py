"""One HTTP request, in parts where a test wants it in parts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ucm_middleware.testing.conversation import Conversation
from ucm_middleware.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class Response:
    """What an app answered. ``headers`` are by lower-case name; of several of one name the last, all are in ``raw``."""

    status: int
    raw: Sequence[tuple[bytes, bytes]]
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        """The headers by lower-case name."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw}

    @property
    def text(self) -> str:
        """The body as UTF-8 text."""
        return self.body.decode()

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class Exchange(Conversation):
    """One request and its response, which may be under way. ``Drive.start`` makes them.

    As under uvicorn, ``receive`` says http.disconnect once the response is complete or the client has gone, and what
    is sent to a client that has gone is dropped without an error.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self._started = self._complete = self._gone = False
        super().__init__(app, scope)

    def __str__(self) -> str:
        return f"{self.scope['method']} {self.scope['path']}"

    def feed(self, body: bytes, *, more: bool = False) -> None:
        """Let the app have a part of the request's body; the last, unless there is ``more``."""
        self.begin({"type": "http.request", "body": body, "more_body": more})

    def disconnect(self) -> None:
        """The client goes. The app hears of it when it receives; servers cancel nothing."""
        self._gone = True
        self.begin({"type": "http.disconnect"})

    async def status(self) -> int:
        """The status, as soon as the app has sent it. For before the first ``chunk``."""
        message = await self.next()
        if message is None:
            await self.ended()
            raise AssertionError(f"{self}: the app ended without a response")
        status: int = message["status"]
        return status

    async def chunk(self) -> bytes:
        """The next part of the response's body that is not empty; ``b""`` at its end. Raises what the app raised."""
        while (message := await self.next()) is not None:
            if message["type"] == "http.response.body" and (body := message.get("body", b"")):
                return bytes(body)
        await self.ended()
        return b""

    async def response(self) -> Response:
        """The whole response, once the app has ended.

        Raises what the app raised, also after it had answered; ``sent`` has what it sent by then. AssertionError when
        it ended without a whole response to a client that was still there.
        """
        await self.ended()
        if not self._complete and not self._gone:
            raise AssertionError(f"{self}: the app ended without a whole response; it sent {_types(self.sent)}")
        return response_of(self.sent, "http.response")

    async def _receive(self) -> Message:
        message = await super()._receive()
        if message["type"] == "http.disconnect":
            self.begin(message)  # for whoever asks again
        return message

    async def _send(self, message: Message) -> None:
        if self._gone:
            return
        kind = message["type"]
        expected = "http.response.body" if self._started else "http.response.start"
        if self._complete or kind != expected:
            after = "the response was complete" if self._complete else f"{expected} was due"
            raise RuntimeError(f"{self}: the app sent {kind!r} when {after}")
        self._started = True
        await super()._send(message)
        if kind == "http.response.body" and not message.get("more_body", False):
            self._complete = True
            self.begin({"type": "http.disconnect"})


def response_of(sent: Sequence[Message], prefix: str) -> Response:
    """The response among messages, ``prefix`` before their ``.start`` and ``.body``."""
    start = next((message for message in sent if message["type"] == f"{prefix}.start"), None)
    if start is None:
        raise AssertionError(f"there is no {prefix}.start among {_types(sent)}")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == f"{prefix}.body")
    return Response(start["status"], list(start.get("headers", ())), body)


def _types(sent: Sequence[Message]) -> list[str]:
    return [message["type"] for message in sent]
