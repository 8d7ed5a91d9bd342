"""Promise 2: a context is open from before the handler until after the last byte, and then it is of no more use."""

from collections.abc import Callable, Iterator

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, client, observing, token_of
from support.raw_http import RawConnection, build_request
from support.servers import Server
from support.waiting import wait_until

ALICE = token_of("alice")


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_life:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def steps(desk: Observer) -> list[str]:
    return [str(entry.get("step", entry["what"])) for entry in desk.journal()]


def unreleased(desk: Observer) -> list[str]:
    """The names of what was entered and not released, once each."""
    released = [entry["name"] for entry in desk.journal("released")]
    return [entry["name"] for entry in desk.journal("entered") if entry["name"] not in released]


def test_open_while_streaming_and_in_the_background_closed_after(desk: Observer) -> None:
    with client(desk.server) as fresh, fresh.stream("GET", "/stream", headers=ALICE) as response:
        chunks = response.iter_text()
        assert next(chunks) == "first "
        assert [live["user_id"] for live in desk.active()] == ["alice"]
        assert unreleased(desk) == ["session"]
        desk.open("last chunk")
        assert next(chunks) == "last"
        assert [live["user_id"] for live in desk.active()] == ["alice"]
        assert unreleased(desk) == ["session"]
        desk.open("background")
    desk.wait_for("released", name="session")
    assert steps(desk) == [
        "dependency",
        "entered",
        "first chunk",
        "last chunk",
        "background task",
        "sync background task",
        "dependency's end",
        "released",
    ]
    assert {entry["user"] for entry in desk.journal("step")} == {"alice"}


def test_resources_are_released_last_in_first_out_after_all_of_the_app(desk: Observer) -> None:
    assert desk.request("alice", "/order").status_code == 200
    desk.wait_for("released", name="first")
    entered = ["first", "second", "third", "fourth", "child's", "fifth"]
    assert [entry["name"] for entry in desk.journal("entered")] == entered
    # A child closes with its parent, before the parent lets go of anything.
    released = ["child's", "fifth", "fourth", "third", "second", "first"]
    assert [entry["name"] for entry in desk.journal("released")] == released
    order = steps(desk)
    assert order.index("released") > max(order.index("dependency's end"), order.index("sync background task"))


def test_afterwards_its_data_is_gone_and_its_ids_stay(desk: Observer) -> None:
    request_id = desk.request("alice", "/leave").json()
    desk.wait_until_closed("alice", request_id)
    found = desk.ask("remains")
    assert found["data"] == found["child's data"] == {}
    assert found["ids"][:2] == ["alice", request_id]
    assert request_id in found["text"]
    assert "closed" in found["text"]
    # What the app took out of it is the app's.
    assert found["nested"] == {"notes": ["hers"]}


@pytest.mark.parametrize("whose", ["uses", "child's uses"])
def test_afterwards_every_use_is_refused_and_says_where_it_was_opened(desk: Observer, whose: str) -> None:
    request_id = desk.request("alice", "/leave").json()
    desk.wait_until_closed("alice", request_id)
    found = desk.ask("remains")[whose]
    assert {name: outcome[0] for name, outcome in found.items()} == dict.fromkeys(found, "ContextClosedError")
    assert len(found) == 11
    for _, message in found.values():
        if whose == "uses":
            assert f"context {request_id} is closed (finished); it was opened by an HTTP request" in message
        else:
            assert "promise_life.py:" in message
    # Refused before it is entered: nobody would ever leave it.
    assert desk.journal("entered", name="late") == []
    # What was open already and is handed over too late is let go of at once, for both contexts.
    assert len(desk.journal("called too late")) == 2
    wait_until(lambda: len(desk.journal("released", name="handed over too late")) == 2, "the cursors are closed")


def test_a_task_that_outlives_its_request_can_do_nothing_in_its_name(desk: Observer) -> None:
    request_id = desk.request("alice", "/leave").json()
    desk.wait_until_closed("alice", request_id)
    desk.open("outlive")
    desk.wait_for("late use", name="enter")
    late = desk.journal("late use")
    assert len(late) == 7
    for entry in late:
        kind, message = entry["outcome"]
        assert (entry["name"], kind) == (entry["name"], "ContextClosedError")
        assert request_id in message


def test_an_error_of_the_app_is_seen_by_its_resources(desk: Observer) -> None:
    assert desk.request("alice", "/fail?how=crash").status_code == 500
    desk.wait_for("released", name="sync")
    released = [(entry["name"], entry["error"]) for entry in desk.journal("released")]
    assert released == [("async", "RuntimeError"), ("sync", "RuntimeError")]


def test_an_answer_that_the_app_gives_is_no_error(desk: Observer) -> None:
    assert desk.request("alice", "/fail?how=refuse").status_code == 418
    desk.wait_for("released", name="sync")
    assert [(entry["name"], entry["error"]) for entry in desk.journal("released")] == [("async", None), ("sync", None)]


Leave = Callable[[RawConnection], None]
leaving = pytest.mark.parametrize("leave", [RawConnection.close, RawConnection.reset])


@leaving
def test_a_client_that_leaves_mid_stream_ends_the_context(desk: Observer, leave: Leave) -> None:
    with RawConnection(desk.server) as connection:
        connection.send(build_request("/endless", headers=ALICE))
        connection.socket.recv(10_000)
        assert [live["user_id"] for live in desk.active()] == ["alice"]
        leave(connection)
    desk.wait_until_idle()
    desk.wait_for("released", name="outer")
    assert [entry["name"] for entry in desk.journal("released")] == ["inner", "outer"]


@leaving
def test_a_client_that_leaves_mid_body_ends_the_context(desk: Observer, leave: Leave) -> None:
    with RawConnection(desk.server) as connection:
        head = build_request("/upload", method="POST", headers={**ALICE, "Content-Length": "1000"})
        connection.send(head + b"x" * 10)
        desk.wait_for("received", size=10)
        assert [live["user_id"] for live in desk.active()] == ["alice"]
        leave(connection)
        desk.wait_for("step", step="noticed that the client left", user="alice")
    desk.wait_for("released", name="session")
    desk.wait_until_idle()


@leaving
def test_a_client_that_leaves_does_not_take_the_context_from_under_the_handler(desk: Observer, leave: Leave) -> None:
    with RawConnection(desk.server) as connection:
        connection.send(build_request("/wait", headers=ALICE))
        desk.wait_for("waiting")
        leave(connection)
        desk.open("go on")
        # Fails when the context has closed before its handler was through.
        desk.wait_for("step", step="after the wait", user="alice")
    desk.wait_until_idle()
    desk.wait_for("released", name="session", error=None)


def test_a_handler_whose_client_has_left_is_cut_off_where_the_app_asks_for_it(
    server_kind: str, server_factory: ServerFactory
) -> None:
    server = server_factory(server_kind, "promise_life:app", env={"IMPATIENT": "1"})
    with observing(server) as desk, RawConnection(server) as connection:
        connection.send(build_request("/wait", headers=ALICE))
        desk.wait_for("waiting")
        connection.close()
        # Nobody opens the gate that the handler waits at.
        assert desk.wait_for("released", name="session")["error"] is not None
        desk.wait_until_idle()
        assert desk.journal("step", step="after the wait") == []
        # Who stays is served.
        assert desk.request("alice", "/upload", "POST", content=b"x" * 100_000).json() == 100_000


def test_a_websocket_is_open_until_its_client_says_goodbye(desk: Observer) -> None:
    with desk.websocket("alice", "/ws") as websocket:
        for message in ("hello", "how are you"):
            websocket.send(message)
            assert websocket.recv() == "ok"
        assert [live["user_id"] for live in desk.active()] == ["alice"]
        assert unreleased(desk) == ["session"]
    desk.wait_for("disconnected")
    desk.wait_until_idle()
    assert desk.wait_for("released", name="session")["error"] is None


def test_a_websocket_whose_line_is_cut_ends_its_context(desk: Observer) -> None:
    with desk.websocket("alice", "/ws") as websocket:
        websocket.send("hello")
        assert websocket.recv() == "ok"
        websocket.socket.shutdown(2)
        desk.wait_for("disconnected")
    wait_until(lambda: unreleased(desk) == [], "its session is released")


def test_the_next_request_on_the_connection_finds_the_context_of_the_last_one_gone(desk: Observer) -> None:
    with RawConnection(desk.server) as connection:
        first = connection.request("/leave", headers=ALICE).json()
        second = connection.request("/leave", headers=ALICE).json()
    assert first != second
    for request_id in (first, second):
        assert desk.wait_until_closed("alice", request_id)["reason"] == "finished"


def test_a_process_that_a_request_forks_is_nobody_s(server_kind: str, module_server_factory: ServerFactory) -> None:
    with client(module_server_factory(server_kind, "promise_forks:app")) as fresh:
        for user in ("alice", "bob"):
            assert fresh.get("/job", headers=token_of(user)).json() == {
                "user": user,
                "job": "nobody",
                "here": f"the secret of {user}",
            }
