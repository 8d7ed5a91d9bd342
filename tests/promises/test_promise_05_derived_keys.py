"""Promise 5: what clients name by themselves is kept apart by owner, and a foreign record looks like none."""

import secrets
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server

pytestmark = pytest.mark.security

SECRET = secrets.token_urlsafe(32)
PRODUCTION = {"UCM_ENVIRONMENT": "production", "UCM_SECRET": SECRET}


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_keys:app", env=PRODUCTION)


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.fixture
def bobs(desk: Observer) -> str:
    """The number of a draft of bob's, which he can read."""
    number: str = desk.request("bob", "/drafts?text=bob's", method="POST").json()
    assert desk.request("bob", f"/drafts/{number}").json() == "bob's"
    return number


def look_of(response: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """All that the one who asked gets to see."""
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response.status_code, headers, response.content


def test_two_users_who_choose_the_same_name_have_two_notes(desk: Observer) -> None:
    keys = {
        user: desk.request(user, f"/notes/shared-name?text={user}'s", method="PUT").json() for user in ("alice", "bob")
    }
    assert keys["alice"] != keys["bob"]
    for user in keys:
        assert desk.request(user, "/notes/shared-name").json() == f"{user}'s"


def test_the_key_of_another_user_is_a_name_like_any_other(desk: Observer) -> None:
    key = desk.request("bob", "/notes/diary?text=bob's", method="PUT").json()
    foreign = look_of(desk.request("alice", f"/notes/{key}"))
    assert foreign == look_of(desk.request("alice", "/notes/diary")) == look_of(desk.request("alice", "/notes/nobodys"))
    assert foreign[0] == 403
    assert desk.request("alice", f"/notes/{key}?text=alice's", method="PUT").status_code == 200
    assert desk.request("bob", "/notes/diary").json() == "bob's"


@pytest.mark.parametrize("where", ["", "/in-thread"])
@pytest.mark.parametrize("user", ["alice", None])
def test_a_foreign_record_and_none_are_refused_alike(desk: Observer, bobs: str, where: str, user: str | None) -> None:
    foreign = look_of(desk.request(user, f"{where}/drafts/{bobs}"))
    missing = look_of(desk.request(user, f"{where}/drafts/999999"))
    assert foreign == missing
    assert foreign[0] == 403
    assert bobs.encode() not in foreign[2]


def test_each_refusal_is_on_record_with_whoever_asked(desk: Observer, bobs: str) -> None:
    for number in (bobs, "999999", bobs):
        desk.request("alice", f"/drafts/{number}")
    foreign, missing, again = desk.events("alice", "denied")[-3:]
    assert foreign["asked_for"].startswith("draft ucm1_")
    assert foreign["asked_for"] == again["asked_for"] != missing["asked_for"]
    assert foreign.keys() == missing.keys()
    assert {record["action"] for record in (foreign, missing)} == {"check_key"}


def test_a_websocket_is_refused_alike_before_it_accepts(desk: Observer, bobs: str) -> None:
    looks = []
    for number in (bobs, "999999"):
        with pytest.raises(InvalidStatus) as refused, desk.websocket("alice", f"/drafts/{number}?before"):
            pass
        response = refused.value.response
        looks.append((response.status_code, response.body, sorted(response.headers.keys())))
    assert looks[0] == looks[1]
    assert looks[0][0] == 403


def test_a_websocket_is_refused_alike_after_it_accepted(desk: Observer, bobs: str) -> None:
    looks = []
    for number in (bobs, "999999"):
        with desk.websocket("alice", f"/drafts/{number}") as websocket, pytest.raises(ConnectionClosed) as closed:
            websocket.recv()
        assert closed.value.rcvd is not None
        looks.append((closed.value.rcvd.code, closed.value.rcvd.reason))
    assert looks[0] == looks[1]
    assert looks[0][0] == 1008


@pytest.mark.parametrize("name", ["null", "%00", "a%E2%80%AEb"])
def test_a_bad_name_is_answered_with_the_rule(desk: Observer, name: str) -> None:
    response = desk.request("alice", f"/notes/{name}")
    assert response.status_code == 400
    assert response.json()["detail"].startswith("client_id: ")


def test_another_server_with_the_secret_derives_the_same(
    desk: Observer, server_kind: str, server_factory: ServerFactory
) -> None:
    with observing(server_factory(server_kind, "promise_keys:app", env=PRODUCTION)) as other:
        keys = {each.request("alice", "/notes/n?text=t", method="PUT").json() for each in (desk, other)}
    assert len(keys) == 1


def test_a_server_in_production_does_not_start_without_one(server_factory: ServerFactory) -> None:
    with pytest.raises(AssertionError, match=r"UCM_SECRET is not set, and stored notes must have it in production"):
        server_factory("uvicorn-h11", "promise_keys:app", env={"UCM_ENVIRONMENT": "production", "UCM_SECRET": None})


def test_a_server_with_a_bad_one_does_not_start(server_factory: ServerFactory) -> None:
    with pytest.raises(AssertionError, match="UCM_SECRET has 9 bytes, which is fewer than 32"):
        server_factory("uvicorn-h11", "promise_keys:app", env={"UCM_SECRET": "too-short"})
