"""An MCP server of one of the frameworks, with the adapter or without, on one of the transports; see test_mcp_*.py."""

import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

from apps_sdk import sdk_server
from event_store import MemoryEventStore
from mcp.server.auth.provider import AccessToken
from mcp.server.streamable_http import EventStore
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from ucm_middleware import EVERYONE, UserContextManager, UserContextMiddleware
from ucm_middleware.identity import Identified
from ucm_middleware_mcp import MCP, UserEventStore

FRAMEWORK = os.environ["NOTES_FRAMEWORK"]
GUARDED = os.environ["NOTES_GUARDED"] == "1"
BY_TOKEN = os.environ.get("NOTES_AUTH") == "token"


def resolve(token: AccessToken) -> Identified:
    return token.subject


mcp = MCP(resolve=resolve if BY_TOKEN else None, timeout=float(os.environ.get("NOTES_TIMEOUT", "60")))
manager = UserContextManager(plugins=[mcp])


def event_store() -> EventStore:
    return UserEventStore(MemoryEventStore()) if GUARDED else MemoryEventStore()


def made(transport: Literal["http", "sse"], **options: Any) -> Starlette:
    found: Starlette
    if GUARDED:
        found = mcp.app(server, transport=transport, **options)
    elif FRAMEWORK == "fastmcp":
        found = server.http_app(transport=transport, **options)
    else:
        found = server.sse_app(**options) if transport == "sse" else server.streamable_http_app(**options)
    return found


if FRAMEWORK == "fastmcp":
    from apps_fast import fast_server

    server: Any = fast_server(guarded=GUARDED, by_token=BY_TOKEN)
else:
    server = sdk_server(guarded=GUARDED, by_token=BY_TOKEN)

# One server on every transport that there is.
apps = {
    "/events": made("http", event_store=event_store()),
    "/stateless": made("http", stateless_http=True),
    "/older": made("sse"),
    "": made("http"),
}


def identify(connection: Any) -> Identified:
    # For the test alone: who calls says who it is.
    return connection.headers.get("user")  # type: ignore[no-any-return]


async def revoke(request: Request) -> JSONResponse:
    with manager.privileged(reason="test", users=[request.path_params["user"]]):
        return JSONResponse(manager.revoke(request.path_params["user"], "test"))


async def trail(request: Request) -> JSONResponse:
    user = request.path_params["user"]
    with manager.privileged(reason="test", users=[user]):
        found = manager.get_audit_trail(user) or {"events": []}
    return JSONResponse([{name: repr(value) for name, value in dict(event).items()} for event in found["events"]])


async def live(_: Request) -> JSONResponse:
    with manager.privileged(reason="test", users=EVERYONE):
        sessions = getattr(mcp, "_sessions")  # noqa: B009
        return JSONResponse(
            {
                "sessions": len(sessions),
                "contexts": sorted(shown["user_id"] for shown in manager.get_active_contexts().values()),
            }
        )


async def isolation(_: Request) -> JSONResponse:
    with manager.privileged(reason="test", users=EVERYONE):
        report = manager.isolation_report()
        users = sorted({shown["user_id"] for shown in manager.get_active_contexts().values()})
    return JSONResponse({"users": users, "found": [str(one) for one in report.findings], "whole": report.is_complete})


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    async with AsyncExitStack() as stack:
        for inner in apps.values():
            await stack.enter_async_context(inner.router.lifespan_context(inner))
        yield


routes = [
    Route("/revoke/{user}", revoke, methods=["POST"]),
    Route("/trail/{user}", trail),
    Route("/live", live),
    Route("/isolation", isolation),
    *(Mount(path, inner) for path, inner in apps.items()),
]
app = Starlette(routes=routes, lifespan=lifespan)
app.add_middleware(UserContextMiddleware, manager=manager, identify=None if BY_TOKEN else identify)
