"""The drive: what an app sees of a request, and what the test sees of the app."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from starlette.background import BackgroundTasks
from starlette.responses import JSONResponse, Response, StreamingResponse

from ucm_middleware import (
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
    user_context,
)
from ucm_middleware.testing import ConnectionEnded, ConnectionRefused, Drive, FakeClock, RecordingLedger
from ucm_middleware.types import ASGIApp, Receive, Scope, Send

colour: ContextVar[str] = ContextVar("colour", default="none")
ALICE = {"Authorization": "Bearer alice"}


@pytest.fixture
def app(ucm_manager: UserContextManager) -> FastAPI:
    app = FastAPI()
    app.add_middleware(
        UserContextMiddleware,
        manager=ucm_manager,
        identify=bearer_token(lambda token: token),
        require_identity=True,
    )

    @app.get("/whoami")
    async def whoami(context: Annotated[UserExecutionContext, Depends(user_context)], q: str = "") -> Any:
        return {"user": context.user_id, "q": q}

    @app.post("/echo")
    async def echo(request: Request) -> Any:
        return JSONResponse(await request.json(), headers={"X-Type": request.headers["content-type"]})

    @app.get("/stream")
    async def stream(gate: str = "") -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "first "
            if gate:
                await asyncio.Event().wait()
            yield current_context().user_id

        return StreamingResponse(parts())

    @app.get("/background")
    async def background(request: Request) -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(request.app.state.done.append, "background")
        return JSONResponse({}, background=tasks)

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept(subprotocol=socket.scope["subprotocols"][0])
        async for text in socket.iter_text():
            if text == "bye":
                await socket.close(1000, "as you wish")
                return
            await socket.send_json({"user": current_context().user_id, "text": text})

    @app.websocket("/bytes")
    async def in_bytes(socket: WebSocket) -> None:
        await socket.accept()
        async for data in socket.iter_bytes():
            await socket.send_bytes(data[::-1])

    return app


async def test_a_request(app: FastAPI) -> None:
    drive = Drive(app, headers=ALICE)
    response = await drive.get("/whoami?q=a%20b")
    assert (response.status, response.json()) == (200, {"user": "alice", "q": "a b"})
    assert (await drive.get("/whoami", headers={"authorization": "Bearer bob"})).json()["user"] == "bob"
    assert (await Drive(app).get("/whoami")).status == 401


async def test_a_body(app: FastAPI) -> None:
    response = await Drive(app, headers=ALICE).post("/echo", json={"n": 1})
    assert response.json() == {"n": 1}
    assert response.headers["x-type"] == "application/json"
    exchange = Drive(app, headers=ALICE).start("post", "/echo", headers={"content-type": "x"})
    exchange.feed(b'{"n": ', more=True)
    exchange.feed(b"2}")
    assert (await exchange.response()).json() == {"n": 2}


async def test_nothing_of_the_test_is_seen_and_nothing_comes_back() -> None:
    async def seen(scope: Scope, receive: Receive, send: Send) -> None:
        was = colour.get()
        colour.set("the app's")
        await JSONResponse(was)(scope, receive, send)

    colour.set("the test's")
    drive = Drive(seen)
    assert [(await drive.get("/")).json() for _ in range(2)] == ["none", "none"]
    assert colour.get() == "the test's"


async def test_a_stream_part_by_part(app: FastAPI, ucm_ledger: RecordingLedger) -> None:
    exchange = Drive(app, headers=ALICE).start("GET", "/stream")
    assert await exchange.status() == 200
    assert await exchange.chunk() == b"first "
    assert await exchange.chunk() == b"alice"
    assert ucm_ledger.select("closed") == []
    assert await exchange.chunk() == b""
    assert len(ucm_ledger.select("closed")) == 1


async def test_a_client_that_goes_is_noticed(app: FastAPI, ucm_ledger: RecordingLedger) -> None:
    exchange = Drive(app, headers=ALICE).start("GET", "/stream?gate=1")
    assert await exchange.status() == 200
    assert await exchange.chunk() == b"first "
    exchange.disconnect()
    assert (await exchange.response()).body == b"first "
    assert len(ucm_ledger.select("closed", user="alice")) == 1


async def test_a_client_that_has_gone_hears_no_more() -> None:
    async def goes_on(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"too late"})

    exchange = Drive(goes_on).start("GET", "/")
    assert await exchange.status() == 200
    exchange.disconnect()
    assert (await exchange.response()).body == b""


async def test_a_cancelled_request_closes_its_context(app: FastAPI, ucm_ledger: RecordingLedger) -> None:
    exchange = Drive(app, headers=ALICE).start("GET", "/stream?gate=1")
    assert await exchange.status() == 200
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.ended()
    assert [record.reason for record in ucm_ledger.select("closed")] == ["cancelled"]


async def test_an_expired_request_is_answered(
    app: FastAPI, ucm_manager: UserContextManager, ucm_clock: FakeClock
) -> None:
    @app.get("/slow")
    async def slow() -> None:
        current_context().lifetime.limit(ucm_clock() + 30, ucm_clock)
        ucm_manager.set_context("alice", current_context(), ttl_seconds=30)
        ucm_clock.advance(31)
        await asyncio.Event().wait()

    assert (await Drive(app, headers=ALICE).get("/slow")).status == 504


async def test_a_response_waits_for_background_tasks(app: FastAPI) -> None:
    app.state.done = []
    await Drive(app, headers=ALICE).get("/background")
    assert app.state.done == ["background"]


async def test_a_connection(app: FastAPI, ucm_ledger: RecordingLedger) -> None:
    async with Drive(app, headers=ALICE).websocket("/ws", subprotocols=["chat"]) as socket:
        assert socket.subprotocol == "chat"
        socket.send_text("hello")
        assert await socket.receive_json() == {"user": "alice", "text": "hello"}
        assert ucm_ledger.select("closed") == []
    assert len(ucm_ledger.select("closed", user="alice")) == 1


async def test_a_connection_in_bytes(app: FastAPI) -> None:
    async with Drive(app, headers=ALICE).websocket("/bytes") as socket:
        socket.send_bytes(b"abc")
        assert await socket.receive_bytes() == b"cba"


async def test_an_app_that_closes(app: FastAPI) -> None:
    async with Drive(app, headers=ALICE).websocket("/ws", subprotocols=["chat"]) as socket:
        socket.send_text("bye")
        with pytest.raises(ConnectionEnded) as ended:
            await socket.receive_text()
    assert (ended.value.code, ended.value.reason) == (1000, "as you wish")


async def test_a_refused_handshake(app: FastAPI) -> None:
    with pytest.raises(ConnectionRefused) as refused:
        async with Drive(app).websocket("/ws"):
            pass
    assert refused.value.response is not None
    assert refused.value.response.status == 401


async def test_a_handshake_that_is_closed() -> None:
    async def closes(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 4000})

    with pytest.raises(ConnectionRefused) as refused:
        async with Drive(closes).websocket("/ws"):
            pass
    assert (refused.value.code, refused.value.response) == (4000, None)


def lifespan_app(startup: str, steps: list[str]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await JSONResponse(scope["state"])(scope, receive, send)
            return
        steps.append((await receive())["type"])
        scope["state"]["pool"] = "open"
        await send({"type": startup, "message": "no database"})
        steps.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    return app


async def test_the_lifespan_is_around_the_block() -> None:
    steps: list[str] = []
    async with Drive(lifespan_app("lifespan.startup.complete", steps)) as drive:
        assert (await drive.get("/")).json() == {"pool": "open"}
        assert steps == ["lifespan.startup"]
    assert steps == ["lifespan.startup", "lifespan.shutdown"]


async def test_a_lifespan_that_fails_is_told() -> None:
    with pytest.raises(AssertionError, match="no database"):
        async with Drive(lifespan_app("lifespan.startup.failed", [])):
            pass


async def test_what_the_app_raises_is_raised() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({}, 500)(scope, receive, send)
        raise LookupError("the app's own")

    exchange = Drive(fails).start("GET", "/")
    with pytest.raises(LookupError, match="the app's own"):
        await exchange.response()
    assert exchange.sent[0]["status"] == 500


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "ended without a whole response"),
        ([{"type": "http.response.start", "status": 200}], "ended without a whole response"),
        ([{"type": "http.response.body"}], "http.response.start was due"),
        (
            [{"type": "http.response.start", "status": 200}, *[{"type": "http.response.body"}] * 2],
            "the response was complete",
        ),
    ],
)
async def test_an_app_that_breaks_the_protocol_is_told(messages: list[dict[str, Any]], told: str) -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    with pytest.raises((AssertionError, RuntimeError), match=told):
        await Drive(breaks).get("/")


async def test_an_app_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("ucm_middleware.testing.conversation.PATIENCE", 0)
    with pytest.raises(TimeoutError, match="GET /there: waited 0 s in vain until the app ends"):
        await Drive(hangs).get("/there")
