"""Who a request comes from: the context that is there already, or the token that the SDK's own authentication found."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from inspect import isawaitable

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.requests import HTTPConnection

from ucm_middleware import (
    ConfigurationError,
    ContextNotFoundError,
    Principal,
    UnauthenticatedError,
    UserExecutionContext,
    user_context,
)
from ucm_middleware.host import ContextHost
from ucm_middleware.identity import Identified
from ucm_middleware.types import Scope

Resolve = Callable[[AccessToken], Identified | Awaitable[Identified]]
"""From a verified token to the user that it stands for: a Principal, a user id, None for nobody."""


class Identity:
    """How the callers of one transport are known. ``is_plugin_of`` says whether a manager knows the sessions too."""

    __slots__ = ("_is_plugin_of", "_known", "_resolve")

    def __init__(self, resolve: Resolve | None, is_plugin_of: Callable[[ContextHost], bool]) -> None:
        self._resolve = resolve
        self._is_plugin_of = is_plugin_of
        self._known: ContextHost | None = None

    async def context_of(self, scope: Scope) -> UserExecutionContext:
        """The context of a request, bound to the user of its token where there is one.

        Raises ConfigurationError without the middleware, or for a manager that does not know this adapter, and for a
        token that nobody can resolve; UnauthenticatedError when the token stands for nobody; IdentityConflictError when
        it stands for another user than the context has.
        """
        try:
            context = user_context(HTTPConnection(scope))
        except ContextNotFoundError:
            raise ConfigurationError(
                "an MCP server of users needs UserContextMiddleware around it: app.add_middleware("
                "UserContextMiddleware, manager=manager) on the application that serves it"
            ) from None
        self._check(context.host)
        user = scope.get("user")
        if isinstance(user, AuthenticatedUser):
            await self._bind(context, user.access_token)
        return context

    def _check(self, host: ContextHost | None) -> None:
        if host is None or host is self._known:
            return
        if not self._is_plugin_of(host):
            raise ConfigurationError(
                "the manager does not know this MCP(), and could not end the sessions of a user who is revoked: give "
                "it to UserContextManager(plugins=[mcp])"
            )
        self._known = host

    async def _bind(self, context: UserExecutionContext, token: AccessToken) -> None:
        if self._resolve is None:
            if context.is_anonymous:
                raise ConfigurationError(
                    "the MCP server authenticates by tokens, and nothing says which user one stands for: give "
                    "MCP(resolve=...) a function from an AccessToken to a user id, such as lambda token: token.subject"
                )
            return
        found = self._resolve(token)
        if isawaitable(found):
            found = await found
        if found is None:
            raise UnauthenticatedError("the access token stands for no user")
        context.bind(found)
        if token.expires_at is not None:  # whichever ends first
            context.bind(Principal(context.user_id, datetime.fromtimestamp(token.expires_at, UTC)))
