"""Apps that show what they take a client for: by a bearer token, with and without compulsion, a session, a login.

A token is the JSON of what the resolver makes of it, in hexadecimal, so that a test can have the resolver say anything.
"""

import json
from typing import Any

from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from ucm_middleware import (
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
    authenticated_user,
    bearer_token,
    session_user,
    user_context,
)

journal = Journal()
manager = UserContextManager()


def shown(connection: HTTPConnection) -> dict[str, Any]:
    """All that the product says of the client."""
    context = user_context(connection)
    return {
        **context.to_dict(),
        "trail": context.get_audit_trail(),
        "events": manager.get_audit_trail(context.user_id),
        "listed": list(manager.get_active_contexts().values()),
        "agent_context": context.agent_context,
    }


async def who(request: Request) -> JSONResponse:
    journal.note("called")
    return JSONResponse(shown(request))


async def who_websocket(websocket: WebSocket) -> None:
    journal.note("called")
    await websocket.accept()
    await websocket.send_json(shown(websocket))
    await websocket.close()


async def login(request: Request) -> JSONResponse:
    request.session["user_id"] = request.query_params["user"]
    return JSONResponse(None)


routes = [Route("/who", who), WebSocketRoute("/who", who_websocket), Route("/login", login, methods=["POST"])]


def verify(token: str) -> Any:
    """What the token stands for; None for one that nobody issued."""
    if not token.startswith("7b"):  # the hexadecimal of a brace
        return None
    issued = json.loads(bytes.fromhex(token))
    match issued.get("error"):
        case "teapot":
            raise HTTPException(418, "not my kind of token", headers={"X-Reason": "tea"})
        case "expired":
            raise UnauthenticatedError("expired")
        case "crash":
            raise RuntimeError("the resolver's own fault")
    return issued["user"]


class TokenBackend(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        token = conn.headers.get("authorization", "").removeprefix("Bearer ")
        return (AuthCredentials(), SimpleUser(verify(token))) if token else None


class WithoutDenialResponses:
    """Plays a server that cannot answer a WebSocket handshake but by closing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope = {**scope, "extensions": {}}
        await self.app(scope, receive, send)


def served(*middleware: Middleware) -> Starlette:
    return Starlette(routes=routes, middleware=middleware)


by_token: dict[str, Any] = {"manager": manager, "identify": bearer_token(verify)}
by_another_token = Middleware(
    UserContextMiddleware,
    manager=manager,
    identify=lambda connection: verify(connection.headers.get("x-token", "")),
    require_identity=True,
)
strictly = Middleware(UserContextMiddleware, **by_token, require_identity=True)
app = Starlette(
    routes=[
        Mount("/open", served(Middleware(UserContextMiddleware, **by_token))),
        Mount("/strict", served(strictly)),
        Mount("/without-denial", served(Middleware(WithoutDenialResponses), strictly)),
        Mount("/unresolved", served(Middleware(UserContextMiddleware, manager=manager))),
        Mount("/inside-unresolved", served(Middleware(UserContextMiddleware, manager=manager), strictly)),
        Mount("/inside-open", served(Middleware(UserContextMiddleware, **by_token), by_another_token)),
        Mount(
            "/session",
            served(
                Middleware(SessionMiddleware, secret_key="the server's secret"),
                Middleware(UserContextMiddleware, manager=manager, identify=session_user()),
            ),
        ),
        Mount(
            "/login",
            served(
                Middleware(AuthenticationMiddleware, backend=TokenBackend()),
                Middleware(UserContextMiddleware, manager=manager, identify=authenticated_user),
            ),
        ),
    ],
    middleware=[Middleware(Door, manager=manager, journal=journal)],
)
