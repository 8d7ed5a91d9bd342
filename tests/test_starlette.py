"""Getting at the context from Starlette endpoints."""

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from support.asgi import http_scope
from ucm_middleware import (
    ContextNotFoundError,
    UserContextMiddleware,
    authenticated_context,
    bearer_token,
    current_context,
    user_context,
)


def asynchronous(request: Request) -> str:
    context = user_context(request)
    assert context is request.state.user_context is current_context()
    return "anonymous" if context.is_anonymous else context.user_id


async def show(request: Request) -> Response:
    return PlainTextResponse(asynchronous(request))


def show_from_a_thread(request: Request) -> Response:
    return PlainTextResponse(asynchronous(request))


async def show_from_a_thread_of_its_own(request: Request) -> Response:
    return PlainTextResponse(await run_in_threadpool(asynchronous, request))


async def private(request: Request) -> Response:
    return PlainTextResponse(authenticated_context(request).user_id)


class Endpoint(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return await show(request)


class Socket(WebSocketEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        if websocket.url.path == "/private-socket":
            authenticated_context(websocket)
        await websocket.accept()
        assert user_context(websocket) is current_context()
        await websocket.send_text(user_context(websocket).user_id)


async def login(websocket: WebSocket) -> None:
    await websocket.accept()
    current_context().bind(await websocket.receive_text())
    await websocket.send_text(user_context(websocket).user_id)
    current_context().bind(await websocket.receive_text())


@pytest.fixture
def client() -> TestClient:
    app = Starlette(
        routes=[
            Route("/async", show),
            Route("/sync", show_from_a_thread),
            Route("/thread", show_from_a_thread_of_its_own),
            Route("/endpoint", Endpoint),
            Mount("/mounted", routes=[Route("/async", show)]),
            Route("/private", private),
            WebSocketRoute("/socket", Socket),
            WebSocketRoute("/private-socket", Socket),
            WebSocketRoute("/login", login),
        ],
        middleware=[Middleware(UserContextMiddleware, identify=bearer_token({"t-alice": "alice"}.get))],
    )
    return TestClient(app)


ALICE = {"authorization": "Bearer t-alice"}


@pytest.mark.parametrize("path", ["/async", "/sync", "/thread", "/endpoint", "/mounted/async"])
def test_every_kind_of_endpoint_finds_it(client: TestClient, path: str) -> None:
    assert client.get(path, headers=ALICE).text == "alice"
    assert client.get(path).text == "anonymous"


def test_who_needs_a_user_says_so(client: TestClient) -> None:
    assert client.get("/private", headers=ALICE).text == "alice"
    refused = client.get("/private")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/private-socket"):
        raise AssertionError("it was accepted")


def test_websockets_find_it(client: TestClient) -> None:
    for path in ("/socket", "/private-socket"):
        with client.websocket_connect(path, headers=ALICE) as websocket:
            assert websocket.receive_text() == "alice"


def test_a_websocket_learns_its_user_once(client: TestClient) -> None:
    with client.websocket_connect("/login") as websocket:
        websocket.send_text("alice")
        assert websocket.receive_text() == "alice"
        websocket.send_text("bob")
        with pytest.raises(WebSocketDisconnect) as caught:
            websocket.receive_text()
    assert caught.value.code == 1008


@pytest.mark.parametrize("look", [user_context, authenticated_context])
def test_without_the_middleware_the_remedy_is_named(look: object) -> None:
    assert callable(look)
    with pytest.raises(ContextNotFoundError, match="is UserContextMiddleware added"):
        look(HTTPConnection(http_scope()))
