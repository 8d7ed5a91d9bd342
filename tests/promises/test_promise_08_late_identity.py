"""Promise 8: the user may become known inside the app, once; a second, different one is refused."""

import json
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server
from support.waiting import wait_until

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_login:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def login(said: str) -> dict[str, str]:
    return {"login": said}


@pytest.mark.parametrize("path", ["/sync", "/async", "/twice"])
def test_a_dependency_gives_the_context_its_user_everywhere(desk: Observer, path: str) -> None:
    seen = desk.request(None, path, headers=login("alice")).json()
    assert (seen["user"], seen["listed"], seen["current"], seen["anonymous"]) == ("alice", "alice", "alice", False)
    # It is the same context: whoever held it already sees the user too.
    early = desk.wait_for("early")
    assert early["before"].startswith("anonymous_")
    assert (early["after"], early["in_task"]) == ("alice", "alice")


def test_the_binding_is_on_record_for_both_identities(desk: Observer) -> None:
    seen = desk.request(None, "/sync", headers=login("alice")).json()
    visitor = desk.wait_for("early")["before"]
    for user in ("alice", visitor):
        assert desk.events(user, "bound")[-1]["request_id"] == seen["request_id"]
    assert desk.wait_until_closed("alice", seen["request_id"])["reason"] == "finished"


def test_visitors_are_strangers_to_each_other(desk: Observer) -> None:
    visitors = [desk.request(None, "/anonymous").json() for _ in range(3)]
    assert len({visitor["user"] for visitor in visitors}) == 3
    assert {visitor["anonymous"] for visitor in visitors} == {True}


def test_what_needs_a_user_is_refused_until_there_is_one(desk: Observer) -> None:
    refused = desk.request(None, "/private")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert desk.request("alice", "/private").json() == "alice"
    assert desk.request(None, "/private-after-login", headers=login("alice")).json() == "alice"


def test_a_user_known_before_the_app_may_be_bound_again_but_not_another(desk: Observer) -> None:
    assert desk.request("alice", "/sync", headers=login("alice")).json()["user"] == "alice"
    refused = desk.request("alice", "/sync", headers=login("bob"))
    assert refused.status_code == 409
    assert "alice" not in refused.text
    assert "bob" not in refused.text


def test_a_second_different_user_is_refused_and_the_first_stays(desk: Observer) -> None:
    assert desk.request(None, "/second?then=bob", headers=login("alice")).status_code == 409
    assert desk.wait_for("after the second")["user"] == "alice"


def test_of_two_at_the_same_moment_one_is_bound(desk: Observer) -> None:
    for _ in range(10):
        seen = desk.request(None, "/race").json()
        winner, loser = seen["outcomes"]
        assert loser == "refused"
        assert seen["user"] == seen["listed"] == winner


@pytest.mark.parametrize("use", ["resource", "callback", "child"])
def test_a_context_in_use_as_an_anonymous_one_stays_so(desk: Observer, use: str) -> None:
    assert desk.request(None, f"/too-late?use={use}", headers=login("alice")).status_code == 409
    assert desk.wait_for("after")["anonymous"] is True


def test_a_bad_id_is_refused_without_being_repeated(desk: Observer) -> None:
    refused = desk.request(None, "/sync", headers=login("undefined"))
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("user_id: ")
    assert "undefined" not in refused.text


def test_credentials_that_have_ended_are_refused(desk: Observer) -> None:
    refused = desk.request(None, "/sync", headers=login("alice for -1"))
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


def test_a_context_ends_with_the_credentials_that_it_was_bound_by(desk: Observer) -> None:
    assert desk.request(None, "/sync", headers=login("alice")).json()["seconds"] is None
    assert 0 < desk.request(None, "/sync", headers=login("alice for 60")).json()["seconds"] <= 60


def test_binding_counts_toward_the_limit_of_the_user(desk: Observer) -> None:
    held = [desk.begin("alice", "/hold") for _ in range(10)]
    wait_until(lambda: len(desk.journal("held")) == 10, "alice is at her limit")
    refused = desk.request(None, "/sync", headers=login("alice"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert desk.request(None, "/sync", headers=login("bob")).status_code == 200
    desk.open("let go")
    assert {answer.result().json() for answer in held} == {"alice"}


@pytest.mark.parametrize("who", ["bob", None])
def test_nobody_can_give_a_stranger_an_identity(desk: Observer, who: str | None) -> None:
    visitor = desk.begin(None, "/hold")
    desk.wait_for("held")
    assert desk.request(who, "/bind-another?user=bob").status_code == 403
    desk.open("let go")
    assert visitor.result().json().startswith("anonymous_")


def test_a_websocket_learns_its_user_from_a_message_and_keeps_it(desk: Observer) -> None:
    with desk.websocket(None, "/ws") as websocket:
        websocket.send("alice")
        seen = json.loads(websocket.recv())
        assert (seen["user"], seen["listed"]) == ("alice", "alice")
        websocket.send("alice")
        assert json.loads(websocket.recv()) == seen
        websocket.send("bob")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert "alice" not in closed.value.rcvd.reason
    assert desk.wait_until_closed("alice", seen["request_id"])["outcome"] == "failed"


@pytest.mark.parametrize(("said", "code"), [("undefined", 1008), ("alice for -1", 1008), ("carol", 1013)])
def test_a_websocket_whose_user_is_refused_is_closed(desk: Observer, said: str, code: int) -> None:
    """A bad id, credentials that have ended, and a user who is at her limit."""
    held = [desk.begin("carol", "/hold") for _ in range(10)]
    wait_until(lambda: len(desk.journal("held")) == 10, "carol is at her limit")
    with desk.websocket(None, "/ws") as websocket:
        websocket.send(said)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code
    desk.open("let go")
    assert {answer.result().json() for answer in held} == {"carol"}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/ws-login", {"Authorization": "Bearer token-of-alice", **login("bob")}, 409),
        ("/ws-login", login("alice for -1"), 401),
        ("/ws-login", login("undefined"), 400),
        ("/ws-private", {}, 401),
    ],
)
def test_a_websocket_is_refused_before_it_is_accepted(
    desk: Observer, path: str, headers: dict[str, str], status: int
) -> None:
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(desk.server.ws_url + path, additional_headers=headers),
    ):
        pass
    assert refused.value.response.status_code == status
