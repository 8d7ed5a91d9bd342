"""The middleware in a FastAPI application. Start it with ``python examples/quickstart_fastapi.py``, then

curl -H "Authorization: Bearer token-of-alice" http://127.0.0.1:8000/
"""

import os
import sqlite3

import uvicorn
from fastapi import FastAPI

from ucm_middleware import UserContextMiddleware, bearer_token
from ucm_middleware.fastapi import AuthenticatedContext

TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}  # yours: verify a signature, look up a session

app = FastAPI()
app.add_middleware(UserContextMiddleware, identify=bearer_token(TOKENS.get))


@app.get("/")
async def home(context: AuthenticatedContext) -> dict[str, str]:
    """Answer the caller; whoever has no token gets a 401 and never comes here."""
    database = context.closing(sqlite3.connect(":memory:"))  # closed when the request is over, however it ends
    (greeting,) = database.execute("select 'Hello, ' || ?", (context.user_id,)).fetchone()
    return {"greeting": greeting, "request": context.request_id}


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
