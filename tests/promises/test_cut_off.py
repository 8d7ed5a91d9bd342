"""Handlers that are cut off in the middle of what no cancellation ends, and those that cut themselves off."""

import pytest
from websockets.exceptions import ConnectionClosed

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of
from support.raw_http import RawConnection, build_request
from support.waiting import wait_until

ALICE = token_of("alice")


def close_code(desk: Observer, user: str, path: str, *, then: str | None = None) -> int | None:
    """With which code a connection ends, by itself or after ``then`` was told to the server."""
    with desk.websocket(user, path) as websocket:
        if then is not None:
            desk.wait_for("working", user=user)
            desk.tell(then)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
        return None if closed.value.rcvd is None else closed.value.rcvd.code


def test_who_is_deaf_has_no_context_while_it_is_released_under_it(
    server_kind: str, server_factory: ServerFactory
) -> None:
    server = server_factory(server_kind, "promise_cut_off:app", env={"GRACE": "0.05"})
    with observing(server) as desk:
        working = desk.begin("alice", "/deaf")
        desk.wait_for("working")
        desk.tell("close/alice/revoked")
        desk.wait_for("releasing")
        desk.open("go on")
        desk.wait_for("use", name="a new context")
        assert [(entry["name"], entry["outcome"]) for entry in desk.journal("use")] == [
            ("current context", "ContextClosedError"),
            ("data", "ContextClosedError"),
            ("a new context", "ContextClosedError"),
        ]
        desk.open("release")
        assert working.result().status_code == 200  # it had ignored that it was cut off


def test_who_signs_out_in_a_thread_a_task_or_below_another_middleware_is_answered(
    server_kind: str, server_factory: ServerFactory
) -> None:
    server = server_factory(server_kind, "promise_cut_off:app")
    with observing(server) as desk:
        for number, path in enumerate(("/sign-out/thread", "/sign-out/task", "/base-middleware/sign-out"), 1):
            answer = desk.request("alice", path, "POST")
            assert (path, answer.status_code, answer.text) == (path, 200, "1")
            wait_until(lambda: len(desk.events("alice", "closed")) == number, "it is closed")  # noqa: B023 - at once
            assert desk.events("alice", "closed")[-1]["reason"] == "revoked"
        assert close_code(desk, "alice", "/sign-out") == 1008
        assert close_code(desk, "alice", "/sign-out/task") == 1008


def test_who_drains_in_a_request_is_answered(server_kind: str, server_factory: ServerFactory) -> None:
    server = server_factory(server_kind, "promise_cut_off:app")
    with observing(server) as desk:
        waiting = desk.begin("bob", "/caught")
        desk.wait_for("working")
        answer = desk.request("alice", "/drain?timeout=0.05", "POST")
        assert (answer.status_code, answer.json()) == (200, 1)
        assert waiting.result().status_code == 503
        assert desk.request("alice", "/drain?timeout=0.05", "POST").status_code == 503


@pytest.mark.parametrize(
    ("reason", "status", "code"), [("expired", 504, 1008), ("revoked", 401, 1008), ("shutdown", 503, 1013)]
)
def test_who_has_caught_a_failed_group_is_cut_off_like_others(
    server_kind: str, server_factory: ServerFactory, reason: str, status: int, code: int
) -> None:
    server = server_factory(server_kind, "promise_cut_off:app")
    with observing(server) as desk:
        waiting = desk.begin("alice", "/caught")
        desk.wait_for("working", user="alice")
        desk.tell(f"close/alice/{reason}")
        assert waiting.result().status_code == status
        assert close_code(desk, "bob", "/caught", then=f"close/bob/{reason}") == code


@pytest.mark.parametrize("reason", ["expired", "revoked", "disconnected", "shutdown"])
def test_what_a_thread_has_goes_to_nobody_else_before_it_ends(
    server_kind: str, server_factory: ServerFactory, reason: str
) -> None:
    server = server_factory(server_kind, "promise_cut_off:app")
    with observing(server) as desk, RawConnection(server) as connection:
        connection.send(build_request("/thread", headers=ALICE))
        desk.wait_for("working")
        if reason == "disconnected":
            connection.close()
        else:
            desk.tell(f"close/alice/{reason}")
        desk.wait_until_idle()
        desk.open("query")
        desk.wait_for("released")
        assert [(entry["what"], entry.get("lent_to")) for entry in desk.journal()] == [
            ("working", None),
            ("use", None),
            ("query", "alice"),
            ("released", None),
        ]
        wait_until(lambda: bool(desk.events("alice", "closed")), "the teardown is through")
        assert desk.events("alice", "closed")[-1]["reason"] == reason


def test_what_a_thread_has_that_does_not_end_is_taken_from_under_it(
    server_kind: str, server_factory: ServerFactory
) -> None:
    server = server_factory(server_kind, "promise_cut_off:app", env={"GRACE": "0.05"})
    with observing(server) as desk:
        waiting = desk.begin("alice", "/thread")
        desk.wait_for("working")
        desk.tell("close/alice/revoked")
        assert waiting.result().status_code == 401
        desk.open("query")
        assert desk.wait_for("query")["lent_to"] == "nobody"
        assert [entry["what"] for entry in desk.journal()] == ["working", "released", "use", "query"]
        assert [entry["outcome"] for entry in desk.journal("use", name="a handle")] == ["ContextClosedError"]
