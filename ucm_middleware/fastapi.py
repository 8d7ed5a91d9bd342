"""FastAPI dependencies: annotate a parameter with one of these."""

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from ucm_middleware import starlette
from ucm_middleware.context import UserExecutionContext


# Not the functions of `starlette` themselves: FastAPI hands what is no coroutine function to a thread.
async def user_context(connection: HTTPConnection) -> UserExecutionContext:
    """As ``ucm_middleware.user_context``; the key for ``app.dependency_overrides``."""
    return starlette.user_context(connection)


async def authenticated_context(connection: HTTPConnection) -> UserExecutionContext:
    """As ``ucm_middleware.authenticated_context``; the key for ``app.dependency_overrides``."""
    return starlette.authenticated_context(connection)


CurrentContext = Annotated[UserExecutionContext, Depends(user_context)]
"""The context of the request or WebSocket, anonymous or not."""

AuthenticatedContext = Annotated[UserExecutionContext, Depends(authenticated_context)]
"""The context of a user; anonymous requests are answered with 401."""
