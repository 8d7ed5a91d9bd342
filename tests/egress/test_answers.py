"""What servers do not show: the order of messages, when work is done, and what is left of a request."""

import gc
import weakref
from typing import Any

import pytest

from support.contexts import MakeManager
from ucm_middleware import EVERYONE, EgressPolicy, UserContextMiddleware, UserExecutionContext, current_context
from ucm_middleware.types import Message, Receive, Scope, Send

TOKEN = "9f3c1a7be85d20c46fa17d39b2e80c54"

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-one", b"1")], "trailers": True}


def body(data: object, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Wire:
    """A server's end: what was sent, and what was on record by then."""

    def __init__(self, make_manager: MakeManager, **policy: Any) -> None:
        self.manager = make_manager(egress=EgressPolicy(**policy))
        self.sent: list[Message] = []
        self.records: list[int] = []
        self.context: weakref.ref[UserExecutionContext] | None = None

    def protect(self) -> None:
        alice = self.manager.create_isolated_context("alice")
        alice.protect(TOKEN)
        alice.close()

    def count(self) -> int:
        with self.manager.privileged(reason="test", users=EVERYONE):
            return len([record for record in self.manager.get_system_trail() if record["event"] == "egress"])

    async def run(self, *messages: Message) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.context = weakref.ref(current_context())
            for message in messages:
                await send(message)

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            self.sent.append(message)
            self.records.append(self.count())

        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "state": {}}
        scope["query_string"] = b""
        middleware = UserContextMiddleware(app, manager=self.manager, identify=lambda _: "bob")
        await middleware(scope, receive, send)

    @property
    def kinds(self) -> list[str]:
        return [message["type"].rpartition(".")[2] for message in self.sent]

    @property
    def data(self) -> bytes:
        return b"".join(bytes(message.get("body", b"")) for message in self.sent)


@pytest.mark.parametrize("block", [False, True])
async def test_what_is_held_back_leaves_before_what_is_not_bytes(make_manager: MakeManager, block: bool) -> None:
    wire = Wire(make_manager, block=block)
    await wire.run(
        START,
        body(b"abc"),
        {"type": "http.response.zerocopysend", "file": 7, "more_body": True},
        body(memoryview(b"def")),
        body(b"", more=False),
        {"type": "http.response.trailers", "headers": [(b"x-two", b"2")]},
    )
    assert [kind for kind in wire.kinds if kind != "body"] == ["start", "zerocopysend", "trailers"]
    assert wire.kinds.index("body") < wire.kinds.index("zerocopysend")
    assert wire.data == b"abcdef"


@pytest.mark.parametrize("block", [False, True])
async def test_a_file_that_the_server_sends_passes(make_manager: MakeManager, block: bool) -> None:
    wire = Wire(make_manager, block=block)
    await wire.run(START, {"type": "http.response.pathsend", "path": "/tmp/x"})
    assert wire.kinds == ["start", "pathsend"]


async def test_trailers_are_looked_at(make_manager: MakeManager) -> None:
    wire = Wire(make_manager)
    wire.protect()
    await wire.run(
        START, body(b"", more=False), {"type": "http.response.trailers", "headers": [(b"x", TOKEN.encode())]}
    )
    assert wire.count() == 1


async def test_nothing_is_told_before_the_last_byte_of_a_long_answer(make_manager: MakeManager) -> None:
    wire = Wire(make_manager)
    wire.protect()
    looked: list[int] = []
    guard = wire.manager.egress
    assert guard is not None
    find = guard.table.find

    def noted(_: object, data: bytes) -> Any:
        looked.append(len(wire.sent))
        return find(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(guard.table), "find", noted)
        parts = [body(b"words and " * 5000 + TOKEN.encode() + b"\n") for _ in range(10)]
        await wire.run(START, *parts, body(b"", more=False))
    assert set(wire.records) == {0}
    assert wire.count() == 1
    assert set(looked) == {len(wire.sent)}


async def test_what_is_learned_is_protected_when_the_last_byte_has_left(make_manager: MakeManager) -> None:
    wire = Wire(make_manager, fields=["token"])
    guard = wire.manager.egress
    assert guard is not None
    found: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b'{"token":"%b"}' % TOKEN.encode(), more=False))
        found.append(guard.table.may_hold(TOKEN.encode()))  # a background task

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        assert not guard.table.may_hold(TOKEN.encode())

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "state": {}}
    await UserContextMiddleware(app, manager=wire.manager, identify=lambda _: "bob")(scope, receive, send)
    assert found == [True]


@pytest.mark.parametrize("block", [False, True])
async def test_no_cycle_keeps_a_context_alive(make_manager: MakeManager, block: bool) -> None:
    wire = Wire(make_manager, block=block)
    wire.protect()
    gc.collect()
    gc.disable()
    try:
        await wire.run(START, body(b"hello", more=False))
        assert wire.context is not None
        assert wire.context() is None
    finally:
        gc.enable()


async def test_odd_headers_of_a_reported_answer_are_the_servers_to_judge(make_manager: MakeManager) -> None:
    wire = Wire(make_manager)
    wire.protect()
    await wire.run({**START, "headers": [("x-text", "1")]}, body(12, more=False))
    assert wire.kinds == ["start", "body"]
