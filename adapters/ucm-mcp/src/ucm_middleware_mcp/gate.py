"""The gate in front of a transport: a session is its user's, and for anybody else it does not exist.

Both gates are ASGI applications, inside of what authenticates by tokens. Who names a session of another user's goes on
as one who named a session that never was: so the SDK answers both alike, in its own words, and nothing here knows
those.
"""

import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final
from urllib.parse import parse_qsl, urlencode
from uuid import UUID, uuid4

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.exceptions import HTTPException

from ucm_middleware import (
    CrossUserAccessError,
    UnauthenticatedError,
    UserContextError,
    UserExecutionContext,
)
from ucm_middleware.refusal import refusal_for, refusal_for_starlette, send_refusal
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send
from ucm_middleware_mcp.exchange import EXCHANGE, Exchange
from ucm_middleware_mcp.identity import Identity
from ucm_middleware_mcp.sessions import Session, Sessions, serving

SESSION_HEADER: Final = b"mcp-session-id"
VERSION_HEADER: Final = b"mcp-protocol-version"
_ENDPOINT: Final = re.compile(rb"\Aevent: endpoint\r?\ndata: [^\r\n]*[?&]session_id=([0-9a-f]{32})\b")
_NO_USER: Final = "an MCP session belongs to a user: sign in, or call without a session"
_TOO_MANY: Final = "Too many open MCP sessions."
_OK: Final = 200
_ACCEPTED: Final = 202


class Gate:
    """What both have in common: who calls, and how long the request's context must live."""

    def __init__(self, app: ASGIApp, sessions: Sessions, identity: Identity) -> None:
        self.app = app
        self.sessions = sessions
        self.identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            context = await self.identity.context_of(scope)
            session, scope = self._admitted(scope, context)
        except (UserContextError, HTTPException) as error:
            refusal = refusal_for(error) if isinstance(error, UserContextError) else refusal_for_starlette(error)
            if refusal is None:
                raise
            await send_refusal(refusal, scope, send, None)
            return
        exchange = scope[EXCHANGE] = Exchange()
        watch = _Watch(send, None if session is None else self._seen(session))
        token = serving.set(session)
        try:
            await self.app(scope, receive, watch.send)
            await exchange.settle(wait=exchange.resumable or watch.status == _ACCEPTED)
        finally:
            serving.reset(token)
            if session is not None:
                self._left(session, scope["method"], watch.status)

    def _admitted(self, scope: Scope, context: UserExecutionContext) -> tuple[Session | None, Scope]:
        """The session that a request is for, if it has or may open one, and the scope to go on with.

        Raises UnauthenticatedError for what would open a session for nobody.
        """
        raise NotImplementedError

    def _seen(self, session: Session) -> "Callable[[Message], None] | None":
        """What looks at the answer, for a session that may be opened by it."""
        raise NotImplementedError

    def _left(self, session: Session, method: str, status: int) -> None:
        """The request is through, answered with that status; 0 where it was not."""

    def _owned(self, found: Session | None, context: UserExecutionContext) -> Session | None:
        """The session, if it is the caller's. What it is not is put on record, and then it is none."""
        if found is None or found.owner == context.user_id:
            return found
        if context.host is not None:
            with suppress(CrossUserAccessError):  # it is on record then
                context.host.require_owner(found.owner, "mcp_session")
        return None


class SessionGate(Gate):
    """In front of streamable HTTP, where a header names the session."""

    def __init__(self, app: ASGIApp, sessions: Sessions, identity: Identity, *, most: int, is_stateless: bool) -> None:
        super().__init__(app, sessions, identity)
        self.most = most
        self.is_stateless = is_stateless

    def _admitted(self, scope: Scope, context: UserExecutionContext) -> tuple[Session | None, Scope]:
        scope = {**scope}
        named = [value for name, value in scope["headers"] if name == SESSION_HEADER]
        if not named:
            if self.is_stateless or scope["method"] != "POST" or not _speaks_handshake(scope["headers"]):
                return None, scope
            if context.is_anonymous:
                raise UnauthenticatedError(_NO_USER)
            goodbye = _goodbye(scope)

            async def end(session: Session) -> None:
                name = (SESSION_HEADER, (session.session_id or "").encode("latin-1"))
                await self.app({**goodbye, "headers": [*goodbye["headers"], name]}, _no_body, _unheard)

            session = Session(context.user_id, end)
            if not self.sessions.begin(session, self.most):
                raise HTTPException(429, _TOO_MANY, {"Retry-After": "1"})
            return session, scope
        # Of several headers the SDK would take one: they name nothing.
        found = self.sessions.get(named[0].decode("latin-1")) if len(named) == 1 else None
        known = self._owned(found, context)
        if known is None:
            scope["headers"] = [*_without(scope["headers"], SESSION_HEADER), (SESSION_HEADER, uuid4().hex.encode())]
        return known, scope

    def _seen(self, session: Session) -> "Callable[[Message], None] | None":
        if session.session_id is not None:
            return None

        def look(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and session.session_id is None:
                for name, value in message["headers"]:
                    if name.lower() == SESSION_HEADER:
                        self.sessions.add(session, value.decode("latin-1"))

        return look

    def _left(self, session: Session, method: str, status: int) -> None:
        if session.session_id is None or (method == "DELETE" and status == _OK):
            self.sessions.forget(session)
        elif not session.is_known:
            self.sessions.end(session)  # what opened it never came to be handled: nobody would say when it ends


class SseGate(Gate):
    """In front of the older SSE transport, where the query of each message names the session."""

    def _admitted(self, scope: Scope, context: UserExecutionContext) -> tuple[Session | None, Scope]:
        scope = {**scope}
        if scope["method"] != "POST":  # HEAD opens a stream as GET does
            if context.is_anonymous:
                raise UnauthenticatedError(_NO_USER)
            return Session(context.user_id, _nothing_to_end), scope
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        named = [value for name, value in query if name == "session_id"]
        if not named:
            return None, scope
        found = self.sessions.get(_plain(named[0])) if len(named) == 1 else None
        session = self._owned(found, context)
        if session is None and _plain(named[-1]):
            others = [pair for pair in query if pair[0] != "session_id"]
            scope["query_string"] = urlencode([*others, ("session_id", uuid4().hex)]).encode()
        return session, scope

    def _seen(self, session: Session) -> "Callable[[Message], None] | None":
        if session.session_id is not None:
            return None

        def look(message: Message) -> None:
            if message["type"] != "http.response.body" or session.session_id is not None:
                return
            if found := _ENDPOINT.match(message.get("body", b"")):
                self.sessions.add(session, found[1].decode())

        return look

    def _left(self, session: Session, method: str, status: int) -> None:
        if method != "POST" and session.session_id is not None:
            self.sessions.forget(session)


_KEPT: Final = (
    *("type", "asgi", "http_version", "scheme", "path", "raw_path", "root_path", "app_root_path", "query_string"),
    *("server", "client", "app", "user", "auth"),
)


def _goodbye(opening: Scope) -> Scope:
    """With what a session is ended as its client would end it: of the request that opened it, and nothing that is
    secret there or that would live as long as the session.
    """
    scope: Scope = {name: opening[name] for name in _KEPT if name in opening}
    user = scope.get("user")
    if isinstance(user, AuthenticatedUser):  # who it is, without what proves it
        scope["user"] = AuthenticatedUser(user.access_token.model_copy(update={"token": ""}))
    headers = [header for header in opening["headers"] if header[0] == b"host"]
    return {**scope, "method": "DELETE", "state": {}, "headers": headers}


class _Watch:
    """Passes an answer on, and notes its status."""

    __slots__ = ("_look", "_send", "status")

    def __init__(self, send: Send, look: Callable[[Message], None] | None) -> None:
        self._send = send
        self._look = look
        self.status = 0

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        if self._look is not None:
            self._look(message)
        return self._send(message)


def _speaks_handshake(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the SDK takes the request for one of the protocols that have sessions: by its header, or the lack of it.

    It goes by the first of several.
    """
    spoken = next((value.decode("latin-1") for name, value in headers if name == VERSION_HEADER), None)
    return spoken is None or spoken in HANDSHAKE_PROTOCOL_VERSIONS


def _without(headers: Iterable[tuple[bytes, bytes]], unwanted: bytes) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0] != unwanted]


def _plain(session_id: str) -> str:
    """The one spelling of a session id of the SSE transport, which takes several; empty for what is none."""
    try:
        return UUID(hex=session_id).hex
    except ValueError:
        return ""


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _unheard(_: Message) -> None:
    return None


async def _nothing_to_end(_: Session) -> None:
    """The session is the connection, whose context has closed: it ends with that."""
