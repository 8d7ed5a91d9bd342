"""Handlers that are cut off in the middle of what no cancellation ends, and those that cut themselves off."""

import pytest
from websockets.exceptions import ConnectionClosed

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of

ALICE = token_of("alice")


def close_code(desk: Observer, user: str, path: str, *, then: str | None = None) -> int | None:
    """With which code a connection ends, by itself or after ``then`` was told to the server."""
    with desk.websocket(user, path) as websocket:
        if then is not None:
            desk.wait_for("working")
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
        desk.tell("revoke/alice")
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
