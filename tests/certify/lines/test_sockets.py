"""WebSockets on real uvicorn: what comes is heard with the step that opened them, and none is waited for in vain."""

import asyncio
from collections.abc import Generator

import pytest

from support.certifying import ROOT
from ucm_middleware.certify.lines.answer import Answer
from ucm_middleware.certify.lines.sockets import Sockets
from ucm_middleware.certify.steps import Connect
from ucm_middleware.testing.server import start_server


@pytest.fixture(scope="module")
def url() -> Generator[str]:
    with start_server("tests.certify.apps.echoes:app", app_dir=ROOT) as server:
        yield server.ws_url


class Ears:
    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.reasons: list[tuple[str, str]] = []
        self.something = asyncio.Event()

    def hear(self, step: Connect, data: bytes) -> None:
        self.heard.append((step.user, data))
        self.something.set()

    def closed(self, step: Connect, reason: str) -> None:
        self.reasons.append((step.user, reason))
        self.something.set()


def unclosed(_: Connect, reason: str) -> None:
    raise AssertionError(reason)


TOLD = [(b"x-told", b"in a header"), (b"set-cookie", b"sid=of-the-handshake")]


def connect(user: str) -> Connect:
    return Connect(1, user, "WS /live", 0, f"{user} at live")


async def test_each_hears_their_own(url: str) -> None:
    sockets = Sockets((ears := Ears()).hear, ears.closed)
    for user in ("alice", "bob"):
        await sockets.connect(connect(user), f"{url}/live", ())
    for user in ("bob", "alice"):
        ears.something.clear()
        await sockets.say(f"{user} at live", f"of {user}")
        await ears.something.wait()
    await sockets.aclose()
    assert ears.heard == [("bob", b"of bob"), ("alice", b"of alice")]


async def test_one_that_is_refused_is_not_open(url: str) -> None:
    sockets = Sockets(Ears().hear, unclosed)
    assert (await sockets.connect(connect("alice"), f"{url}/refused", ())).status == 403
    assert await sockets.connect(connect("alice"), "ws://127.0.0.1:1/live", ()) == Answer("refused")
    await sockets.say("alice at live", "nobody hears it")
    await sockets.hang_up("alice at live", abruptly=True)
    await sockets.aclose()


async def test_what_a_handshake_and_a_denial_say_is_returned(url: str) -> None:
    sockets = Sockets(Ears().hear, unclosed)
    opened = await sockets.connect(connect("alice"), f"{url}/live", ())
    denied = await sockets.connect(connect("bob"), f"{url}/denied", ())
    assert (opened.ending, opened.status, opened.body) == ("complete", 101, b"")
    assert (denied.ending, denied.status, denied.body) == ("complete", 403, b"in a body")
    for answer in (opened, denied):
        assert [header for header in answer.headers if header in TOLD] == TOLD
    await sockets.aclose()


async def test_why_the_server_closes_one_is_told(url: str) -> None:
    sockets = Sockets((ears := Ears()).hear, ears.closed)
    await sockets.connect(connect("alice"), f"{url}/closed", ())
    await ears.something.wait()
    await sockets.aclose()
    assert ears.reasons == [("alice", "in a reason")]
    assert ears.heard == []


async def test_what_the_server_has_closed_is_neither_waited_for_nor_failed_on(url: str) -> None:
    sockets = Sockets((ears := Ears()).hear, ears.closed)
    await sockets.connect(connect("alice"), f"{url}/once", ())
    await sockets.say("alice at live", "once")
    await ears.something.wait()
    await sockets.say("alice at live", "twice")
    await sockets.connect(connect("bob"), f"{url}/live", ())
    await sockets.hang_up("bob at live", abruptly=True)
    await sockets.aclose()
    assert ears.heard == [("alice", b"once")]


async def test_what_hearing_fails_on_leaves_no_other_open(url: str) -> None:
    def fail(step: Connect, data: bytes) -> None:
        if step.user == "alice":
            raise ValueError("in the listener")

    before = asyncio.all_tasks()
    sockets = Sockets(fail, unclosed)
    for user in ("alice", "bob"):
        await sockets.connect(connect(user), f"{url}/live", ())
        await sockets.say(f"{user} at live", "hello")
    with pytest.raises(ValueError, match="in the listener"):
        await sockets.aclose()
    async with asyncio.timeout(5):
        await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
