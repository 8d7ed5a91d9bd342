"""``manager.drain`` called by the application itself, while the server goes on."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.fixtures import ServerFactory
from support.observer import observing
from support.waiting import wait_until


def test_who_comes_is_refused_and_who_is_there_may_finish(server_kind: str, server_factory: ServerFactory) -> None:
    server = server_factory(server_kind, "promise_drain:app")
    with observing(server) as desk, ThreadPoolExecutor(1) as pool:
        working = desk.begin("alice", "/work")
        desk.wait_for("working")
        drained = pool.submit(desk.tell, "drain?timeout=10")
        wait_until(lambda: desk.ask("health") is False, "the manager drains")
        for user in ("alice", "bob", None):
            refused = desk.request(user, "/work")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        with pytest.raises(InvalidStatus) as denied, desk.websocket("bob", "/wait"):
            pass
        assert (denied.value.response.status_code, denied.value.response.headers["retry-after"]) == (503, "1")
        desk.open("work")
        assert working.result().json() == ["alice", False]
        assert drained.result() == 0


def test_who_does_not_finish_is_told_so(server_kind: str, server_factory: ServerFactory) -> None:
    server = server_factory(server_kind, "promise_drain:app")
    with observing(server) as desk, desk.websocket("carol", "/wait") as websocket:
        assert websocket.recv() == "hello"
        working = desk.begin("alice", "/work")
        desk.wait_for("working")
        assert desk.tell("drain?timeout=0.05") == 2
        assert (working.result().status_code, working.result().headers["retry-after"]) == (503, "1")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
        assert [desk.events(user, "closed")[-1]["reason"] for user in ("alice", "carol")] == ["shutdown", "shutdown"]
