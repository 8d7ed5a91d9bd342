"""Promise 3: whatever cuts a request off, each resource that it entered is released or reported.

Nobody else waits for an asynchronous release.
"""

import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of
from support.raw_http import RawConnection, build_request
from support.servers import HOST, SERVER_KINDS, Server
from support.waiting import wait_until

ALICE, BOB = token_of("alice"), token_of("bob")

IMPATIENT: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("uvicorn-h11", "uvicorn-httptools", "uvicorn-uvloop"), ("--timeout-graceful-shutdown", "1")
)
"""Servers that cancel their requests a second after they are told to end. granian never does."""

if sys.version_info < (3, 12):
    # Later ones wait in asyncio's Server.wait_closed() until every connection has gone, before hypercorn's own timeout
    # begins: a handler that does not end holds hypercorn 0.18 up for good, with this package and without it.
    IMPATIENT["hypercorn"] = ("--graceful-timeout", "1")


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_teardown:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def names(entries: list[dict[str, Any]], what: str) -> list[str]:
    return [entry["name"] for entry in entries if entry["what"] == what]


def last_closed(desk: Observer, user: str) -> dict[str, Any]:
    return desk.events(user, "closed")[-1]


EVERY_KIND = ["sync", "async", "callback", "owned", "async callback", "cursor", "child's", "held"]
"""In the order in which they are entered."""

RELEASED = ["child's", "held", "cursor", "async callback", "owned", "callback", "async", "sync"]
"""Children close before their parent; apart from that, last in, first out."""

interruptions = pytest.mark.parametrize("how", ["anyio", "task", "task-three-times", "timeout"])


@interruptions
def test_every_kind_of_resource_is_released_whatever_interrupts_a_request(desk: Observer, how: str) -> None:
    assert desk.request("alice", f"/every-kind?interrupt={how}").text == "interrupted"
    entries = desk.journal()
    assert names(entries, "entered") == EVERY_KIND
    assert names(entries, "released") == RELEASED
    assert entries[-1]["what"] == "interrupted", "the interruption must arrive, after the teardown"
    closed = last_closed(desk, "alice")
    assert (closed["reason"], "unreleased" in closed) == ("cancelled", False)


@interruptions
def test_every_kind_of_resource_is_released_whatever_interrupts_a_websocket(desk: Observer, how: str) -> None:
    with desk.websocket("alice", f"/every-kind?interrupt={how}") as websocket, pytest.raises(ConnectionClosed):
        websocket.recv()
    desk.wait_for("interrupted")
    assert names(desk.journal(), "entered") == EVERY_KIND
    assert names(desk.journal(), "released") == RELEASED


def test_what_must_be_left_in_the_task_that_entered_it_is(desk: Observer) -> None:
    assert desk.request("alice", "/every-kind?interrupt=task-three-times").text == "interrupted"
    entered, released = desk.journal("entered", name="owned"), desk.journal("released", name="owned")
    assert [entry["task"] for entry in entered] == [entry["task"] for entry in released]
    # The others are let go of in tasks of their own, which nothing cancels.
    (request,) = desk.journal("entered", name="async")
    assert desk.journal("released", name="async", task=request["task"]) == []


def test_a_slow_close_delays_no_other_request(desk: Observer) -> None:
    with RawConnection(desk.server) as connection:
        assert connection.request("/slow", headers=ALICE).json() == "done"
        desk.wait_for("releasing", name="held")
        for user in ("bob", "alice"):
            assert desk.request(user, "/quick").json() == "done"
            desk.wait_for("released", name=f"{user}'s")
        assert desk.journal("released", name="below") == []
        desk.open("held may release")
        desk.wait_for("released", name="below")
        assert connection.request("/quick", headers=BOB).json() == "done"


def test_a_failing_close_is_reported_and_breaks_nothing(desk: Observer) -> None:
    with RawConnection(desk.server) as connection:
        assert connection.request("/failing", headers=ALICE).json() == "done"
        assert connection.request("/quick", headers=BOB).json() == "done"
    desk.wait_for("released", name="bottom")
    released = [name for name in names(desk.journal(), "released") if name != "bob's"]
    assert released == ["top", "middle", "bottom"]
    wait_until(lambda: "unreleased" in last_closed(desk, "alice"), "the failures are in the trail")
    closed = last_closed(desk, "alice")
    assert closed["outcome"] == "failed"
    cancelled, failed = closed["unreleased"]
    assert "cancel_myself: cancelled" in cancelled
    assert "fail: failed (ValueError)" in failed
    desk.wait_until_idle()
    assert "unreleased" not in last_closed(desk, "bob")


def test_a_close_that_hangs_is_given_up_in_time_and_reported(desk: Observer) -> None:
    assert desk.request("alice", "/stubborn").json() == "done"
    desk.wait_for("released", name="below")
    assert names(desk.journal(), "released") == ["between", "below"]
    assert desk.journal("ignored") != []
    wait_until(lambda: "unreleased" in last_closed(desk, "alice"), "the failures are in the trail")
    assert last_closed(desk, "alice")["unreleased"] == [
        "deaf: timed out (TimeoutError)",
        "hanging: timed out (TimeoutError)",
    ]


def refuses_connections(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, server.port)) != 0


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.mark.parametrize("kind", SERVER_KINDS)
def test_at_shutdown_what_is_under_way_may_end_before_the_app_does(
    kind: str, server_factory: ServerFactory, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    server = server_factory(kind, "promise_teardown:app", env={"JOURNAL": str(journal)})
    with observing(server) as desk, RawConnection(server) as uploading, RawConnection(server) as streaming:
        head = build_request("/upload", method="POST", headers={**ALICE, "Content-Length": "20"})
        uploading.send(head + b"x" * 10)
        streaming.send(build_request("/stream", headers=BOB))
        with desk.websocket("carol", "/ws") as websocket, ThreadPoolExecutor(1) as pool:
            websocket.send("hello")
            assert websocket.recv() == "hello"
            desk.wait_for("received", size=10)
            desk.wait_for("entered", name="stream")
            stopped = pool.submit(server.stop)
            wait_until(lambda: refuses_connections(server), f"{server!r} has begun to end")
            uploading.send(b"x" * 10)
            assert uploading.read_response().body == b"20"
            assert streaming.read_response().body == b"first last"
            websocket.close()
            assert stopped.result() == (-15 if "uvicorn" in kind else 0)
    entries = read(journal)
    assert entries[0] == {"what": "app startup"}
    assert sorted(names(entries, "released")) == sorted(names(entries, "entered")) == ["stream", "upload", "websocket"]
    assert entries[-1] == {"what": "app shutdown", "live": 0}


@pytest.mark.parametrize("kind", [kind for kind in SERVER_KINDS if kind in IMPATIENT])
def test_at_shutdown_what_does_not_end_is_torn_down_before_the_app_is(
    kind: str, server_factory: ServerFactory, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    env = {"JOURNAL": str(journal), "DRAIN_TIMEOUT": "0.2"}
    server = server_factory(kind, "promise_teardown:app", env=env, options=IMPATIENT[kind])
    with observing(server) as desk, RawConnection(server) as waiting, RawConnection(server) as streaming:
        waiting.send(build_request("/forever", headers=ALICE))
        streaming.send(build_request("/stream", headers=BOB))
        with desk.websocket("carol", "/forever") as websocket:
            assert websocket.recv() == "hello"
            desk.wait_for("waiting")
            desk.wait_for("entered", name="stream")
            assert server.stop() == (-15 if "uvicorn" in kind else 0)
    entries = read(journal)
    entered = ["forever", "forever, owned", "stream", "websocket"]
    assert sorted(names(entries, "released")) == sorted(names(entries, "entered")) == entered
    assert entries[-1] == {"what": "app shutdown", "live": 0}


def test_while_draining_nothing_new_is_opened_and_what_is_open_may_end(
    server_kind: str, server_factory: ServerFactory
) -> None:
    server = server_factory(server_kind, "promise_teardown:app")
    with observing(server) as desk, RawConnection(server) as uploading, ThreadPoolExecutor(1) as pool:
        head = build_request("/upload", method="POST", headers={**ALICE, "Content-Length": "20"})
        uploading.send(head + b"x" * 10)
        desk.wait_for("received", size=10)
        drained = pool.submit(desk.tell, "drain?timeout=10")
        wait_until(lambda: desk.request(None, "/door/health").json() is False, "the manager drains")
        refused = desk.request("bob", "/quick")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert desk.journal("entered", name="bob's") == []
        with pytest.raises(InvalidStatus) as denied, desk.websocket("bob", "/ws"):
            pass
        assert (denied.value.response.status_code, denied.value.response.headers["retry-after"]) == (503, "1")
        uploading.send(b"x" * 10)
        assert uploading.read_response().body == b"20"
        assert drained.result() == 0
        assert desk.journal("released", name="upload") != []


def test_what_outstays_the_draining_is_closed_and_told_so(server_kind: str, server_factory: ServerFactory) -> None:
    server = server_factory(server_kind, "promise_teardown:app")
    with observing(server) as desk, desk.websocket("carol", "/forever") as websocket:
        assert websocket.recv() == "hello"
        waiting = desk.begin("alice", "/forever")
        desk.wait_for("waiting")
        assert desk.tell("drain?timeout=0.05") == 2
        assert sorted(names(desk.journal(), "released")) == ["forever", "forever, owned", "websocket"]
        assert waiting.result().status_code == 503
        assert waiting.result().headers["retry-after"] == "1"
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
        assert [last_closed(desk, user)["reason"] for user in ("alice", "carol")] == ["shutdown", "shutdown"]
