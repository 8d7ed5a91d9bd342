"""What a context gives out is of use to its user alone, and until the request ends, wherever it has got to."""

from collections.abc import Iterator

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_handles:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.mark.parametrize("path", ["/use/handle", "/use/method", "/use/coroutine", "/use/stream", "/use-in-thread"])
def test_alices_is_refused_to_bob_and_that_is_recorded(desk: Observer, path: str) -> None:
    held = desk.begin("alice", "/hold")
    desk.wait_for("held", user="alice")
    refused = desk.request("bob", path)
    assert refused.status_code == 403
    assert b"alice" not in refused.content
    denied = desk.events("bob", "denied")[-1]
    assert (denied["action"], denied["asked_for"]) == ("handle Mailbox", "alice")
    assert desk.journal("reached") == []
    desk.open("let go")
    assert held.result().json() == "to alice"


def test_it_is_refused_to_a_visitor(desk: Observer) -> None:
    held = desk.begin("alice", "/hold")
    desk.wait_for("held", user="alice")
    assert desk.request(None, "/use/handle").status_code == 403
    assert desk.journal("reached") == []
    desk.open("let go")
    assert held.result().json() == "to alice"


def test_bob_cannot_revoke_it_either(desk: Observer) -> None:
    held = desk.begin("alice", "/hold")
    desk.wait_for("held", user="alice")
    assert desk.request("bob", "/use/revoke").status_code == 403
    desk.open("let go")
    assert held.result().json() == "to alice"


def test_another_request_of_alices_may_use_it(desk: Observer) -> None:
    held = desk.begin("alice", "/hold")
    desk.wait_for("held", user="alice")
    assert desk.request("alice", "/use/handle").json() == "to alice"
    assert desk.request("alice", "/use/stream").json() == "to alice"
    desk.open("let go")
    assert held.result().status_code == 200


def test_it_works_in_her_own_threads(desk: Observer) -> None:
    assert desk.request("alice", "/own").json() == ["to alice"] * 4


def test_a_thread_that_outlives_her_request_can_do_nothing_through_it(desk: Observer) -> None:
    request_id = desk.request("alice", "/outlive").json()
    desk.wait_until_closed("alice", request_id)
    desk.open("later")
    after = desk.wait_for("after")
    assert after["kind"] == "ContextClosedError"
    assert request_id in after["text"]
    assert "its handle is mailbox, made at " in after["text"]
    assert "promise_handles.py:" in after["text"]
    assert len(desk.journal("reached")) == 1
