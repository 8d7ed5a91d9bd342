"""Promise 4: inside alice's context bob's is out of reach, and asking does not tell her whether there is a bob."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server

pytestmark = pytest.mark.security

ASKING = (
    "get",
    "get-pair",
    "clear",
    "clear-pair",
    "cleanup",
    "cleanup-pair",
    "set-pair",
    "create",
    "create-pair",
    "create-managed",
    "create-unified",
    "trail",
    "impersonate",
)
asking = pytest.mark.parametrize("action", ASKING)


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_owners:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.fixture
def bobs(desk: Observer) -> Iterator[str]:
    """Bob has a context, which stands under his id and under this request id; at the end it is as it was."""
    held = desk.begin("bob", "/hold")
    request_id: str = desk.wait_for("held", user="bob")["request_id"]
    yield request_id
    assert [live["request_id"] for live in desk.active() if live["user_id"] == "bob"] == [request_id]
    desk.open("let go")
    assert held.result().json() == "bob's"


def about(user: str, request_id: str) -> str:
    return f"?user={user}&request_id={request_id}"


def look_of(response: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """All that the one who asked gets to see."""
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response.status_code, headers, response.content


def denials(desk: Observer, user: str = "alice") -> list[tuple[str, str]]:
    return [(event["action"], event["asked_for"]) for event in desk.events(user, "denied")]


@asking
def test_bobs_and_nobodys_are_refused_in_the_same_words(desk: Observer, bobs: str, action: str) -> None:
    existing = look_of(desk.request("alice", f"/act/{action}{about('bob', bobs)}"))
    missing = look_of(desk.request("alice", f"/act/{action}{about('ghost', bobs)}"))
    unknown = look_of(desk.request("alice", f"/act/{action}{about('bob', 'request-4711')}"))
    assert existing[0] == 403
    assert existing == missing == unknown
    assert b"bob" not in existing[2]
    for user, (_, asked_for) in zip(("bob", "ghost", "bob"), denials(desk)[-3:], strict=True):
        assert user in asked_for


@asking
def test_ones_own_is_within_reach(desk: Observer, action: str) -> None:
    assert desk.request("alice", f"/own/{action}").status_code == 200


@pytest.mark.parametrize("action", ["report", "cleanup-all"])
def test_what_concerns_everybody_is_refused_to_one(desk: Observer, bobs: str, action: str) -> None:
    assert desk.request("alice", f"/act/{action}{about('bob', bobs)}").status_code == 403
    assert denials(desk)[-1][1] == "everyone"


@pytest.mark.parametrize("action", ["enter", "set"])
def test_a_reference_to_bobs_context_opens_nothing(desk: Observer, bobs: str, action: str) -> None:
    assert desk.request("alice", f"/act/{action}{about('bob', bobs)}").status_code == 403
    assert denials(desk)[-1][1] == "bob"


PLACES = ["in-thread", "in-dependency", "in-task", "in-group", "in-child"]


@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_wherever_in_the_request_it_is_asked_for(desk: Observer, bobs: str, place: str) -> None:
    existing = look_of(desk.request("alice", f"/{place}/get-pair{about('bob', bobs)}"))
    missing = look_of(desk.request("alice", f"/{place}/get-pair{about('ghost', bobs)}"))
    assert existing == missing
    assert existing[0] == 403
    assert [asked for _, asked in denials(desk)[-2:]] == ["bob", "ghost"]


def test_it_is_refused_in_the_background(desk: Observer, bobs: str) -> None:
    assert desk.request("alice", f"/in-background/get-pair{about('bob', bobs)}").status_code == 200
    assert desk.wait_for("refused")["kind"] == "CrossUserAccessError"
    assert denials(desk)[-1] == ("get_context", "bob")


def test_it_is_refused_to_code_that_has_lost_its_context(desk: Observer, bobs: str) -> None:
    assert desk.request("alice", f"/in-executor/get-pair{about('bob', bobs)}").status_code == 403


def test_it_is_refused_to_code_of_no_user(desk: Observer, bobs: str) -> None:
    for user in ("bob", "ghost"):
        outcomes = desk.ask(f"unprivileged{about(user, bobs)}")
        assert len(outcomes) >= 14
        assert outcomes == dict.fromkeys(outcomes, "CrossUserAccessError")
        assert desk.system_events("denied")[-1]["outcome"] == "denied"


def test_it_is_refused_to_anonymous_visitors(desk: Observer, bobs: str) -> None:
    existing = look_of(desk.request(None, f"/act/get-pair{about('bob', bobs)}"))
    missing = look_of(desk.request(None, f"/act/get-pair{about('ghost', bobs)}"))
    assert existing == missing
    assert existing[0] == 403


def test_it_is_refused_by_a_websocket_before_it_accepts(desk: Observer, bobs: str) -> None:
    looks = []
    for user in ("bob", "ghost"):
        path = f"/ws/before/get-pair{about(user, bobs)}"
        with pytest.raises(InvalidStatus) as refused, desk.websocket("alice", path):
            pass
        response = refused.value.response
        looks.append((response.status_code, response.body, sorted(response.headers.keys())))
    assert looks[0] == looks[1]
    assert looks[0][0] == 403


@pytest.mark.parametrize("when", ["after", "in-group"])
def test_it_is_refused_by_a_websocket_after_it_accepted(desk: Observer, bobs: str, when: str) -> None:
    looks = []
    for user in ("bob", "ghost"):
        with (
            desk.websocket("alice", f"/ws/{when}/get-pair{about(user, bobs)}") as websocket,
            pytest.raises(ConnectionClosed) as closed,
        ):
            websocket.recv()
        assert closed.value.rcvd is not None
        looks.append((closed.value.rcvd.code, closed.value.rcvd.reason))
    assert looks[0] == looks[1]
    assert looks[0][0] == 1008
    assert [asked for _, asked in denials(desk)[-2:]] == ["bob", "ghost"]


def test_a_listing_shows_each_user_their_own(desk: Observer, bobs: str) -> None:
    assert desk.request("alice", "/list").json() == ["alice"]
    assert desk.request("bob", "/list").json() == ["bob", "bob"]


def supervise(desk: Observer, bobs: str, named: str) -> dict[str, Any]:
    outcomes: dict[str, Any] = desk.request("alice", f"/supervise?user=bob&named={named}&request_id={bobs}").json()
    return outcomes


def test_crossing_is_possible_in_a_privileged_block_and_only_there(desk: Observer, bobs: str) -> None:
    outcomes = supervise(desk, bobs, "bob")
    assert outcomes["within"] == "bob's"
    assert [outcomes[when] for when in ("before", "after", "inherited")] == ["denied", "denied", "denied"]
    assert outcomes["listed"] == ["alice", "bob"]


def test_a_privileged_block_is_on_record_before_anything_is_done_in_it(desk: Observer, bobs: str) -> None:
    before = {user: len(desk.events(user, "privileged")) for user in ("alice", "bob")}
    assert supervise(desk, bobs, "bob")["recorded"][-1] == "privileged"
    for user in ("alice", "bob"):
        assert [event["reason"] for event in desk.events(user, "privileged")[before[user] :]] == ["ticket 4711"]


def test_a_privileged_block_covers_whom_it_names(desk: Observer, bobs: str) -> None:
    assert supervise(desk, bobs, "carol")["within"] == "denied"
    assert supervise(desk, bobs, "everyone")["within"] == "bob's"
