"""MCP: the plugin, and what serves an MCP server to users."""

# FastMCP has no public way to the SDK's server inside of it, nor the SDK to what the state of a call is bound to.
# pyright: reportPrivateUsage=false

import sys
from typing import Any, ClassVar, Final, TypeGuard

from mcp.server import Server
from mcp.server.mcpserver import MCPServer
from mcp.server.request_state import RequestStateBoundary, authenticated_principal
from mcp.server.sse import SseServerTransport
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler
from starlette.applications import Starlette

from ucm_middleware import (
    ConfigurationError,
    UserContextManager,
    current_context,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.host import ContextHost
from ucm_middleware.types import ASGIApp
from ucm_middleware_mcp.bus import UserSubscriptionBus
from ucm_middleware_mcp.calls import UserCalls
from ucm_middleware_mcp.events import UserEventStore
from ucm_middleware_mcp.gate import SessionGate, SseGate
from ucm_middleware_mcp.identity import Identity, Resolve
from ucm_middleware_mcp.library import MCP_FLOOR, require
from ucm_middleware_mcp.serving import Transport, put_gates, sdk_server, served_by_framework, threads_of
from ucm_middleware_mcp.sessions import Sessions

require("mcp", MCP_FLOOR)

USER_VARIABLE = "UCM_MCP_USER"
"""The setting that names the one user of a server on standard input and output."""


_LONGEST_NAME: Final = 128


class MCP:
    """Serves MCP servers so that each message of a client runs as its caller, and each session belongs to its user.

    Give it to ``UserContextManager(plugins=[...])`` as well, so that revoking a user ends that user's sessions.

    ``resolve`` says which user an access token stands for, where the server authenticates by tokens; the SDK has
    verified it then. ``timeout`` is how many seconds one call may take, None for no end but the context's own.
    ``sessions_per_user`` is how many sessions over streamable HTTP a user may have open at a time, idle ones included:
    the SDK's own limit is one for all users. Raises ConfigurationError for a timeout or a number that is none.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    def __init__(
        self, *, resolve: Resolve | None = None, timeout: float | None = None, sessions_per_user: int = 100
    ) -> None:
        if timeout is not None and not 0 < timeout < float("inf"):
            raise ConfigurationError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
        if sessions_per_user < 1:
            raise ConfigurationError(f"sessions_per_user must be a number above 0, not {sessions_per_user!r}")
        self._resolve = resolve
        self._sessions_per_user = sessions_per_user
        self._timeout = timeout
        self._sessions = Sessions()

    def app(self, server: Any, *, transport: Transport = "http", **options: Any) -> Starlette:
        """The ASGI application of a server: an ``MCPServer`` or ``Server`` of the SDK, or a ``FastMCP``.

        ``options`` are those of the framework's own method: ``streamable_http_app``, ``sse_app``, ``http_app``. Put
        UserContextMiddleware around it, or around what it is mounted in. An ``event_store`` is made a UserEventStore.

        Raises ConfigurationError for what is no such server, and for one that another ``MCP`` serves.
        """
        if transport not in ("http", "sse"):
            raise ConfigurationError(f"transport must be 'http' or 'sse', not {transport!r}")
        self._prepare(server)
        store = options.get("event_store")
        if store is not None and not isinstance(store, UserEventStore):
            options["event_store"] = UserEventStore(store)
        served = served_by_framework(server, transport, options)

        def gate(app: ASGIApp) -> ASGIApp:
            identity = Identity(self._resolve, self._is_plugin_of)
            if transport == "sse":
                return SseGate(app, self._sessions, identity)
            most, is_stateless = self._sessions_per_user, served.is_stateless
            return SessionGate(app, self._sessions, identity, most=most, is_stateless=is_stateless)

        put_gates(served, gate)
        return served.app

    async def run_stdio(self, server: Any, manager: UserContextManager, user_id: str | None = None) -> None:
        """Serve one user on standard input and output, in one context, until the client leaves.

        The user is ``user_id``, or else the setting ``UCM_MCP_USER``. Raises ConfigurationError when neither names one.
        """
        self._prepare(server)
        user_id = user_id or manager.environment.get(USER_VARIABLE)
        if not user_id:
            raise ConfigurationError(
                f"a server on standard input and output has one user, and none is named: set {USER_VARIABLE}, or give "
                "run_stdio(..., user_id=...)"
            )
        async with managed_user_context(manager.create_isolated_context(user_id)):
            if isinstance(server, Server):
                async with stdio_server() as (read_stream, write_stream):
                    await server.run(read_stream, write_stream, server.create_initialization_options())
            else:
                await server.run_stdio_async(**({} if isinstance(server, MCPServer) else {"show_banner": False}))

    @hookimpl
    def ucm_user_revoked(self, user_id: str, reason: str) -> None:
        """End the sessions of a user who is signed out."""
        del reason  # it is on record already
        self._sessions.end_all_of(user_id)

    @hookimpl
    def ucm_shared_types(self) -> tuple[type, ...]:
        """What serves all users. FastMCP's servers too, where it is there; sessions are each one user's."""
        fast = sys.modules.get("fastmcp")
        return (
            *(MCP, Sessions, SessionGate, SseGate),
            *(Server, MCPServer, StreamableHTTPSessionManager, SseServerTransport),
            *(() if fast is None else (fast.FastMCP,)),
        )

    def _is_plugin_of(self, host: ContextHost) -> bool:
        """Whether the manager of a context tells this one of revocations."""
        return any(getattr(each.call, "__self__", None) is self for each in host.hooks.user_revoked)

    def _prepare(self, server: Any) -> None:
        """Put what runs messages as their callers into a server, once."""
        inner = sdk_server(server)
        there = [each for each in inner.middleware if isinstance(each, UserCalls)]
        if any(each.sessions is not self._sessions for each in there):
            raise ConfigurationError(f"the MCP server {inner.name!r} is served by another MCP() already")
        if there:
            return
        if not inner.name.isprintable() or len(inner.name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"the MCP server's name goes into records: let it be printable, and at most {_LONGEST_NAME} characters"
            )
        look = threads_of(server)
        inner.middleware.insert(0, UserCalls(f"mcp:{inner.name}", self._sessions, look, self._timeout))
        if _is_mcp_server(server):
            _own_subscriptions(server)
        for each in inner.middleware:
            if isinstance(each, RequestStateBoundary) and each._security.bind_principal is authenticated_principal:
                each._security.bind_principal = _principal


def _is_mcp_server(server: object) -> TypeGuard[MCPServer[Any]]:
    return isinstance(server, MCPServer)


def _own_subscriptions(server: MCPServer[Any]) -> None:
    """In place of the bus that the SDK makes where the application gives none: that one tells everybody everything."""
    entry = server._lowlevel_server.get_request_handler("subscriptions/listen")
    listen = None if entry is None else entry.handler
    if isinstance(listen, ListenHandler) and type(server._subscriptions) is InMemorySubscriptionBus:
        server._subscriptions = listen._bus = UserSubscriptionBus()


def _principal(ctx: Any) -> str | None:
    """Who the state of a call in several rounds belongs to: the user, and the client that acts for the user."""
    context = current_context()
    if context.is_anonymous:
        return authenticated_principal(ctx)
    return f"{context.user_id}\n{authenticated_principal(ctx)}"
