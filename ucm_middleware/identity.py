"""Resolvers: from a connection to the user that it comes from. Nothing in a request is believed but by one of these."""

from collections.abc import Awaitable, Callable
from inspect import isawaitable

from starlette.requests import HTTPConnection

from ucm_middleware.errors import ConfigurationError, UnauthenticatedError
from ucm_middleware.principal import Principal
from ucm_middleware.settings import require_function

Identified = Principal | str | None
"""A user, a user's id, or None for nobody."""

Identify = Callable[[HTTPConnection], Identified | Awaitable[Identified]]
"""What ``UserContextMiddleware(identify=...)`` takes."""


def authenticated_user(connection: HTTPConnection) -> str | None:
    """The ``identity`` of the user of Starlette's AuthenticationMiddleware, which must be outside of this package's."""
    if "user" not in connection.scope:
        raise ConfigurationError(
            "authenticated_user needs Starlette's AuthenticationMiddleware outside of UserContextMiddleware: "
            "add it after, since the middleware added last is the outermost"
        )
    user = connection.user
    if not user.is_authenticated:
        return None
    try:
        return str(user.identity)
    except NotImplementedError:
        raise ConfigurationError(
            f"authenticated_user needs {type(user).__name__}.identity: define it, or give identify= a function of your "
            "own. A display name is no identity: two users may share one"
        ) from None


def session_user(key: str = "user_id") -> Callable[[HTTPConnection], str | None]:
    """The user id under ``key`` in the session of Starlette's SessionMiddleware, which must be outside."""

    def identify(connection: HTTPConnection) -> str | None:
        if "session" not in connection.scope:
            raise ConfigurationError(
                "session_user needs Starlette's SessionMiddleware outside of UserContextMiddleware: add it after, "
                "since the middleware added last is the outermost"
            )
        user_id = connection.session.get(key)
        return None if user_id is None else str(user_id)

    return identify


def bearer_token(
    verify: Callable[[str], Identified | Awaitable[Identified]],
) -> Callable[[HTTPConnection], Awaitable[Identified]]:
    """The user that ``verify`` finds for the token of an ``Authorization: Bearer`` header.

    No header means nobody. A header that is doubled, of another scheme or whose token ``verify`` answers with None is
    refused with 401, also where anonymous requests are welcome: broken credentials are not the absence of credentials.

    Raises ConfigurationError for what cannot be called, such as a dict.
    """
    require_function("verify", verify, "{...}.get")

    async def identify(connection: HTTPConnection) -> Identified:
        headers = connection.headers.getlist("authorization")
        if not headers:
            return None
        scheme, _, token = headers[0].partition(" ")
        token = token.strip()
        if len(headers) > 1 or scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError("one Authorization header with a bearer token is expected")
        found = verify(token)
        if isawaitable(found):
            found = await found
        if found is None:
            raise UnauthenticatedError("the bearer token is not valid")
        return found

    return identify


def check_resolver(identify: object) -> None:
    """Raise ConfigurationError for what is no resolver, which what makes one is not either; None is none at all."""
    for maker in (session_user, bearer_token):
        if identify is maker:
            name = maker.__name__
            raise ConfigurationError(f"identify is {name} itself, which makes a resolver; give {name}(...)")
    if identify is not None:
        require_function("identify", identify, "session_user()")
