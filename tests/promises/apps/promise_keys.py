"""An app that keeps notes and drafts in one store for all users, as adapters do: under keys derived with the owner.

Notes are loaded by the client's id. Drafts are loaded by their number, which anybody can guess, and carry their key.
"""

import itertools

from promise_journal import Door, Journal
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ucm_middleware import (
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
)

journal = Journal()
manager = UserContextManager()
manager.require_secret("stored notes")

notes: dict[str, str] = {}
drafts: dict[str, tuple[str, str]] = {}
numbers = itertools.count(1)


def load_draft(context: UserExecutionContext, number: str) -> str:
    key, text = drafts.get(number, (None, ""))
    context.check_key("draft", number, key)
    return text


async def write_note(request: Request) -> Response:
    key = current_context().derive_key("note", request.path_params["name"])
    notes[key] = request.query_params["text"]
    return JSONResponse(key)


async def read_note(request: Request) -> Response:
    key = current_context().derive_key("note", request.path_params["name"])
    current_context().check_key("note", request.path_params["name"], key if key in notes else None)
    return JSONResponse(notes[key])


async def write_draft(request: Request) -> Response:
    number = str(next(numbers))
    drafts[number] = current_context().derive_key("draft", number), request.query_params["text"]
    return JSONResponse(number)


async def read_draft(request: Request) -> Response:
    return JSONResponse(load_draft(current_context(), request.path_params["number"]))


def read_draft_in_thread(request: Request) -> Response:
    return JSONResponse(load_draft(current_context(), request.path_params["number"]))


async def follow_draft(websocket: WebSocket) -> None:
    if "before" not in websocket.query_params:
        await websocket.accept()
    load_draft(current_context(), websocket.path_params["number"])


def verify(token: str) -> str | None:
    scheme, _, user = token.partition("-of-")
    return user if scheme == "token" else None


app = Starlette(
    routes=[
        Route("/notes/{name:path}", write_note, methods=["PUT"]),
        Route("/notes/{name:path}", read_note),
        Route("/drafts", write_draft, methods=["POST"]),
        Route("/drafts/{number}", read_draft),
        Route("/in-thread/drafts/{number}", read_draft_in_thread),
        WebSocketRoute("/drafts/{number}", follow_draft),
    ],
    middleware=[
        Middleware(Door, manager=manager, journal=journal),
        Middleware(UserContextMiddleware, manager=manager, identify=bearer_token(verify)),
    ],
)
