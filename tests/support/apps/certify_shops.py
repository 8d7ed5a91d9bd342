"""Small shops with users that sign in, each with something planted in it, and without."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import Cookie, FastAPI, Header, HTTPException, Response, WebSocket, WebSocketDisconnect
from pydantic import BaseModel
from starlette.responses import JSONResponse

from ucm_middleware import current_context

KEYS = {name: f"the api key of {name}, 00{at}" for at, name in enumerate(("alice", "bob"))}


class Login(BaseModel):
    """Who signs in."""

    user: str


class Note(BaseModel):
    """What a user writes down."""

    text: str


class NamedNote(Note):
    """One that the user has called something."""

    id: str


def with_sessions(*, planted: bool) -> FastAPI:
    """A session in a cookie, that is to be refreshed; planted, whoever comes next is given the last one's."""
    app, sessions, numbers = FastAPI(), dict[str, str](), itertools.count()
    last: list[str] = []

    @app.post("/login")
    def login(login: Login, response: Response) -> None:
        last[:] = [f"s-{next(numbers)}-{login.user}"]
        sessions[last[0]] = login.user
        response.set_cookie("sid", last[0], httponly=True)

    @app.post("/logout")
    def logout(response: Response, sid: Annotated[str | None, Cookie()] = None) -> None:
        sessions.pop(sid or "", None)
        response.delete_cookie("sid")

    @app.get("/me")
    def me(sid: Annotated[str | None, Cookie()] = None) -> dict[str, str]:
        user = sessions.get((last[0] if planted and last else sid) or "")
        if user is None:
            raise HTTPException(401)
        return {"user": user, "key": KEYS[user]}

    return app


def contexts_shown() -> FastAPI:
    """It has sessions, and shows whose context the package has made of a request."""
    app, numbers = FastAPI(), itertools.count()

    @app.post("/login")
    def login(login: Login, response: Response) -> None:
        response.set_cookie("sid", f"s-{next(numbers)}-{login.user}", httponly=True)

    @app.post("/logout")
    def logout(response: Response) -> None:
        response.delete_cookie("sid")

    @app.get("/context")
    def context() -> dict[str, str]:
        user = current_context().user_id
        if user not in KEYS:
            raise HTTPException(401)
        return {"key": KEYS[user]}

    return app


def with_queries(*, planted: bool) -> FastAPI:
    """Users are known by what stands in the query, as browsers have it for WebSockets; planted, the first one who
    connects is everybody.
    """
    app, first = FastAPI(), list[str]()

    @app.get("/me")
    def me(token: str) -> dict[str, str]:
        if token not in KEYS:
            raise HTTPException(401)
        return {"key": KEYS[token]}

    @app.websocket("/live")
    async def live(websocket: WebSocket, token: str) -> None:
        await websocket.accept()
        first.append(token)
        await websocket.send_text(KEYS[first[0] if planted else token])
        with suppress(WebSocketDisconnect):
            while True:
                await websocket.receive_text()

    return app


def sockets_told(*, planted: bool) -> FastAPI:
    """A WebSocket says whose it is in its handshake and as it closes, another why it is denied; planted, who came last.
    The handshake gives a session.
    """
    app, last = FastAPI(), list[str]()

    def key_of(websocket: WebSocket) -> str:
        user = websocket.headers["x-user"]
        shown = KEYS[last[-1] if planted and last else user]
        last.append(user)
        return shown

    @app.websocket("/live")
    async def live(websocket: WebSocket) -> None:
        key = key_of(websocket)
        cookie = f"sid={websocket.headers['x-user']}; Path=/"
        await websocket.accept(headers=[(b"x-key", key.encode()), (b"set-cookie", cookie.encode())])
        await websocket.send_text("hello")
        await websocket.close(1000, key)

    @app.websocket("/denied")
    async def denied(websocket: WebSocket) -> None:
        key = key_of(websocket)
        await websocket.send_denial_response(JSONResponse({"key": key}, 403, {"x-key": key}))

    @app.get("/me")
    def me(sid: Annotated[str | None, Cookie()] = None) -> dict[str, str]:
        if sid is None:
            raise HTTPException(401)
        return {"key": KEYS[sid]}

    return app


Caller = Annotated[str, Header(alias="x-user")]


def with_ids(*, planted: bool) -> FastAPI:
    """Notes with ids, by a header that the schema names; planted, an id is all that it takes."""
    app, notes, numbers = FastAPI(), dict[int, tuple[str, str]](), itertools.count(1000)

    @app.post("/notes", status_code=201)
    def add(note: Note, user: Caller) -> dict[str, Any]:
        notes[number := next(numbers)] = user, note.text
        return {"id": number, "text": note.text}

    @app.get("/notes")
    def mine(user: Caller) -> dict[str, Any]:
        own = [{"id": number, "text": text} for number, (owner, text) in notes.items() if owner == user]
        return {"notes": own[-20:]}

    @app.get("/notes/{note_id}")
    def one(note_id: int, user: Caller) -> dict[str, Any]:
        owner, text = notes.get(note_id, ("", ""))
        if not owner or (owner != user and not planted):
            raise HTTPException(404)
        return {"id": note_id, "text": text}

    return app


def ids_chosen() -> FastAPI:
    """Notes of each user under ids that the client chooses; one that is not there is named."""
    app, notes = FastAPI(), dict[tuple[str, str], str]()

    @app.post("/notes")
    def add(note: NamedNote, user: Caller) -> NamedNote:
        notes[user, note.id] = note.text
        return note

    @app.get("/notes/{note_id}")
    def one(note_id: str, user: Caller) -> dict[str, str]:
        if (user, note_id) not in notes:
            raise HTTPException(404, f"you have no note {note_id!r}")
        return {"id": note_id, "text": notes[user, note_id]}

    return app


def _of(make: Callable[..., FastAPI], *, planted: bool) -> Callable[[], FastAPI]:
    return partial(make, planted=planted)


sessions_mixed, sessions_apart = _of(with_sessions, planted=True), _of(with_sessions, planted=False)
ids_open, ids_closed = _of(with_ids, planted=True), _of(with_ids, planted=False)
sockets_mixed, sockets_apart = _of(sockets_told, planted=True), _of(sockets_told, planted=False)
queries_mixed, queries_apart = _of(with_queries, planted=True), _of(with_queries, planted=False)
