"""Use from FastAPI, as its users write it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Header, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ucm_middleware import (
    CrossUserAccessError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    create_isolated_execution_context,
    current_context,
)
from ucm_middleware.fastapi import AuthenticatedContext, CurrentContext
from ucm_middleware.fastapi import user_context as fastapi_context
from ucm_middleware.testing import closing_contexts

ALICE = {"authorization": "Bearer t-alice"}
BOB = {"authorization": "Bearer t-bob"}


async def logged_in(context: CurrentContext, x_session: Annotated[str | None, Header()] = None) -> UserExecutionContext:
    """Late identity: a dependency finds out who it is."""
    if x_session is not None:
        context.bind(x_session.removeprefix("session-of-"))
    return context


LateContext = Annotated[UserExecutionContext, Depends(logged_in)]


class Desk:
    """An app, and what its parts saw."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, bool]] = []
        self.manager = UserContextManager()
        self.app = FastAPI()
        self.app.add_middleware(
            UserContextMiddleware,
            manager=self.manager,
            identify=bearer_token({"t-alice": "alice", "t-bob": "bob"}.get),
        )
        self.client = TestClient(self.app)

    def note(self, where: str) -> None:
        context = current_context()
        self.log.append((where, context.user_id, context.is_open))


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    app = desk.app

    async def opened(context: CurrentContext) -> AsyncIterator[str]:
        assert current_context() is context
        desk.note("before")
        yield context.user_id
        desk.note("after")

    def opened_in_a_thread(context: CurrentContext) -> Iterator[str]:
        assert current_context() is context
        desk.note("before, in a thread")
        yield context.user_id
        desk.note("after, in a thread")

    @app.get("/async")
    async def asynchronous(context: CurrentContext, request: Request) -> str:
        assert context is current_context() is request.state.user_context
        return "anonymous" if context.is_anonymous else context.user_id

    @app.get("/sync")
    def synchronous(context: CurrentContext, request: Request) -> str:
        assert context is current_context() is request.state.user_context
        return "anonymous" if context.is_anonymous else context.user_id

    @app.get("/private")
    async def private(context: AuthenticatedContext) -> str:
        return context.user_id

    @app.get("/yield")
    async def yielding(
        one: Annotated[str, Depends(opened)], other: Annotated[str, Depends(opened_in_a_thread)]
    ) -> list[str]:
        desk.note("handler")
        return [one, other]

    @app.get("/background")
    async def background(context: CurrentContext, tasks: BackgroundTasks) -> None:
        tasks.add_task(desk.note, "background, in a thread")
        context.callback(desk.log.append, ("released", context.user_id, True))

    @app.get("/stream")
    async def stream(context: CurrentContext) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                await asyncio.sleep(0)
                yield current_context().user_id

        return StreamingResponse(parts())

    @app.get("/late")
    async def late(context: LateContext) -> str:
        return context.user_id

    @app.get("/trail/{user_id}")
    async def trail(user_id: str) -> bool:
        return desk.manager.get_audit_trail(user_id) is not None

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, context: AuthenticatedContext) -> None:
        await websocket.accept()
        assert context is current_context()
        await websocket.send_text(context.user_id)

    @app.websocket("/late-socket")
    async def late_socket(websocket: WebSocket, context: CurrentContext) -> None:
        await websocket.accept()
        context.bind(await websocket.receive_text())
        desk.manager.get_context(await websocket.receive_text())

    with closing_contexts(desk.manager):
        yield desk


@pytest.mark.parametrize("path", ["/async", "/sync"])
def test_endpoints_of_both_kinds_have_it(desk: Desk, path: str) -> None:
    assert desk.client.get(path, headers=ALICE).json() == "alice"
    assert desk.client.get(path).json() == "anonymous"


def test_to_ask_for_the_context_takes_no_thread(desk: Desk) -> None:
    """FastAPI runs dependencies that are plain functions in threads of AnyIO's, which stay for more."""
    with desk.client as client:
        before = set(threading.enumerate())
        assert client.get("/async", headers=ALICE).json() == "alice"
        assert client.get("/private", headers=ALICE).json() == "alice"
        assert set(threading.enumerate()) <= before


def test_the_pool_of_threads_mixes_nobody_up(desk: Desk) -> None:
    with desk.client, ThreadPoolExecutor(8) as pool:
        asked = [(path, who) for path in ("/sync", "/async") for who in ("alice", "bob")] * 10

        def ask(what: tuple[str, str]) -> str:
            path, who = what
            answer: str = desk.client.get(path, headers={"authorization": f"Bearer t-{who}"}).json()
            return answer

        assert list(pool.map(ask, asked)) == [who for _, who in asked]


def test_who_needs_a_user_gets_one_or_the_client_a_401(desk: Desk) -> None:
    assert desk.client.get("/private", headers=ALICE).json() == "alice"
    assert desk.client.get("/private").status_code == 401
    assert desk.client.get("/private", headers={"authorization": "Bearer forged"}).status_code == 401


def test_dependencies_with_yield_begin_and_end_inside(desk: Desk) -> None:
    assert desk.client.get("/yield", headers=ALICE).json() == ["alice", "alice"]
    steps = ["before", "before, in a thread", "handler", "after, in a thread", "after"]
    assert desk.log == [(step, "alice", True) for step in steps]


def test_background_tasks_are_inside_and_the_release_comes_after(desk: Desk) -> None:
    assert desk.client.get("/background", headers=BOB).status_code == 200
    assert desk.log == [("background, in a thread", "bob", True), ("released", "bob", True)]


def test_a_stream_is_inside(desk: Desk) -> None:
    assert desk.client.get("/stream", headers=ALICE).text == "alice" * 3


def test_a_dependency_may_say_who_it_is(desk: Desk) -> None:
    assert desk.client.get("/late", headers={"x-session": "session-of-carol"}).json() == "carol"
    assert desk.client.get("/late", headers={**ALICE, "x-session": "session-of-alice"}).json() == "alice"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**ALICE, "x-session": "session-of-bob"}, 409),
        ({"x-session": "session-of-"}, 400),
        ({"x-session": "null"}, 400),
    ],
    ids=["another user", "nobody", "placeholder"],
)
def test_what_a_dependency_may_not_say_is_answered(desk: Desk, headers: dict[str, str], status: int) -> None:
    assert desk.client.get("/late", headers=headers).status_code == status


def test_the_limit_is_a_429(desk: Desk) -> None:
    with desk.manager.privileged(reason="test", users=["alice"]):
        for _ in range(10):
            desk.manager.create_isolated_context("alice")
    answer = desk.client.get("/async", headers=ALICE)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert desk.client.get("/async", headers=BOB).json() == "bob"


def test_another_user_is_a_403_whether_there_or_not(desk: Desk) -> None:
    desk.client.get("/async", headers=BOB)
    there, not_there = (desk.client.get(f"/trail/{user}", headers=ALICE) for user in ("bob", "dan"))
    assert there.status_code == not_there.status_code == 403
    assert there.content == not_there.content
    assert desk.client.get("/trail/alice", headers=ALICE).json() is True


def test_an_app_may_answer_for_itself(desk: Desk) -> None:
    @desk.app.exception_handler(CrossUserAccessError)
    async def hide(request: Request, error: CrossUserAccessError) -> JSONResponse:
        return JSONResponse({"error": "not found"}, 404)

    answer = desk.client.get("/trail/bob", headers=ALICE)
    assert (answer.status_code, answer.json()) == (404, {"error": "not found"})


def test_websockets_have_it(desk: Desk) -> None:
    with desk.client.websocket_connect("/socket", headers=ALICE) as websocket:
        assert websocket.receive_text() == "alice"
    with pytest.raises(WebSocketDisconnect), desk.client.websocket_connect("/socket"):
        raise AssertionError("it was accepted")


def test_a_websocket_that_reaches_for_another_is_closed(desk: Desk) -> None:
    with desk.client.websocket_connect("/late-socket") as websocket:
        websocket.send_text("alice")
        websocket.send_text("bob")
        with pytest.raises(WebSocketDisconnect) as caught:
            websocket.receive_text()
    assert caught.value.code == 1008


def test_no_parameter_of_ours_is_in_the_schema(desk: Desk) -> None:
    paths = desk.app.openapi()["paths"]
    for path in ("/async", "/sync", "/private", "/yield"):
        assert "parameters" not in paths[path]["get"]
        assert "requestBody" not in paths[path]["get"]


def test_an_override_stands_in_for_tests_of_an_app(desk: Desk) -> None:
    desk.app.dependency_overrides[fastapi_context] = lambda: create_isolated_execution_context("carol")

    @desk.app.get("/plain")
    async def plain(context: CurrentContext) -> str:
        return context.user_id

    assert desk.client.get("/plain").json() == "carol"
