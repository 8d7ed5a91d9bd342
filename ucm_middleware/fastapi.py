"""FastAPI dependencies: annotate a parameter with one of these."""

from typing import Annotated

from fastapi import Depends

from ucm_middleware.context import UserExecutionContext
from ucm_middleware.starlette import authenticated_context, user_context

CurrentContext = Annotated[UserExecutionContext, Depends(user_context)]
"""The context of the request or WebSocket, anonymous or not."""

AuthenticatedContext = Annotated[UserExecutionContext, Depends(authenticated_context)]
"""The context of a user; anonymous requests are answered with 401."""
