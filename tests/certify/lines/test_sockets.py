"""WebSockets on real uvicorn: what comes is heard with the step that opened them, and none is waited for in vain."""

import asyncio
from collections.abc import Generator

import pytest

from support.certifying import ROOT
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
        self.something = asyncio.Event()

    def hear(self, step: Connect, data: bytes) -> None:
        self.heard.append((step.user, data))
        self.something.set()


def connect(user: str) -> Connect:
    return Connect(1, user, "WS /live", 0, f"{user} at live")


async def test_each_hears_their_own(url: str) -> None:
    sockets = Sockets((ears := Ears()).hear)
    for user in ("alice", "bob"):
        assert await sockets.connect(connect(user), f"{url}/live", ())
    for user in ("bob", "alice"):
        ears.something.clear()
        await sockets.say(f"{user} at live", f"of {user}")
        await ears.something.wait()
    await sockets.aclose()
    assert ears.heard == [("bob", b"of bob"), ("alice", b"of alice")]


async def test_one_that_is_refused_is_not_open(url: str) -> None:
    sockets = Sockets(Ears().hear)
    assert not await sockets.connect(connect("alice"), f"{url}/refused", ())
    assert not await sockets.connect(connect("alice"), "ws://127.0.0.1:1/live", ())
    await sockets.say("alice at live", "nobody hears it")
    await sockets.hang_up("alice at live", abruptly=True)
    await sockets.aclose()


async def test_what_the_server_has_closed_is_neither_waited_for_nor_failed_on(url: str) -> None:
    sockets = Sockets((ears := Ears()).hear)
    assert await sockets.connect(connect("alice"), f"{url}/once", ())
    await sockets.say("alice at live", "once")
    await ears.something.wait()
    await sockets.say("alice at live", "twice")
    assert await sockets.connect(connect("bob"), f"{url}/live", ())
    await sockets.hang_up("bob at live", abruptly=True)
    await sockets.aclose()
    assert ears.heard == [("alice", b"once")]


async def test_what_hearing_fails_on_leaves_no_other_open(url: str) -> None:
    def fail(step: Connect, data: bytes) -> None:
        if step.user == "alice":
            raise ValueError("in the listener")

    before = asyncio.all_tasks()
    sockets = Sockets(fail)
    for user in ("alice", "bob"):
        assert await sockets.connect(connect(user), f"{url}/live", ())
        await sockets.say(f"{user} at live", "hello")
    with pytest.raises(ValueError, match="in the listener"):
        await sockets.aclose()
    async with asyncio.timeout(5):
        await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
