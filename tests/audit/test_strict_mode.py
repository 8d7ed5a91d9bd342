"""Strict mode: nothing runs before its opening is durable, and no answer is complete before its outcome is."""

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import pytest

from support.asgi import DENIAL, exchange, http_scope, status_of, websocket_scope
from support.contexts import MakeManager
from support.events import connect, settled
from support.ledger import row
from support.waiting import PATIENCE
from ucm_middleware import (
    ConfigurationError,
    LedgerUnavailableError,
    UnauthenticatedError,
    UserContextManager,
    UserContextMiddleware,
)
from ucm_middleware.audit import MemoryLedger, Row
from ucm_middleware.secret import SecretRing
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send


class Diary(MemoryLedger):
    """A durable ledger that tells what happened in which order, and can refuse from some record on."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.problem: str | None = None
        self.fails_at: str | None = None
        self.has_room = True
        self._new: list[str] = []

    lag = 0

    def start(self, secrets: SecretRing) -> None:
        self.story.append("started")

    def append(self, row: Row) -> None:
        super().append(row)
        self._new.append(row[0])
        if row[0] == self.fails_at:
            self.problem = "the disk is full"

    def durable(self) -> Awaitable[None]:
        return self._durable()

    async def _durable(self) -> None:
        await asyncio.sleep(0)
        if self.problem is not None:
            raise LedgerUnavailableError(self.problem)
        self.has_room = True
        self.story += [f"durable: {event}" for event in self._new]
        self._new.clear()

    def flush(self, timeout: float) -> None:
        self.story += [f"flushed: {event}" for event in self._new]
        self._new.clear()


def answering(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        scope["diary"].append("the handler runs")
        for message in messages:
            await send(message)

    return app


TRAILERS: dict[str, Any] = {"http.response.trailers": {}}
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"all"}
PART: Message = {"type": "http.response.body", "body": b"part", "more_body": True}
ACCEPT: Message = {"type": "websocket.accept"}
TEXT: Message = {"type": "websocket.send", "text": "hello"}
CLOSE: Message = {"type": "websocket.close", "code": 4000}


async def drive(
    diary: Diary, manager: UserContextManager, app: ASGIApp, scope: Scope, **settings: Any
) -> list[Message]:
    """The exchange, with what was sent told in the diary as it left."""
    middleware = UserContextMiddleware(app, manager=manager, **settings)

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            diary.story.append(f"sent: {message['type']}")
            await send(message)

        await middleware({**scope, "diary": diary.story}, receive, tell)

    return await exchange(watched, scope)


@pytest.fixture
def diary() -> Diary:
    return Diary()


@pytest.fixture
def manager(make_manager: MakeManager, diary: Diary) -> UserContextManager:
    return make_manager(ledger=diary, audit="strict")


async def test_the_opening_is_durable_before_the_handler_and_the_outcome_before_the_last_byte(
    diary: Diary, manager: UserContextManager
) -> None:
    await drive(diary, manager, answering(START, PART, BODY), http_scope())
    assert diary.story == [
        "started",
        "durable: opened",
        "the handler runs",
        "sent: http.response.start",
        "sent: http.response.body",
        "durable: answered",
        "sent: http.response.body",
    ]


@pytest.mark.parametrize(
    "last",
    [
        (START, BODY),
        (START, {"type": "http.response.pathsend", "path": "/etc/hostname"}),
        (START, {"type": "http.response.zerocopysend", "file": 3}),
        ({**START, "trailers": True}, BODY, {"type": "http.response.trailers", "headers": []}),
    ],
    ids=lambda messages: messages[-1]["type"],
)
async def test_whatever_ends_an_answer_waits_for_its_record(
    diary: Diary, manager: UserContextManager, last: tuple[Message, ...]
) -> None:
    await drive(diary, manager, answering(*last), http_scope(extensions=TRAILERS))
    assert diary.story[-1] == f"sent: {last[-1]['type']}"
    assert [step for step in diary.story if step != "sent: http.response.start"][-2] == "durable: answered"


async def test_a_trailer_that_is_not_the_last_does_not_wait(diary: Diary, manager: UserContextManager) -> None:
    with_trailers = http_scope(extensions=TRAILERS)
    more: Message = {"type": "http.response.trailers", "headers": [], "more_trailers": True}
    end: Message = {"type": "http.response.trailers", "headers": []}
    await drive(diary, manager, answering({**START, "trailers": True}, BODY, more, end), with_trailers)
    assert diary.story[-3:] == ["sent: http.response.trailers", "durable: answered", "sent: http.response.trailers"]
    assert diary.story.count("durable: answered") == 1


SIZED: Message = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"8")]}
MORE: Message = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("scope", "messages", "last"),
    [
        (
            http_scope(),
            (SIZED, PART, PART, MORE),
            2,
        ),  # a file of whole chunks, a proxied answer
        (http_scope(method="HEAD"), (START, PART, BODY), 0),
        (http_scope(), ({**START, "status": 204}, PART, MORE), 0),
        (http_scope(), ({**START, "status": 304}, PART, MORE), 0),
        (http_scope(), ({**START, "trailers": True}, BODY), 0),  # the server has none, so that they are not sent
    ],
    ids=["sized", "HEAD", "204", "304", "trailers that the server has not"],
)
async def test_what_the_client_takes_for_the_end_waits_for_its_record(
    diary: Diary, manager: UserContextManager, scope: Scope, messages: tuple[Message, ...], last: int
) -> None:
    await drive(diary, manager, answering(*messages), scope)
    sent = [step for step in diary.story if step.startswith(("sent", "durable: answered"))]
    assert sent.index("durable: answered") == last
    assert sent.count("durable: answered") == 1
    assert len(sent) == len(messages) + 1


async def test_a_length_that_is_no_number_is_none(diary: Diary, manager: UserContextManager) -> None:
    start: Message = {**START, "headers": [(b"content-length", b"many")]}
    await drive(diary, manager, answering(start, PART, BODY), http_scope())
    assert diary.story[-2:] == ["durable: answered", "sent: http.response.body"]


@pytest.mark.parametrize(("scope", "messages"), [(http_scope(), ()), (websocket_scope(), (ACCEPT, TEXT))])
async def test_an_app_that_ends_without_an_end_is_on_record_too(
    diary: Diary, manager: UserContextManager, scope: Scope, messages: tuple[Message, ...]
) -> None:
    await drive(diary, manager, answering(*messages), scope)
    assert diary.story[-1] == "durable: answered"


async def test_a_start_that_nothing_follows_is_sent_at_the_end(diary: Diary, manager: UserContextManager) -> None:
    await drive(diary, manager, answering(START), http_scope())
    assert diary.story[-2:] == ["durable: answered", "sent: http.response.start"]


async def test_a_websocket_is_recorded_before_it_is_accepted_and_before_it_is_closed(
    diary: Diary, manager: UserContextManager
) -> None:
    await drive(diary, manager, answering(ACCEPT, TEXT, CLOSE), websocket_scope())
    assert diary.story[1:] == [
        "durable: opened",
        "the handler runs",
        "sent: websocket.accept",
        "sent: websocket.send",
        "durable: answered",
        "sent: websocket.close",
    ]


@pytest.mark.parametrize(
    ("scope", "app", "status"),
    [
        (http_scope(), answering(START, BODY), 200),
        (websocket_scope(), answering(ACCEPT, CLOSE), 4000),
        (
            websocket_scope(extensions=DENIAL),
            answering(
                {"type": "websocket.http.response.start", "status": 403, "headers": []},
                {"type": "websocket.http.response.body", "body": b""},
            ),
            403,
        ),
    ],
)
async def test_the_record_says_how_it_ended(
    diary: Diary, manager: UserContextManager, scope: Scope, app: ASGIApp, status: int
) -> None:
    await drive(diary, manager, app, scope, identify=lambda connection: "alice")
    trail = diary.trail("alice")
    assert trail is not None
    [answered] = [record for record in trail.records if record.event == "answered"]
    assert answered.data == (("status", status),)


async def test_when_the_opening_cannot_be_recorded_the_handler_does_not_run(
    diary: Diary, manager: UserContextManager
) -> None:
    diary.fails_at = "opened"
    sent = await drive(diary, manager, answering(START, BODY), http_scope())
    assert status_of(sent) == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert "the handler runs" not in diary.story
    assert len(manager._registry) == 0
    assert not manager.is_healthy()


@pytest.mark.parametrize("extensions", [{}, DENIAL])
async def test_nor_is_a_websocket_accepted(
    diary: Diary, manager: UserContextManager, extensions: dict[str, Any]
) -> None:
    diary.fails_at = "opened"
    sent = await drive(diary, manager, answering(ACCEPT, CLOSE), websocket_scope(extensions=extensions))
    if extensions:
        assert status_of(sent) == 503
    else:
        assert sent == [{"type": "websocket.close", "code": 1013, "reason": "The server cannot do this at the moment."}]


async def test_when_the_outcome_cannot_be_recorded_another_answer_takes_its_place(
    diary: Diary, manager: UserContextManager
) -> None:
    diary.fails_at = "answered"
    sent = await drive(diary, manager, answering(START, BODY), http_scope())
    assert status_of(sent) == 503
    assert b"all" not in b"".join(message.get("body", b"") for message in sent)


async def test_an_answer_that_is_under_way_is_broken_off(diary: Diary, manager: UserContextManager) -> None:
    diary.fails_at = "answered"
    with pytest.raises(LedgerUnavailableError):
        await drive(diary, manager, answering(START, PART, BODY), http_scope())
    assert diary.story[-2:] == ["sent: http.response.start", "sent: http.response.body"]


async def test_a_refusal_is_durable_before_it_is_told(diary: Diary, manager: UserContextManager) -> None:
    def nobody(connection: object) -> str:
        raise UnauthenticatedError("who are you")

    sent = await drive(diary, manager, answering(), http_scope(), identify=nobody)
    assert status_of(sent) == 401
    assert diary.story[1:3] == ["durable: refused", "sent: http.response.start"]


async def test_a_refusal_that_cannot_be_recorded_is_another_one(diary: Diary, manager: UserContextManager) -> None:
    def nobody(connection: object) -> str:
        raise UnauthenticatedError("who are you")

    diary.fails_at = "refused"
    sent = await drive(diary, manager, answering(), http_scope(), identify=nobody)
    assert status_of(sent) == 503


def test_a_grant_is_durable_before_the_first_access(diary: Diary, manager: UserContextManager) -> None:
    with manager.privileged(reason="a support case", users=["alice"]):
        diary.story.append("the access")
    assert diary.story == ["started", "flushed: privileged", "the access"]


async def test_in_async_mode_nothing_waits(make_manager: MakeManager, diary: Diary) -> None:
    manager = make_manager(ledger=diary)
    await drive(diary, manager, answering(START, BODY), http_scope())
    with manager.privileged(reason="a support case", users=["alice"]):
        pass
    assert not [step for step in diary.story if step.startswith(("durable", "flushed"))]


async def test_in_async_mode_what_the_ledger_cannot_keep_up_with_waits_outside(
    make_manager: MakeManager, diary: Diary
) -> None:
    manager = make_manager(ledger=diary)
    diary.append(row("bob"))
    diary.has_room = False
    await drive(diary, manager, answering(START, BODY), http_scope())
    assert diary.story[1:3] == ["durable: opened", "the handler runs"]


async def test_in_async_mode_a_full_line_that_cannot_be_written_refuses(
    make_manager: MakeManager, diary: Diary
) -> None:
    manager = make_manager(ledger=diary)
    diary.has_room, diary.problem = False, "the disk is full"
    sent = await drive(diary, manager, answering(START, BODY), http_scope())
    assert status_of(sent) == 503
    assert "the handler runs" not in diary.story


async def test_the_drain_waits_for_what_is_in_line(make_manager: MakeManager, diary: Diary) -> None:
    manager = make_manager(ledger=diary)
    manager.create_isolated_context("alice").close()
    await manager.drain(0)
    assert diary.story == ["started", "durable: opened", "durable: closed"]


async def test_a_drain_that_cannot_write_says_how_many_are_lost_and_ends(
    make_manager: MakeManager, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(ledger=diary)
    diary.problem = "the disk is full"
    await manager.drain(0)
    assert "0 audit records are not written: the disk is full" in caplog.text


@pytest.mark.parametrize("ledger", [None, MemoryLedger()])
def test_it_needs_a_ledger_that_keeps_records_for_good(make_manager: MakeManager, ledger: object) -> None:
    with pytest.raises(ConfigurationError, match="SQLiteLedger"):
        make_manager(ledger=ledger, audit="strict")


def test_there_is_no_other_mode(make_manager: MakeManager, diary: Diary) -> None:
    with pytest.raises(ConfigurationError, match="'lazy'"):
        make_manager(audit="lazy")
    with pytest.raises(ConfigurationError, match="audit is 'off', and a ledger is given"):
        make_manager(audit="off", ledger=diary)


def test_off_keeps_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(audit="off")
    manager.create_isolated_context("alice").close()
    assert manager.get_audit_trail("alice") is None
    assert manager.get_system_trail() == []


async def test_what_cannot_be_put_on_record_is_not_sent(diary: Diary, manager: UserContextManager) -> None:
    _, client, _ = connect(manager, "alice")
    diary.problem = "the disk is full"
    await manager.send_event("alice", "message", "there is room in line")
    diary.has_room = False
    with pytest.raises(LedgerUnavailableError, match="the disk is full"):
        await manager.send_event("alice", "message", "too much")
    with pytest.raises(LedgerUnavailableError, match="the disk is full"):
        manager.post_event("alice", "message", "too much")
    await settled()
    assert client.data == ["there is room in line"]
    diary.problem = None
    assert (await manager.send_event("alice", "message", "again")).sequence == 2


async def test_asking_the_ledger_who_was_here_holds_up_no_event_loop(
    diary: Diary, manager: UserContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, loop_goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def knows(user_id: str) -> bool:
        loop.call_soon_threadsafe(asked.set)
        return loop_goes_on.wait(PATIENCE)

    monkeypatch.setattr(diary, "knows", knows)
    sending = asyncio.create_task(manager.send_event("alice", "message", 1))
    await asked.wait()
    loop_goes_on.set()
    assert (await sending).kept


async def test_who_is_signed_out_is_told_so_also_when_the_disk_is_full(
    diary: Diary, manager: UserContextManager
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        diary.problem = "the disk is full"
        asyncio.get_running_loop().call_soon(manager.revoke, "alice", "stolen")
        await asyncio.Event().wait()

    sent = await drive(diary, manager, app, websocket_scope(), identify=lambda connection: "alice")
    assert [(message["type"], message.get("code")) for message in sent][-1] == ("websocket.close", 1008)
