"""The ASGI application of a server, as its framework makes it, with a gate in front of each of the transport's ends."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from ucm_middleware import ConfigurationError
from ucm_middleware.types import ASGIApp
from ucm_middleware_mcp.threads import Look, nothing_to_watch, watch_registered

Transport = Literal["http", "sse"]


@dataclass(frozen=True, slots=True)
class Served:
    """An application, the paths of what clients speak MCP to, and whether it keeps no sessions."""

    app: Starlette
    paths: tuple[str, ...]
    is_stateless: bool = False


def served_by_framework(server: Any, transport: Transport, options: dict[str, Any]) -> Served:
    """The application as the framework makes it. Raises ConfigurationError for what has none."""
    if hasattr(server, "http_app"):
        from ucm_middleware_mcp.fast import served_by_fastmcp

        return served_by_fastmcp(server, transport, options)
    if transport == "http":
        path = options.get("streamable_http_path", "/mcp")
        return Served(server.streamable_http_app(**options), (path,), bool(options.get("stateless_http")))
    if not isinstance(server, MCPServer):
        raise ConfigurationError("a low-level Server has no SSE application: serve it by http, or give an MCPServer")
    paths = options.get("sse_path", "/sse"), options.get("message_path", "/messages/")
    return Served(server.sse_app(**options), paths)


def put_gates(served: Served, gate: Callable[[ASGIApp], ASGIApp]) -> None:
    """Put a gate in front of each end, inside of what asks for a token there: that speaks first.

    Raises ConfigurationError when one is not found: nothing is served without.
    """
    wanted = {path.rstrip("/"): path for path in served.paths}
    missing = dict(wanted)
    for route in served.app.routes:
        if isinstance(route, Route | Mount) and (path := route.path.rstrip("/")) in wanted:
            missing.pop(path, None)
            if isinstance(route.app, RequireAuthMiddleware):
                route.app.app = gate(route.app.app)
            else:
                route.app = gate(route.app)
    if missing:
        raise ConfigurationError(
            f"the application of the MCP server has no route {', '.join(missing.values())}: another version of its "
            "framework may make it in another way"
        )


def sdk_server(server: Any) -> Server[Any]:
    """The SDK's server in whatever framework's. Raises ConfigurationError for what is none."""
    inner = getattr(server, "_lowlevel_server", None) or getattr(server, "_mcp_server", None)
    for found in (server, inner):
        if _is_server(found):
            return found
    raise ConfigurationError(
        f"a {type(server).__name__} is no MCP server: give an MCPServer or Server of mcp, or a FastMCP"
    )


def threads_of(server: Any) -> Look:
    """How what a server runs in threads is seen beforehand."""
    if isinstance(server, MCPServer):
        return partial(watch_registered, server)
    if hasattr(server, "http_app"):
        from ucm_middleware_mcp.fast import watch_threads

        watch_threads(server)
    return nothing_to_watch


def _is_server(value: object) -> TypeGuard[Server[Any]]:
    return isinstance(value, Server)
