"""The middleware in a Starlette application. Start it with ``python examples/quickstart_starlette.py``, then

curl -H "Authorization: Bearer token-of-alice" http://127.0.0.1:8000/
"""

import os

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ucm_middleware import UserContextMiddleware, bearer_token, current_context

TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}  # yours: verify a signature, look up a session


def greeting() -> str:
    """Code far below the handler, which nobody passed the user to."""
    return f"Hello, {current_context().user_id}"


async def home(request: Request) -> JSONResponse:
    """Answer the caller, by whatever context this request runs in."""
    return JSONResponse({"greeting": greeting(), "request": current_context().request_id})


app = Starlette(
    routes=[Route("/", home)],
    middleware=[Middleware(UserContextMiddleware, identify=bearer_token(TOKENS.get), require_identity=True)],
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
