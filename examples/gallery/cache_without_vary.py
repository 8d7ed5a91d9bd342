"""A small cache of whole responses, keyed by the path. What else the response varies with, it was not told."""

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.gallery.common import load_account, make_app, signed_in, workspace
from ucm_middleware import UserContextManager


class ResponseCache:
    """Answers a GET from memory when it has been answered with 200 before. ``vary`` are header names, in lower case."""

    def __init__(self, app: ASGIApp, vary: tuple[bytes, ...]) -> None:
        self.app = app
        self.vary = vary
        self.stored: dict[Any, list[Message]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = (scope["path"], *(headers.get(name) for name in self.vary))
        if key not in self.stored:
            messages: list[Message] = []

            async def kept(message: Message) -> None:
                messages.append(message)
                await send(message)

            await self.app(scope, receive, kept)
            if messages[0]["status"] == 200:
                self.stored[key] = messages
            return
        for message in self.stored[key]:
            await send(dict(message))


def create_app(*, planted: bool, manager: UserContextManager | None = None) -> Starlette:
    """The customer's start page, behind the cache."""

    async def start_page(request: Request) -> JSONResponse:
        account = load_account(signed_in(request))
        workspace(request)["account"] = account
        return JSONResponse({"offers": ["umbrella"], "account": account.to_json()})

    vary = () if planted else (b"authorization", b"cookie")
    return make_app([Route("/start", start_page)], manager, inner=[Middleware(ResponseCache, vary=vary)])


planted, clean = partial(create_app, planted=True), partial(create_app, planted=False)
