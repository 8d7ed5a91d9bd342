"""Reading ahead of the app: what it gets, when the client counts as gone, and when no longer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from support.asgi import exchange, http_scope
from support.waiting import PATIENCE
from ucm_middleware import UserContextMiddleware, UserExecutionContext, current_context
from ucm_middleware.disconnect import MOST_MESSAGES, ReadAhead
from ucm_middleware.types import Message, Receive, Scope, Send

GONE: Message = {"type": "http.disconnect"}
START: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Server:
    """Gives messages as the test has them come, and keeps what is sent."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.given = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        message = await self.messages.get()
        self.given += 1
        return message

    def send(self, message: Message) -> Awaitable[None]:
        self.sent.append(message)
        return asyncio.sleep(0)


async def some_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def left() -> list[str]:
    """What was noted when the client left."""
    return []


Begin = Callable[[], ReadAhead]


@pytest.fixture
def begin(server: Server, left: list[str]) -> Iterator[Begin]:
    begun: list[ReadAhead] = []

    def make() -> ReadAhead:
        begun.append(ReadAhead(server.receive, server.send, lambda: left.append("gone")))
        return begun[0]

    yield make
    for ahead in begun:
        ahead.stop()


def body(part: bytes, *, more_body: bool = True) -> Message:
    return {"type": "http.request", "body": part, "more_body": more_body}


class TestReading:
    async def test_the_app_gets_what_there_was_in_order_and_the_end_for_ever(
        self, server: Server, begin: Begin
    ) -> None:
        ahead = begin()
        for message in (body(b"a"), body(b"b", more_body=False), GONE):
            server.messages.put_nowait(message)
        received = [await ahead.receive() for _ in range(5)]
        assert received == [body(b"a"), body(b"b", more_body=False), GONE, GONE, GONE]

    async def test_whoever_waits_gets_what_comes(self, server: Server, begin: Begin) -> None:
        waiting = asyncio.create_task(begin().receive())
        await some_turns()
        server.messages.put_nowait(body(b"late"))
        assert await waiting == body(b"late")

    async def test_it_runs_so_far_ahead_and_no_further(self, server: Server, begin: Begin) -> None:
        ahead = begin()
        for number in range(100):
            server.messages.put_nowait(body(b"%d" % number))
        await some_turns()
        for _ in range(100):
            await asyncio.sleep(0)
        assert server.given == MOST_MESSAGES
        assert [await ahead.receive() for _ in range(100)] == [body(b"%d" % number) for number in range(100)]

    async def test_after_the_stop_the_server_is_asked_itself(self, server: Server, begin: Begin) -> None:
        ahead = begin()
        server.messages.put_nowait(body(b"a"))
        await some_turns()
        ahead.stop()
        server.messages.put_nowait(body(b"b"))
        await some_turns()
        assert server.given == 1
        assert [await ahead.receive() for _ in range(2)] == [body(b"a"), body(b"b")]


def ending(kind: str, **more: object) -> Message:
    return {"type": f"http.response.{kind}", **more}


WHOLE: dict[str, list[Message]] = {
    "body": [ending("body", body=b"x", more_body=True), ending("body", body=b"", more_body=False)],
    "body that says nothing of more": [ending("body", body=b"x")],
    "a file by its path": [ending("pathsend", path="/etc/hostname")],
    "a file by its descriptor": [ending("zerocopysend", file=0, more_body=False)],
    "trailers": [ending("body", body=b"x"), ending("trailers", headers=[], more_trailers=False)],
}
PARTIAL: dict[str, list[Message]] = {
    "nothing": [],
    "more body": [ending("body", body=b"x", more_body=True)],
    "more of a file": [ending("zerocopysend", file=0, more_body=True)],
    "more trailers": [ending("trailers", headers=[], more_trailers=True)],
}


class TestLeaving:
    @pytest.mark.parametrize("parts", PARTIAL.values(), ids=PARTIAL)
    async def test_before_the_whole_response_is_out(
        self, server: Server, begin: Begin, left: list[str], parts: list[Message]
    ) -> None:
        ahead = begin()
        for message in (START, *parts):
            await ahead.send(message)
        server.messages.put_nowait(GONE)
        await some_turns()
        assert left == ["gone"]
        assert server.sent == [START, *parts]

    @pytest.mark.parametrize("parts", WHOLE.values(), ids=WHOLE)
    async def test_after_it_is_no_leaving(
        self, server: Server, begin: Begin, left: list[str], parts: list[Message]
    ) -> None:
        ahead = begin()
        for message in (START, *parts):
            await ahead.send(message)
        server.messages.put_nowait(GONE)
        await some_turns()
        assert left == []
        assert server.given == 1

    @pytest.mark.parametrize("parts", WHOLE.values(), ids=WHOLE)
    async def test_what_runs_in_the_background_then_comes_to_its_end(self, parts: list[Message]) -> None:
        ended: list[UserExecutionContext] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for message in (START, *parts):
                await send(message)
            await some_turns()
            ended.append(current_context())

        middleware = UserContextMiddleware(app, cancel_on_disconnect=True)
        async with asyncio.timeout(PATIENCE):
            await exchange(middleware, http_scope(), body(b"", more_body=False), GONE)
        assert len(ended) == 1
        assert ended[0].lifetime.reason == "finished"
