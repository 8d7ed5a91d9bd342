"""HTTP answers: looked at after their last byte, or, when what is found is to be held back, before each byte."""

import logging
from collections.abc import Awaitable
from typing import Any, Final, cast

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.egress.exchange import Exchange
from ucm_middleware.egress.guard import EgressGuard, Hit
from ucm_middleware.egress.tokens import SLICE, as_bytes, cut
from ucm_middleware.errors import EgressBlockedError
from ucm_middleware.types import Message, Receive, Send

logger = logging.getLogger(__name__)

MOST_SUSPECTS: Final = 16
"""How many pieces of a long answer wait for its end, because there may be something in them."""

MOST_FOUND: Final = 1000

_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES: Final = frozenset({"http.response.body", "websocket.http.response.body"})

_ERROR: Final = b"Internal Server Error"
_ERROR_HEADERS: Final = (
    (b"content-length", b"21"),
    (b"content-type", b"text/plain; charset=utf-8"),
)


class Request:
    """A ``receive`` that notes what the client sends."""

    __slots__ = ("_context", "_exchange", "_receive")

    def __init__(self, context: UserExecutionContext, exchange: Exchange, receive: Receive) -> None:
        self._context = context
        self._exchange = exchange
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        if data := message.get("body") or message.get("text") or message.get("bytes"):
            self._exchange.came(data, self._context.user_id, goes_on=message.get("more_body", False))
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

    def _hits_in_headers(self, headers: list[Any]) -> list[Hit]:
        if not self._guard.table.may_hold(b" ".join(part for pair in headers for part in pair)):
            return []
        found: list[Hit] = []
        for name, value in headers:
            field = bytes(name).decode("latin-1").lower()
            line = b"%b: %b" % (name, value)
            found += self._guard.hits(line, self._context.user_id, self._exchange, "response", field)
        return found

    def _hits_in(self, data: bytes) -> list[Hit]:
        return self._guard.hits(data, self._context.user_id, self._exchange, "response")

    def _learn(self, data: bytes) -> None:
        self._guard.learn(self._context.user_id, self._exchange, data)

    def _note_encoding(self, headers: list[Any]) -> None:
        for name, value in headers:
            if len(name) == 16 and name.lower() == b"content-encoding" and value.lower() != b"identity":
                self._is_encoded = True
                self._guard.encoded()


class WatchedAnswer(Looking):
    """For reporting: every message passes as it is, and nothing is done before the last one has left.

    Of a long answer, what is complete is looked at each 64 KB, so that no more is kept: but only whether there may be
    something in it. Such pieces wait for the end, since to find out what it is takes longer.
    """

    __slots__ = ("_found", "_parts", "_size", "_starts", "_suspects")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        super().__init__(guard, context, exchange, send)
        self._starts: list[list[Any]] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._suspects: list[bytes] = []
        self._found: dict[Hit, None] = {}

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on."""
        if body := as_bytes(message.get("body")):
            if self._size > SLICE:
                self._look(is_over=False)
            self._parts.append(body)
            self._size += len(body)
        if "headers" in message:
            message = settled(message)
            # A copy: middlewares outside write into the app's list, such as that they compress.
            self._starts.append(list(message["headers"]))
        if message["type"] in _BODIES and not message.get("more_body", False):
            return self._send_last(message)
        return self._send(message)

    async def _send_last(self, message: Message) -> None:
        await self._send(message)
        self.tell()  # not only when background tasks are through: what is learned of it is for the next request

    def tell(self) -> None:
        """The answer has left, or broke off: look at it, and tell what was found."""
        if not (self._starts or self._parts or self._suspects):
            return  # all was told
        try:
            self._look(is_over=True)
        except Exception:  # the app's own fault, such as headers that are no pairs: what was sent is sent
            logger.exception("an answer could not be looked at by the egress guard")
        found, self._found = self._found, {}
        if found:
            self._guard.report(self._context.user_id, found, is_blocked=False)

    def _look(self, *, is_over: bool) -> None:
        data = b"".join(self._parts)
        complete, rest = (data, b"") if is_over else cut(data)
        self._parts, self._size = ([rest] if rest else []), len(rest)
        for headers in self._starts:
            self._note_encoding(headers)
        if complete and not self._is_encoded:
            self._learn(complete)
        if is_over and not self._suspects and self._has_nothing(complete):
            self._starts = []
            return
        if complete and not self._is_encoded and self._guard.table.may_hold(complete):
            self._suspects.append(complete)
        while self._suspects and (is_over or len(self._suspects) > MOST_SUSPECTS):
            self._add(self._hits_in(self._suspects.pop(0)))
        if is_over:
            starts, self._starts = self._starts, []
            for headers in starts:
                self._add(self._hits_in_headers(headers))

    def _has_nothing(self, rest: bytes) -> bool:
        """Whether nothing can be found in what is left: one quick look at all of it, which nearly always suffices."""
        headers = [part for headers in self._starts for pair in headers for part in pair]
        return not self._guard.table.may_hold(b" ".join((*headers, rest)))

    def _add(self, hits: list[Hit]) -> None:
        if len(self._found) < MOST_FOUND:
            self._found.update(dict.fromkeys(hits))


class BlockingAnswer(Looking):
    """For blocking: the start waits for the first of the body, and a run at the end of a part for the next one.

    A hit before anything has left is answered as an error of the application's own would be; a later one raises
    EgressBlockedError, which breaks the connection off.
    """

    __slots__ = ("_body_kind", "_is_broken", "_is_over", "_rest", "_start")

    def __init__(self, guard: EgressGuard, context: UserExecutionContext, exchange: Exchange, send: Send) -> None:
        super().__init__(guard, context, exchange, send)
        self._start: Message | None = None
        self._rest = b""
        self._body_kind = ""
        self._is_over = False
        self._is_broken = False

    async def send(self, message: Message) -> None:
        """Pass a message on, if nothing that is another's is in it."""
        if self._is_broken:
            raise _blocked()
        if self._is_over:  # it was answered with an error: what the app still says nobody sees
            return
        kind = message["type"]
        if "headers" in message:
            message = settled(message)
            if hits := self._hits_in_headers(message["headers"]):
                await self._hold_back(kind, hits)
                return
            self._note_encoding(message["headers"])
        if kind in _STARTS:
            self._start = message
        elif kind in _BODIES:
            self._body_kind = kind
            data, goes_on = self._rest + _body_of(message), message.get("more_body", False)
            complete, self._rest = cut(data) if goes_on and not self._is_encoded else (data, b"")
            if complete or not goes_on:
                await self._send_body({**message, "body": complete})
        else:
            await self._send_rest()
            if not self._is_over:
                await self._send_start()
                await self._send(message)

    async def finish(self) -> None:
        """The app has ended: what still waits is sent, as the app left it."""
        if self._is_broken:
            raise _blocked()
        await self._send_rest()
        if not self._is_over:
            await self._send_start()

    async def _send_body(self, message: Message) -> None:
        data = message["body"]
        if not self._is_encoded:
            if hits := self._hits_in(data):
                await self._hold_back(message["type"], hits)
                return
            self._learn(data)
        await self._send_start()
        await self._send(message)

    async def _send_rest(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            await self._send_body({"type": self._body_kind, "body": rest, "more_body": True})

    async def _send_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)

    def tell(self) -> None:
        """What was found was told at once."""

    async def _hold_back(self, kind: str, hits: list[Hit]) -> None:
        self._guard.report(self._context.user_id, hits, is_blocked=True)
        if self._start is None and kind not in _STARTS:
            self._is_broken = True
            raise _blocked()
        self._start, self._rest, self._is_over = None, b"", True
        prefix = "websocket.http.response" if kind.startswith("websocket") else "http.response"
        await self._send({"type": f"{prefix}.start", "status": 500, "headers": list(_ERROR_HEADERS)})
        await self._send({"type": f"{prefix}.body", "body": _ERROR})


def answer_for(guard: EgressGuard) -> type[WatchedAnswer] | type[BlockingAnswer]:
    """The kind of answer that the guard's policy asks for."""
    return BlockingAnswer if guard.policy.block else WatchedAnswer


def settled(message: Message) -> Message:
    """A message whose headers can be read more than once."""
    headers = message["headers"]
    return message if isinstance(headers, list | tuple) else {**message, "headers": list(headers or ())}


def _body_of(message: Message) -> bytes:
    body: object = message.get("body", b"")
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(f"the body of a message {message['type']!r} must be bytes, not {type(body).__name__}")
    return bytes(cast("bytes", body))


def _blocked() -> EgressBlockedError:
    return EgressBlockedError("what was to be sent has a protected value of another user in it, and was held back")
