"""The loop over messages, and a context for each of them."""

import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from support.asgi import exchange, websocket_scope
from ucm_middleware import (
    ContextClosedError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    bearer_token,
    current_context,
    user_context,
)
from ucm_middleware.testing import ConnectionEnded, Drive, RecordingLedger
from ucm_middleware.types import Receive, Scope, Send
from ucm_middleware.websocket.starlette import messages

ALICE = {"Authorization": "Bearer alice"}

Endpoint = Callable[[WebSocket], Any]


def app_of(manager: UserContextManager, endpoint: Endpoint, **options: Any) -> Starlette:
    return Starlette(
        routes=[WebSocketRoute("/ws", endpoint)],
        middleware=[
            Middleware(UserContextMiddleware, manager=manager, identify=bearer_token(lambda token: token), **options)
        ],
    )


class TestTheLoop:
    async def test_it_accepts_and_gives_each_message_until_the_client_goes(
        self, ucm_manager: UserContextManager
    ) -> None:
        seen: list[str] = []

        async def endpoint(websocket: WebSocket) -> None:
            async for message in messages(websocket):
                seen.append(message)
                await websocket.send_text(message.upper())
            seen.append("gone")

        async with Drive(app_of(ucm_manager, endpoint)).websocket("/ws", headers=ALICE) as socket:
            socket.send_text("one")
            assert await socket.receive_text() == "ONE"
            socket.send_text("two")
            assert await socket.receive_text() == "TWO"
        assert seen == ["one", "two", "gone"]

    async def test_one_that_is_accepted_is_not_accepted_again(self, ucm_manager: UserContextManager) -> None:
        async def endpoint(websocket: WebSocket) -> None:
            await websocket.accept("chat")
            async for message in messages(websocket, "json"):
                await websocket.send_json(message)

        async with Drive(app_of(ucm_manager, endpoint)).websocket("/ws", headers=ALICE) as socket:
            assert socket.subprotocol == "chat"
            socket.send_json({"a": [1, None]})
            assert await socket.receive_json() == {"a": [1, None]}

    @pytest.mark.parametrize(
        ("kind", "sent", "code"),
        [
            ("text", b"bytes", 1003),
            ("bytes", "text", 1003),
            ("json", b"{}", 1003),
            ("json", "{", 1007),
            ("json", "[" * 100_000, 1007),
        ],
    )
    async def test_what_it_does_not_take_ends_that_connection(
        self, ucm_manager: UserContextManager, kind: Literal["text"], sent: str | bytes, code: int
    ) -> None:
        ended: list[str] = []

        async def endpoint(websocket: WebSocket) -> None:
            async for _ in messages(websocket, kind):
                raise AssertionError("it must not be given")
            ended.append("here")

        async with Drive(app_of(ucm_manager, endpoint)).websocket("/ws", headers=ALICE) as socket:
            if isinstance(sent, bytes):
                socket.send_bytes(sent)
            else:
                socket.send_text(sent)
            with pytest.raises(ConnectionEnded) as caught:
                await socket.receive_text()
        assert caught.value.code == code
        assert ended == ["here"]


async def test_an_event_of_just_before_the_close_comes_before_it(ucm_manager: UserContextManager) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        ucm_manager.post_event("alice", "message", "the last word")
        await send({"type": "websocket.close", "code": 1000, "reason": ""})

    middleware = UserContextMiddleware(app, manager=ucm_manager, identify=lambda connection: "alice")
    accept, event, close = await exchange(middleware, websocket_scope())
    assert (accept["type"], close["type"]) == ("websocket.accept", "websocket.close")
    assert json.loads(event["text"])["data"] == "the last word"


class TestAContextForEachMessage:
    async def test_its_data_is_gone_when_the_next_one_comes(self, ucm_manager: UserContextManager) -> None:
        contexts: list[UserExecutionContext] = []

        async def endpoint(websocket: WebSocket) -> None:
            async for message in messages(websocket):
                context = current_context()
                contexts.append(context)
                before = dict(context.agent_context)
                context.agent_context["said"] = message
                await websocket.send_json([before, context.operation_depth, context.user_id])
            assert current_context() is user_context(websocket)

        app = app_of(ucm_manager, endpoint, context_per_message=True)
        async with Drive(app).websocket("/ws", headers=ALICE) as socket:
            for word in ("one", "two"):
                socket.send_text(word)
                assert await socket.receive_json() == [{}, 1, "alice"]
        first, second = contexts
        assert first is not second
        for context in contexts:
            assert context.lifetime.reason == "finished"
            with pytest.raises(ContextClosedError):
                context.agent_context["said"]

    async def test_what_it_holds_is_released_before_the_next_one_is_received(
        self, ucm_manager: UserContextManager
    ) -> None:
        happened: list[str] = []

        async def endpoint(websocket: WebSocket) -> None:
            async for message in messages(websocket):
                happened.append(message)
                current_context().callback(happened.append, f"{message} released")
                await websocket.send_text("ok")

        app = app_of(ucm_manager, endpoint, context_per_message=True)
        async with Drive(app).websocket("/ws", headers=ALICE) as socket:
            for word in ("one", "two"):
                socket.send_text(word)
                await socket.receive_text()
        assert happened == ["one", "one released", "two", "two released"]

    async def test_its_records_are_its_own(self, ucm_manager: UserContextManager, ucm_ledger: RecordingLedger) -> None:
        async def endpoint(websocket: WebSocket) -> None:
            async for message in messages(websocket):
                current_context().record("transaction", data={"said": message})
                await websocket.send_text("ok")

        app = app_of(ucm_manager, endpoint, context_per_message=True)
        async with Drive(app).websocket("/ws", headers=ALICE) as socket:
            for word in ("one", "two"):
                socket.send_text(word)
                await socket.receive_text()
        opened = ucm_ledger.select("child_opened")
        recorded = ucm_ledger.select("transaction")
        assert [dict(record.data)["operation"] for record in opened] == ["message", "message"]
        assert [record.context_id for record in opened] == [record.context_id for record in recorded]
        [connection] = ucm_ledger.select("opened")
        closed = {record.context_id: record.reason for record in ucm_ledger.select("closed")}
        assert closed == {record.context_id: "finished" for record in (*opened, connection)}

    async def test_without_the_option_there_is_one_context_for_all(self, ucm_manager: UserContextManager) -> None:
        async def endpoint(websocket: WebSocket) -> None:
            async for message in messages(websocket):
                context = current_context()
                assert context is user_context(websocket)
                await websocket.send_text(json.dumps(context.agent_context))
                context.agent_context["said"] = message

        async with Drive(app_of(ucm_manager, endpoint)).websocket("/ws", headers=ALICE) as socket:
            socket.send_text("one")
            assert await socket.receive_json() == {}
            socket.send_text("two")
            assert await socket.receive_json() == {"said": "one"}
