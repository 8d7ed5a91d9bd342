"""Live events: two sign-ins in one page, each with a WebSocket of its own that gets its user's events. See the README.

A browser has one cookie of a name for a site and a path. So that one page can hold two sign-ins, the same routes are
there twice, below /left and /right, and the session cookie of each is for its own path.
"""

import hmac
import os
import secrets
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from ucm_middleware import EventPolicy, UserContextManager, UserContextMiddleware
from ucm_middleware.fastapi import AuthenticatedContext

STATIC = Path(__file__).with_name("static")
PASSWORDS = {"alice": "wonderland", "bob": "builder"}  # yours: hashes, in a database
COOKIE = "session"

sessions: dict[str, str] = {}  # token: user id. Yours: a store that all processes share
manager = UserContextManager(events=EventPolicy(types=["message"], keep_events=20))


def signed_in(connection: HTTPConnection) -> str | None:
    """The user of the session that the cookie names, on this server's word alone; None for anybody else."""
    return sessions.get(connection.cookies.get(COOKIE, ""))


app = FastAPI()
app.add_middleware(
    UserContextMiddleware,
    manager=manager,
    identify=signed_in,
    # Pages of this site itself may open WebSockets in any case, and others that are not on the list may not.
    allowed_origins=os.environ.get("LIVE_EVENTS_ORIGINS", "").split(),
)
router = APIRouter()


class SignIn(BaseModel):
    """Who somebody says they are, and the proof of it."""

    user: str
    password: str


class Post(BaseModel):
    """A text for a user."""

    to: str
    text: str


@router.post("/login")
async def login(sign_in: SignIn, request: Request, response: Response) -> dict[str, str]:
    """Begin a session. Its cookie is for the routes beside this one."""
    expected = PASSWORDS.get(sign_in.user, secrets.token_urlsafe())
    if not hmac.compare_digest(sign_in.password.encode(), expected.encode()):
        raise HTTPException(401, "That is not a user with their password.")
    token = secrets.token_urlsafe(32)
    sessions[token] = sign_in.user
    path, _, _ = request.url.path.rpartition("/")
    is_encrypted = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, path=path, httponly=True, samesite="strict", secure=is_encrypted)
    return {"user": sign_in.user}


@router.get("/whoami")
async def whoami(context: AuthenticatedContext) -> dict[str, str]:
    """The user of the session; 401 without one. A client that was refused asks here whether it may try again."""
    return {"user": context.user_id}


@router.websocket("/events")
async def events(websocket: WebSocket, context: AuthenticatedContext) -> None:
    """Stay until the client goes. The middleware sends this user's events as long as the handler runs."""
    await websocket.accept()
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass  # the page says nothing, and whatever else a client says is not listened to


@router.post("/send")
async def send(post: Post, context: AuthenticatedContext) -> dict[str, int]:
    """Send as the user of the session: to oneself, from wherever one is. To anybody else it is refused with 403."""
    sent = await manager.send_event(post.to, "message", {"text": post.text})
    return {"delivered": sent.delivered, "queued": sent.queued, "dropped": len(sent.dropped), "kept": sent.kept}


@router.post("/revoke")
async def revoke(context: AuthenticatedContext) -> dict[str, int]:
    """Sign the user out everywhere; how many connections and requests ended by it, this one included."""
    user_id = context.user_id
    for token in [token for token, user in sessions.items() if user == user_id]:
        del sessions[token]  # first: whoever still has a session may come back
    return {"ended": manager.revoke(user_id, "signed out everywhere")}


app.include_router(router, prefix="/left")
app.include_router(router, prefix="/right")
app.mount("/static", StaticFiles(directory=STATIC))


@app.get("/")
async def page() -> FileResponse:
    """The page, which is anybody's. What it shows is asked for by the sign-ins in it."""
    return FileResponse(STATIC / "index.html")
