"""Use from Starlette endpoints, and from FastAPI as a dependency."""

from starlette.requests import HTTPConnection

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ContextNotFoundError, UnauthenticatedError
from ucm_middleware.middleware import CONTEXT


def user_context(connection: HTTPConnection) -> UserExecutionContext:
    """The context of a request or a WebSocket. Raises ContextNotFoundError when the middleware is not there."""
    context = connection.scope.get(CONTEXT)
    if not isinstance(context, UserExecutionContext):
        raise ContextNotFoundError("this connection has no user context: is UserContextMiddleware added to the app?")
    return context


def authenticated_context(connection: HTTPConnection) -> UserExecutionContext:
    """The same, of a user: raises UnauthenticatedError, which is answered with 401, while the context is anonymous."""
    context = user_context(connection)
    if context.is_anonymous:
        raise UnauthenticatedError("a user is required here")
    return context
