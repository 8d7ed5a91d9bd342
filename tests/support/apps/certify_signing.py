"""Applications whose users sign in: what the answers have in them, and what becomes of who cannot any more."""

import logging
from collections import Counter, defaultdict
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Response
from pydantic import BaseModel

ACCOUNTS = {"alice": "account-4f2a9c71e05d", "bob": "account-77aa01bc93fe"}

Bearer = Annotated[str | None, Header(alias="authorization")]


class Login(BaseModel):
    """Who signs in."""

    user: str


class Note(BaseModel):
    """What a user writes down."""

    text: str


def _user(authorization: str | None) -> str | None:
    return None if authorization is None else authorization.removeprefix("Bearer token-of-")


def welcoming(*, planted: bool) -> FastAPI:
    """Who signs in or out is shown an account: their own; planted, that of whoever signed in before."""
    app, last = FastAPI(), list[str]()

    def shown(user: str) -> str:
        return ACCOUNTS[last[-1] if planted and last else user]

    @app.post("/login")
    def login(login: Login, response: Response) -> dict[str, str]:
        logging.getLogger("shop.login").warning("welcome back, %s", shown(login.user))
        response.headers["x-account"] = shown(login.user)
        answer = {"access_token": f"token-of-{login.user}", "account": shown(login.user)}
        last.append(login.user)
        return answer

    @app.post("/logout")
    def logout(authorization: Bearer = None) -> dict[str, str]:
        return {"bye": shown(_user(authorization) or "")}

    @app.get("/me")
    def me(authorization: Bearer = None) -> dict[str, str]:
        if authorization is None:
            raise HTTPException(401)
        return {"account": ACCOUNTS[_user(authorization) or ""]}

    return app


def limited(*, with_logout: bool) -> FastAPI:
    """Who is signed in has notes of their own, and guests have a board in common. Nobody may sign in a third time."""
    app, sessions, times = FastAPI(), dict[str, str](), Counter[str]()
    boards: defaultdict[str | None, list[str]] = defaultdict(list)

    def board(authorization: str | None) -> list[str]:
        return boards[sessions.get(authorization or "")]

    @app.post("/login")
    def login(login: Login) -> dict[str, str]:
        times[login.user] += 1
        if times[login.user] > 2:
            raise HTTPException(429)
        token = f"{login.user}-{times[login.user]}"
        sessions[f"Bearer {token}"] = login.user
        return {"access_token": token}

    if with_logout:

        @app.post("/logout")
        def logout(authorization: Bearer = None) -> None:
            sessions.pop(authorization or "", None)

    @app.post("/notes")
    def add(note: Note, authorization: Bearer = None) -> Note:
        board(authorization).append(note.text)
        return note

    @app.get("/notes")
    def notes(authorization: Bearer = None) -> list[str]:
        return board(authorization)[-50:]

    return app


welcoming_others, welcoming_each = partial(welcoming, planted=True), partial(welcoming, planted=False)
never_leaving, leaving = partial(limited, with_logout=False), partial(limited, with_logout=True)
