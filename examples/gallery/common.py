"""What the applications of the gallery have in common: two customers, how they sign in, and where a handler works."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from ucm_middleware import UserContextManager, UserContextMiddleware, UserExecutionContext, bearer_token

USERS: Final = ("alice", "bob")
TOKENS: Final = {f"token-of-{user}": user for user in USERS}

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


@dataclass(slots=True)
class Account:
    """A customer's account. ``api_key`` is the secret in it: whoever is shown another's has found the bug."""

    user_id: str
    api_key: str

    def to_json(self) -> dict[str, Any]:
        """As the customer is shown it."""
        return {"user": self.user_id, "api_key": self.api_key}


def api_key_of(user_id: str) -> str:
    """The canary of a user: 40 hexadecimal digits, the same in every process, and in nobody else's account."""
    return hashlib.sha256(f"gallery: api key of {user_id}".encode()).hexdigest()[:40]


def load_account(user_id: str) -> Account:
    """Read an account, as a new object each time, as a database would give it."""
    return Account(user_id, api_key_of(user_id))


identify: Final = bearer_token(TOKENS.get)


def signed_in(connection: HTTPConnection) -> str:
    """Who calls. Raises HTTPException, answered with 401, without a token of theirs."""
    user = TOKENS.get(connection.headers.get("authorization", "").removeprefix("Bearer "))
    if user is None:
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})
    return user


def workspace(connection: HTTPConnection) -> dict[str, Any]:
    """Where a handler keeps what it works on: the context's data under the middleware, else a dict of the request's."""
    context = connection.scope.get("state", {}).get("user_context")
    if isinstance(context, UserExecutionContext):
        return context.agent_context
    work: dict[str, Any] = connection.scope.setdefault("gallery.workspace", {})
    return work


async def show_account(request: Request) -> JSONResponse:
    """My account, key included: everybody may see their own."""
    return JSONResponse(load_account(signed_in(request)).to_json())


def make_app(
    routes: Sequence[BaseRoute],
    manager: UserContextManager | None,
    *,
    lifespan: Lifespan | None = None,
    inner: Sequence[Middleware] = (),
) -> Starlette:
    """An application with these routes and ``/account``; with a manager, in the middleware. ``inner`` stands inside."""
    outer = (
        []
        if manager is None
        else [Middleware(UserContextMiddleware, manager=manager, identify=identify, require_identity=True)]
    )
    return Starlette(routes=[Route("/account", show_account), *routes], middleware=[*outer, *inner], lifespan=lifespan)
