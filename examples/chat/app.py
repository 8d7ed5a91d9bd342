"""A chat: signed-in users talk to one agent, each in conversations of their own. See the README."""

import hmac
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic_ai.messages import ModelMessage, TextPart, UserPromptPart
from starlette.requests import HTTPConnection

from examples.chat.assistant import MODEL, assistant
from examples.chat.talk import Talk
from ucm_middleware import UserContextManager, UserContextMiddleware
from ucm_middleware.fastapi import AuthenticatedContext
from ucm_pydantic_ai import PydanticAI, SQLiteConversationStore, UserConversations

HERE = Path(__file__).parent
STATIC = HERE / "static"
EVENTS_CLIENT = HERE.parent / "live_events" / "static" / "ucm-events.js"

# Everybody can read these here. Yours: a login, whatever it looks like.
DEMO_TOKENS = {"alice": "demo-token-of-alice", "bob": "demo-token-of-bob"}

PROTOCOL = "chat"
SESSION = "session."  # what stands before a session in a WebSocket's list of protocols

KEPT = os.environ.get("CHAT_DATA")
DATA = Path(KEPT or Path(tempfile.gettempdir(), f"chat-{secrets.token_hex(8)}"))

sessions: dict[str, str] = {}  # user ids. Yours: a store that all processes share
store = SQLiteConversationStore(DATA / "conversations.sqlite")
conversations = UserConversations(store)
manager = UserContextManager(plugins=[PydanticAI(conversations=conversations)])
manager.require_secret("conversations and notes")
manager.register_agent("assistant", partial(assistant, DATA), stateless=True)


def signed_in(connection: HTTPConnection) -> str | None:
    """The user of a session, on this server's word alone; None for anybody else.

    A tab has a session of its own, and so no cookie, which all tabs would share. Pages cannot send a header with a
    WebSocket, but they can name protocols.
    """
    if connection.scope["type"] == "websocket":
        offered = connection.headers.get("sec-websocket-protocol", "").split(",")
        found = [name.strip().removeprefix(SESSION) for name in offered if name.strip().startswith(SESSION)]
    else:
        found = [connection.headers.get("authorization", "").removeprefix("Bearer ")]
    return sessions.get(found[0]) if found else None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Conversations and notes are kept in CHAT_DATA; where none is named, until the server stops."""
    os.makedirs(DATA, mode=0o700, exist_ok=True)
    yield
    await store.aclose()
    if not KEPT:
        shutil.rmtree(DATA)


app = FastAPI(lifespan=lifespan)
app.add_middleware(UserContextMiddleware, manager=manager, identify=signed_in)


class SignIn(BaseModel):
    """The proof of who somebody is."""

    token: str


@app.post("/sign-in")
async def sign_in(given: SignIn) -> dict[str, str]:
    """Begin a session."""
    for user, token in DEMO_TOKENS.items():
        if hmac.compare_digest(given.token.encode(), token.encode()):
            session = secrets.token_urlsafe(32)
            sessions[session] = user
            return {"user": user, "session": session}
    raise HTTPException(401, "That is nobody's token.")


@app.post("/sign-out")
async def sign_out(context: AuthenticatedContext) -> dict[str, int]:
    """Sign the user out in all tabs; how many connections and requests ended by it, this one included. Runs of agents
    end with the connection that they were asked for over.
    """
    user_id = context.user_id
    for session in [session for session, user in sessions.items() if user == user_id]:
        del sessions[session]  # first: whoever still has a session may come back
    return {"ended": manager.revoke(user_id, "signed out")}


@app.get("/whoami")
async def whoami(context: AuthenticatedContext) -> dict[str, str]:
    """The user of the session; 401 without one. A tab that was refused asks here whether it may try again."""
    return {"user": context.user_id}


@app.get("/model")
async def model() -> dict[str, str | None]:
    """Which real model answers, if one does."""
    return {"model": MODEL or None}


@app.get("/conversations")
async def names(_: AuthenticatedContext) -> list[str]:
    """What the user calls their conversations, the newest first."""
    return [record.conversation_id for record in await conversations.list_conversations()]


@app.get("/conversation")
async def conversation(name: str, _: AuthenticatedContext) -> list[dict[str, str]]:
    """What was said in one of the user's conversations: nothing in one that there is not."""
    found = await conversations.load(name)
    return [] if found is None else [line for message in found.messages for line in lines_of(message)]


def lines_of(message: ModelMessage) -> list[dict[str, str]]:
    """What a page shows of a message."""
    lines: list[dict[str, str]] = []
    for part in message.parts:
        match part:
            case UserPromptPart(content=str(text)):
                lines.append({"who": "user", "text": text})
            case TextPart(content=text):
                lines.append({"who": "assistant", "text": text})
            case _:
                pass  # thoughts and tools are the events' to show
    return lines


@app.websocket("/talk")
async def talk(websocket: WebSocket, context: AuthenticatedContext) -> None:
    """Questions and answers. The middleware sends the events of the user's runs over the same connection."""
    await websocket.accept(PROTOCOL)
    await Talk(manager, websocket, context).go_on()


@app.get("/static/ucm-events.js")
async def events_client() -> FileResponse:
    """The client of another example."""
    return FileResponse(EVENTS_CLIENT)


app.mount("/static", StaticFiles(directory=STATIC))


@app.get("/")
async def page() -> FileResponse:
    """The page, which is anybody's. What it shows is asked for with the tab's session."""
    return FileResponse(STATIC / "index.html")
