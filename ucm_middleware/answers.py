"""Strict mode: the outcome of a request is on record, for good, before the last of its answer leaves."""

from typing import Final

from ucm_middleware.audit.ledger import DurableLedger
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import LedgerUnavailableError
from ucm_middleware.refusal import BODILESS, refusal_for, send_refusal
from ucm_middleware.types import Message, Scope, Send

_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start"})
_TRAILERS: Final = "http.response.trailers"
_BODIES: Final = frozenset({"http.response.body", "http.response.zerocopysend", "websocket.http.response.body"})


class RecordedAnswer:
    """Stands between the app and the server's ``send``.

    What ends an answer is what the client takes for its end: the last byte that ``content-length`` announces, the
    headers where there is no body, trailers, a message that says it is the last. The start is held back until something
    follows it: when the outcome of a short answer cannot be recorded, a refusal takes its place. Of a long one, which
    is under way by then, the last message is not sent, and LedgerUnavailableError is raised, so that the server breaks
    the connection off and the client sees that it is incomplete.
    """

    __slots__ = (
        "_body_left",
        "_context",
        "_has_trailers",
        "_is_recorded",
        "_is_refused",
        "_ledger",
        "_scope",
        "_send",
        "_start",
        "_status",
        "_trail",
    )

    def __init__(
        self, context: UserExecutionContext, trail: AuditTrail, ledger: DurableLedger, scope: Scope, send: Send
    ) -> None:
        self._context = context
        self._trail = trail
        self._ledger = ledger
        self._scope = scope
        self._send = send
        self._start: Message | None = None
        self._status: int | None = None
        self._body_left: int | None = None  # bytes, where the answer says how many there are
        self._has_trailers = False
        self._is_recorded = False
        self._is_refused = False

    async def send(self, message: Message) -> None:
        """Pass a message on, the last one once the outcome is durable."""
        if self._is_refused:  # what the app still says is an answer that nobody will see
            return
        if message["type"] in _STARTS:
            self._start = message
            self._status = message["status"]
            self._body_left = self._body_length(message)
            # Where the server has none, they are not sent.
            self._has_trailers = bool(message.get("trailers")) and _TRAILERS in self._scope.get("extensions", {})
            return
        if not self._is_recorded and self._is_last(message) and not await self._recorded():
            return
        await self._send_start()
        await self._send(message)

    async def finish(self) -> None:
        """The app has ended: an answer without an end is on record too, and a start that nothing followed is sent."""
        if not self._is_refused and (self._is_recorded or await self._recorded()):
            await self._send_start()

    def _is_last(self, message: Message) -> bool:
        kind = message["type"]
        if kind in _BODIES:
            if self._body_left is not None:  # what ends an answer for the client, whatever more the app says
                self._body_left -= len(message.get("body", b""))
                if self._body_left <= 0 and not self._has_trailers:
                    return True
            return not message.get("more_body", False) and not self._has_trailers
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        if kind == "websocket.close":
            self._status = message.get("code", 1000)
            return True
        return bool(kind == "http.response.pathsend")

    async def _recorded(self) -> bool:
        """Write the outcome down. False when that cannot be done, and the client was told so instead."""
        try:
            self._trail.answered(self._context, self._status)
            await self._ledger.durable()
            self._is_recorded = True
        except LedgerUnavailableError as error:
            refusal = refusal_for(error)
            if refusal is None or self._start is None:
                raise
            self._start = None
            self._is_refused = await send_refusal(refusal, self._scope, self._send, None) is not None
            return False
        return True

    def _body_length(self, start: Message) -> int | None:
        """How many bytes of a body the client waits for; None where only their end tells."""
        if self._scope.get("method") == "HEAD" or start["status"] in BODILESS:
            return 0
        lengths = [value for name, value in start.get("headers", ()) if name.lower() == b"content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else None

    async def _send_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)
