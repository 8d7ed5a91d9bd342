"""Each message of a client in its caller's context: a middleware of the SDK's own, the outermost."""

# The SDK lets middlewares push onto a connection's exit stack, and has no public way yet from a message to it.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Final, cast

from mcp.server.connection import Connection
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_REQUEST, REQUEST_TIMEOUT, CallToolResult

from ucm_middleware import (
    AgentTimeoutError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextError,
    UserExecutionContext,
    agent_run,
    current_context,
    user_context,
)
from ucm_middleware.agents import ToolCall
from ucm_middleware.refusal import refusal_for
from ucm_middleware_mcp.exchange import Exchange, exchange_of
from ucm_middleware_mcp.outbound import OwnedChannel
from ucm_middleware_mcp.sessions import Sessions, serving
from ucm_middleware_mcp.threads import Look, under_way

logger = logging.getLogger(__name__)

HANDSHAKE: Final = frozenset(
    {
        "initialize",
        "ping",
        "server/discover",
        "notifications/initialized",
        "notifications/cancelled",
        "subscriptions/listen",
    }
)
"""What runs in the context of its request itself: either nothing of the application's runs, or it lasts as long as the
connection.
"""

_OWNER: Final = "ucm_middleware_mcp.owner"
_NAME: Final = re.compile(r"[\w./:-]{1,128}")


class ToolFailed(Exception):  # noqa: N818 - what records call it
    """A tool answered that it failed: what it raised, the SDK has made an answer of already."""


class UserCalls:
    """A ``ServerMiddleware``: it runs each request and notification as its caller, and nobody else's.

    ``agent`` names the runs in events, records and spans, ``look`` is told of what is about to run, ``timeout`` is in
    seconds.
    """

    def __init__(self, agent: str, sessions: Sessions, look: Look, timeout: float | None) -> None:
        self.agent = agent
        self.sessions = sessions
        self._look = look
        self._timeout = timeout

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        exchange = exchange_of(ctx.request)
        if exchange is None:
            _require_no_request(ctx)
            exchange = Exchange()
        exchange.resumable = exchange.resumable or ctx.close_sse_stream is not None
        result: HandlerResult = None
        with exchange.call() as scope:
            try:
                caller = _caller(ctx)
                self._claim(ctx.session._connection, caller)
                _guard_replies(ctx, caller)
                if ctx.method in HANDSHAKE:
                    result = await call_next(ctx)
                else:
                    result = await self._run(ctx, call_next, caller)
            except UserContextError as error:
                raise _as_answer(error) from error
        if scope.cancelled_caught:
            raise MCPError(INVALID_REQUEST, "the request was given up")
        return result

    async def _run(
        self, ctx: ServerRequestContext[Any, Any], call_next: CallNext, caller: UserExecutionContext
    ) -> HandlerResult:
        async with agent_run(caller, self.agent, {"method": ctx.method}) as run:
            self._look(ctx.method, ctx.params or {})
            call = run.tool(_tool_name(ctx))
            with call, _under_way(call):
                limit = asyncio.timeout(self._timeout)
                try:
                    async with limit:
                        result = await call_next(ctx)
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    remedy = "mend what it waits for, or give MCP() a longer timeout"
                    raise AgentTimeoutError(
                        self.agent, f"did not end within {self._timeout:g} seconds", remedy
                    ) from error
                if _has_failed(result):
                    call.end(ToolFailed())
                return result

    def _claim(self, connection: Connection, caller: UserExecutionContext) -> None:
        """Let a connection belong to the first who speaks on it, and refuse everybody else, as if it were not there."""
        owner = connection.state.get(_OWNER)
        host = caller.host
        if owner is None and host is not None:
            if connection.session_id is not None:
                if caller.is_anonymous:
                    raise MCPError(INVALID_REQUEST, "an MCP session belongs to a user")
                if (session := serving.get()) is not None:
                    connection.exit_stack.callback(self.sessions.forget, session)
                    session.is_known = True
            connection.state[_OWNER] = owner = caller.user_id
            if connection.has_standalone_channel:
                connection.outbound = OwnedChannel(connection.outbound, host, owner)
        if host is None or owner != caller.user_id:
            if host is not None and owner is not None:
                with suppress(CrossUserAccessError):  # it is on record then
                    host.require_owner(owner, "mcp_session")
            raise MCPError(INVALID_REQUEST, "Session not found")


@contextmanager
def _under_way(call: ToolCall) -> Generator[None]:
    token = under_way.set(call)
    try:
        yield
    finally:
        under_way.reset(token)


def _caller(ctx: ServerRequestContext[Any, Any]) -> UserExecutionContext:
    """The context of who sent the message: the one that is current, which must be the request's own user's."""
    context = current_context()
    request: Any = ctx.request
    if hasattr(request, "scope") and user_context(request).user_id != context.user_id:
        raise CrossUserAccessError("the message was sent by another user than this code runs for")
    return context


def _require_no_request(ctx: ServerRequestContext[Any, Any]) -> None:
    """Refuse what came over HTTP past the gate: cancellations and replies would come to sessions of other users' there,
    and no middleware of the SDK's sees those.
    """
    scope = getattr(ctx.request, "scope", None)
    if scope is not None and scope.get("type") == "http":
        logger.error("a server that MCP() has prepared is served past it: serve the application that MCP().app() gives")
        raise MCPError(INVALID_REQUEST, "The server is not set up for this.")


def _guard_replies(ctx: ServerRequestContext[Any, Any], caller: UserExecutionContext) -> None:
    if caller.host is not None:
        channel = OwnedChannel(ctx.session._request_outbound, caller.host, caller.user_id)
        ctx.session._request_outbound = cast("Any", channel)  # which passes on what else the session uses of it


def _tool_name(ctx: ServerRequestContext[Any, Any]) -> str:
    """What a call is called in records: the tool's name where it looks like one, since clients may write anything."""
    name = ctx.params.get("name") if ctx.method == "tools/call" and ctx.params else None
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    return ctx.method if _NAME.fullmatch(ctx.method) else "request"


def _has_failed(result: HandlerResult) -> bool:
    if isinstance(result, CallToolResult):
        return result.is_error is True
    return isinstance(result, dict) and result.get("isError") is True


def _as_answer(error: UserContextError) -> MCPError:
    """What a client is told: no more than over plain HTTP."""
    if isinstance(error, ContextNotFoundError):
        return MCPError(INVALID_REQUEST, "The request belongs to no user.")
    if isinstance(error, AgentTimeoutError):
        return MCPError(REQUEST_TIMEOUT, "The call took too long.")
    refusal = refusal_for(error)
    return MCPError(INVALID_REQUEST, "Not allowed." if refusal is None else str(refusal.detail))
