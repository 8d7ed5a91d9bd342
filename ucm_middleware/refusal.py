"""What a client is told: one table from errors to answers, and the sending of them."""

import json
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from starlette.exceptions import HTTPException, WebSocketException

from ucm_middleware.errors import (
    ClusterUnavailableError,
    ContextClosedError,
    ContextLimitError,
    CrossUserAccessError,
    IdentityConflictError,
    InvalidContextError,
    LedgerUnavailableError,
    ManagerDrainingError,
    MessageLimitError,
    OriginError,
    UnauthenticatedError,
    UserContextError,
)
from ucm_middleware.types import Scope, Send

logger = logging.getLogger(__name__)

POLICY_VIOLATION: Final = 1008
MESSAGE_TOO_BIG: Final = 1009
TRY_AGAIN_LATER: Final = 1013
BODILESS: Final = frozenset({204, 205, 304})


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer: the HTTP status, the WebSocket close code after accept, what to say as JSON, and more headers."""

    status: int
    close_code: int
    detail: Any
    headers: tuple[tuple[bytes, bytes], ...] = ()


_RETRY: Final = ((b"retry-after", b"1"),)
_CHALLENGE: Final = ((b"www-authenticate", b"Bearer"),)

_DRAINING: Final = Refusal(503, TRY_AGAIN_LATER, "The server is shutting down.", _RETRY)
_UNAVAILABLE: Final = Refusal(503, TRY_AGAIN_LATER, "The server cannot do this at the moment.", _RETRY)
_UNAUTHENTICATED: Final = Refusal(401, POLICY_VIOLATION, "Valid credentials are required.", _CHALLENGE)

_ID_FIELDS: Final = frozenset(
    {"user_id", "thread_id", "run_id", "request_id", "websocket_client_id", "client_id", "connection_id", "ids", "key"}
)

_BY_ERROR: Final[tuple[tuple[type[UserContextError], Refusal], ...]] = (
    (UnauthenticatedError, _UNAUTHENTICATED),
    (IdentityConflictError, Refusal(409, POLICY_VIOLATION, "The request already has another identity.")),
    (CrossUserAccessError, Refusal(403, POLICY_VIOLATION, "Not allowed.")),
    (ContextLimitError, Refusal(429, TRY_AGAIN_LATER, "Too many open requests and connections.", _RETRY)),
    (ManagerDrainingError, _DRAINING),
    (OriginError, Refusal(403, POLICY_VIOLATION, "Not allowed.")),
    (LedgerUnavailableError, _UNAVAILABLE),
)

_BY_REASON: Final = {
    "expired": Refusal(504, POLICY_VIOLATION, "The time for this request has run out."),
    "revoked": _UNAUTHENTICATED,
    "shutdown": _DRAINING,
    "slow": Refusal(503, TRY_AGAIN_LATER, "The connection does not keep up."),
    "lost": _UNAVAILABLE,
}
_BY_SCOPE: Final = {
    "size": Refusal(413, MESSAGE_TOO_BIG, "The message is too big."),
    "rate": Refusal(429, POLICY_VIOLATION, "Too many messages."),
}


def refusal_for(error: BaseException) -> Refusal | None:
    """The answer to an error; None for those that are the application's own fault, which it must see as they are.

    A group, as of an ``asyncio.TaskGroup``, has the answer that all of its errors have.
    """
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        first, *others = (refusal_for(one) for one in group.exceptions)
        return first if all(other == first for other in others) else None
    if isinstance(error, InvalidContextError):
        # Only what a client can have given, which is text: data that cannot be copied, say, is the application's own,
        # and so are its keys.
        if error.is_wrong_type or error.field not in _ID_FIELDS:
            return None
        return Refusal(400, POLICY_VIOLATION, f"{error.field}: {error.rule}")
    if isinstance(error, MessageLimitError):
        return _BY_SCOPE[error.scope]
    if isinstance(error, ClusterUnavailableError):
        seconds = str(max(1, math.ceil(error.retry_after))).encode()
        return replace(_UNAVAILABLE, headers=((b"retry-after", seconds),))
    if isinstance(error, ContextClosedError):
        return _BY_REASON.get(error.reason)
    return next((refusal for kind, refusal in _BY_ERROR if isinstance(error, kind)), None)


def refusal_for_reason(reason: str | None) -> Refusal | None:
    """The answer to a request whose context was closed under it."""
    return None if reason is None else _BY_REASON.get(reason)


def refusal_for_starlette(error: HTTPException | WebSocketException) -> Refusal:
    """The answer to an exception of Starlette's own."""
    if isinstance(error, WebSocketException):
        return Refusal(403, error.code, error.reason)
    headers = tuple((name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items())
    return Refusal(error.status_code, POLICY_VIOLATION, error.detail, headers)


async def send_refusal(refusal: Refusal, scope: Scope, send: Send, last_sent: str | None) -> str | None:
    """Answer, if the state of the exchange still allows it. ``last_sent`` is the type of the message sent last.

    Returns in words what was answered, None for nothing.
    """
    try:
        return await _send_refusal(refusal, scope, send, last_sent)
    except (OSError, RuntimeError) as error:  # what servers raise when the client has gone, each in its own way
        logger.debug("a refusal with %d could not be sent: %s", refusal.status, error)
        return None


async def _send_refusal(refusal: Refusal, scope: Scope, send: Send, last_sent: str | None) -> str | None:
    if scope["type"] == "http":
        return None if last_sent is not None else await _respond(refusal, "http.response", send)
    if last_sent is None and "websocket.http.response" in scope.get("extensions", {}):
        return await _respond(refusal, "websocket.http.response", send)
    return await _close(refusal, send) if last_sent in (None, "websocket.accept", "websocket.send") else None


async def _close(refusal: Refusal, send: Send) -> str:
    await send({"type": "websocket.close", "code": refusal.close_code, "reason": close_reason(refusal)})
    return f"closed with {refusal.close_code}"


def close_reason(refusal: Refusal) -> str:
    """What a close frame says of it, which has room for 123 bytes of text: RFC 6455, section 5.5."""
    return str(refusal.detail).encode()[:123].decode(errors="ignore")  # what is cut must still be UTF-8


def http_answer(refusal: Refusal) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers, their names in lower case, and body."""
    headers = [(b"cache-control", b"no-store"), *refusal.headers]
    body = b""
    if refusal.status not in BODILESS:
        body = json.dumps({"detail": refusal.detail}).encode()
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return headers, body


async def _respond(refusal: Refusal, kind: str, send: Send) -> str:
    headers, body = http_answer(refusal)
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
    return f"answered with {refusal.status}"
