"""HTTP answers: looked at after their last byte, or, when what is found is to be held back, before each byte."""

from collections.abc import Awaitable
from typing import Final

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.exchange import SLICE, Exchange
from ucm_middleware.egress.guard import EgressGuard, Hit
from ucm_middleware.egress.tokens import cut
from ucm_middleware.errors import EgressBlockedError
from ucm_middleware.types import Message, Receive, Send

_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES: Final = frozenset({"http.response.body", "websocket.http.response.body"})

_ERROR: Final = b"Internal Server Error"
_ERROR_HEADERS: Final = (
    (b"content-length", b"21"),
    (b"content-type", b"text/plain; charset=utf-8"),
)


class Request:
    """A ``receive`` that notes what the client sends."""

    __slots__ = ("_exchange", "_receive")

    def __init__(self, exchange: Exchange, receive: Receive) -> None:
        self._exchange = exchange
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        self._exchange.came(message.get("body") or message.get("text") or message.get("bytes"))
        return message


class Looking:
    """What both kinds of answer have: whose it is, and how a text of it is looked at."""

    __slots__ = ("_context", "_exchange", "_guard", "_is_encoded", "_send")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        self._guard = guard
        self._context = context
        self._exchange = exchange
        self._send = send
        self._is_encoded = False

    def _hits_in_headers(self, message: Message) -> list[Hit]:
        found: list[Hit] = []
        for name, value in message.get("headers", ()):
            field = bytes(name).decode("latin-1").lower()
            if field == "content-encoding" and bytes(value).lower() != b"identity":
                self._is_encoded = True
                self._guard.encoded()
            if len(value) > 5:
                found += self._guard.hits(bytes(value), self._context.user_id, self._exchange, "response", field)
        return found

    def _hits_in(self, data: bytes) -> list[Hit]:
        if self._is_encoded:
            return []
        hits = self._guard.hits(data, self._context.user_id, self._exchange, "response")
        self._guard.learn(self._context, data)
        return hits


class WatchedAnswer(Looking):
    """For reporting: every message passes as it is, and nothing is done before the last one has left.

    Of a long answer, what is complete is looked at each 64 KB, so that no more is kept; what was found is told in the
    end as well.
    """

    __slots__ = ("_found", "_parts", "_size", "_starts")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        super().__init__(guard, context, exchange, send)
        self._starts: list[Message] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._found: list[Hit] = []

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on."""
        if body := message.get("body"):
            if self._size > SLICE:
                self._look(is_over=False)
            self._parts.append(bytes(body))
            self._size += len(body)
        if "headers" in message:
            self._starts.append(message)
        return self._send(message)

    async def finish(self) -> None:
        """The app has ended: nothing was held back."""

    def tell(self) -> None:
        """The answer has left, or broke off: look at it, and tell what was found."""
        self._look(is_over=True)
        found, self._found = self._found, []
        if found:
            self._guard.report(self._context.user_id, dict.fromkeys(found), is_blocked=False)

    def _look(self, *, is_over: bool) -> None:
        for start in self._starts:
            self._found += self._hits_in_headers(start)
        self._starts = []
        data = b"".join(self._parts)
        complete, rest = (data, b"") if is_over else cut(data)
        self._parts, self._size = ([rest] if rest else []), len(rest)
        if complete and len(self._found) < SLICE:
            self._found += self._hits_in(complete)


class BlockingAnswer(Looking):
    """For blocking: the start waits for the first of the body, and a run at the end of a part for the next one.

    A hit before anything has left is answered as an error of the application's own would be; a later one raises
    EgressBlockedError, which breaks the connection off.
    """

    __slots__ = ("_is_broken", "_is_over", "_rest", "_start")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        super().__init__(guard, context, exchange, send)
        self._start: Message | None = None
        self._rest = b""
        self._is_over = False
        self._is_broken = False

    async def send(self, message: Message) -> None:
        """Pass a message on, if nothing that is another's is in it."""
        if self._is_broken:
            raise _blocked()
        if self._is_over:  # it was answered with an error: what the app still says nobody sees
            return
        kind = message["type"]
        hits = self._hits_in_headers(message)
        if kind in _STARTS and not hits:
            self._start = message
            return
        if kind in _BODIES and not hits:
            data = self._rest + bytes(message.get("body", b""))
            complete, self._rest = cut(data) if message.get("more_body", False) else (data, b"")
            if self._start is not None and not complete and message.get("more_body", False):
                return
            hits = self._hits_in(complete)
            message = {**message, "body": complete}
        if hits:
            await self._hold_back(kind, hits)
            return
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)
        await self._send(message)

    async def finish(self) -> None:
        """The app has ended: a start that nothing followed is sent, as the app left it."""
        start, self._start = self._start, None
        if start is not None and not self._is_over:
            await self._send(start)

    def tell(self) -> None:
        """What was found was told at once."""

    async def _hold_back(self, kind: str, hits: list[Hit]) -> None:
        self._guard.report(self._context.user_id, hits, is_blocked=True)
        if self._start is None and kind not in _STARTS:
            self._is_broken = True
            raise _blocked()
        self._start, self._is_over = None, True
        prefix = "websocket.http.response" if kind.startswith("websocket") else "http.response"
        await self._send({"type": f"{prefix}.start", "status": 500, "headers": list(_ERROR_HEADERS)})
        await self._send({"type": f"{prefix}.body", "body": _ERROR})


def answer_for(guard: EgressGuard) -> type[WatchedAnswer] | type[BlockingAnswer]:
    """The kind of answer that the guard's policy asks for."""
    return BlockingAnswer if guard.policy.block else WatchedAnswer


def _blocked() -> EgressBlockedError:
    return EgressBlockedError("what was to be sent has a protected value of another user in it, and was held back")
