"""Promise 1: every HTTP request and every WebSocket connection runs in its own context, whoever came before."""

import json
from collections.abc import Iterator

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of
from support.raw_http import RawConnection, build_request
from support.servers import Server
from support.waiting import wait_until

VISITORS = ("alice", "bob", "nobody")


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_places:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


def user_of(visitor: str) -> str | None:
    return None if visitor == "nobody" else visitor


IN_EVERY_REQUEST = {
    "async dependency",
    "sync dependency",
    "async dependency's end",
    "sync dependency's end",
    "middleware below",
    "middleware below, after",
    "sync background task",
}

PLACES_IN = {
    "/async": IN_EVERY_REQUEST
    | {
        "async endpoint",
        "async endpoint, with others inside",
        "task",
        "task group",
        "anyio thread",
        "asyncio thread",
        "executor with a copied context",
        "callback",
        "async background task",
        "async stream",
        "async stream, again",
    },
    "/sync": IN_EVERY_REQUEST
    | {"sync endpoint", "sync endpoint, with others inside", "sync stream", "sync stream, again"},
}

PLACES_OUT = {
    "/async": {"middleware above", "middleware above, after", "executor"},
    "/sync": {"middleware above", "middleware above, after"},
}


@pytest.mark.parametrize("path", ["/async", "/sync"])
def test_every_place_of_a_request_has_its_context_and_no_other(desk: Observer, path: str) -> None:
    answers = [desk.begin(user_of(visitor), f"{path}?visitor={visitor}") for visitor in VISITORS * 2]
    wait_until(lambda: len(desk.journal("inside")) == 6, "all are inside")
    desk.open("all are inside")
    assert [answer.result().text for answer in answers] == ["ab"] * 6
    desk.wait_until_idle()

    requests: set[str] = set()
    for visitor in VISITORS:
        looks = desk.journal("look", visitor=visitor)
        inside = [look for look in looks if look["user"] is not None]
        assert {look["place"] for look in inside} == PLACES_IN[path]
        assert {look["place"] for look in looks if look["user"] is None} == PLACES_OUT[path]
        assert {look["user"] for look in inside} == {visitor}
        by_request = {look["request_id"]: 0 for look in inside}
        for look in inside:
            by_request[look["request_id"]] += 1
        assert list(by_request.values()) == [len(PLACES_IN[path])] * 2
        requests |= by_request.keys()
    assert len(requests) == 6


def test_all_ways_to_the_context_lead_to_the_same_object(desk: Observer) -> None:
    desk.open("all are inside")
    assert desk.request("alice", "/async?visitor=alice").text == "ab"
    assert desk.journal("same") == [{"what": "same", "visitor": "alice", "answers": [True, True, True]}]


def test_requests_of_one_connection_have_nothing_in_common(server: Server, desk: Observer) -> None:
    def request(visitor: str) -> bytes:
        return build_request(f"/notes?visitor={visitor}", headers=token_of(user_of(visitor)))

    with RawConnection(server) as connection:
        order = ["alice", "nobody", "bob", "alice", "alice"]
        answers = [response.json() for response in connection.pipeline(*map(request, order))]
        for visitor in order:
            connection.send(request(visitor))
            answers.append(connection.read_response().json())
    assert [answer["user"] for answer in answers] == order * 2
    assert {answer["scribble"] for answer in answers} == {"nothing"}
    assert {answer["data"] for answer in answers} == {None}
    assert len({answer["request_id"] for answer in answers}) == 10


def test_of_what_is_set_outside_only_what_is_kept_comes_in(desk: Observer) -> None:
    answer = desk.request("alice", "/notes?visitor=alice").json()
    assert (answer["tracing"], answer["forgotten"]) == ("a span", "nothing")


def test_what_is_set_inside_does_not_come_out(desk: Observer) -> None:
    assert desk.request("alice", "/notes?visitor=alice").status_code == 200
    with desk.websocket("alice", "/ws?visitor=alice") as websocket:
        websocket.send("1")
        websocket.recv()
    desk.wait_for("look", place="after the disconnect")
    desk.wait_until_idle()
    assert [entry["scribble"] for entry in desk.journal("outside")] == ["nothing", "nothing"]


def test_a_websocket_has_one_context_from_before_accept_until_after_its_end(desk: Observer) -> None:
    clients = []
    with (
        desk.websocket("alice", "/ws?visitor=alice") as first,
        desk.websocket("bob", "/ws?visitor=bob") as other,
        desk.websocket("alice", "/ws?visitor=alice") as second,
    ):
        for message in ("1", "2"):
            for websocket in (first, other, second):
                websocket.send(message)
                answer = json.loads(websocket.recv())
                assert answer["forgotten"] == "nothing"
                clients.append(answer["client"])
    desk.wait_until_idle()

    assert len(set(clients)) == 3
    assert clients[:3] == clients[3:]
    places = IN_EVERY_REQUEST & {place for place in IN_EVERY_REQUEST if "dependency" in place}
    places |= {"before accept", "message 1", "message 2", "after the disconnect"}
    looks = desk.journal("look")
    assert len({look["request_id"] for look in looks}) == 3
    for request_id in {look["request_id"] for look in looks}:
        mine = [look for look in looks if look["request_id"] == request_id]
        assert {look["place"] for look in mine} == places
        assert len({(look["visitor"], look["user"]) for look in mine}) == 1
        assert mine[0]["visitor"] == mine[0]["user"]


def test_the_context_that_the_manager_lists_is_the_one_that_the_code_sees(desk: Observer) -> None:
    held = desk.begin("alice", "/async?visitor=alice")
    desk.wait_for("inside", visitor="alice")
    (live,) = desk.active()
    desk.open("all are inside")
    assert held.result().status_code == 200
    assert live["user_id"] == "alice"
    assert {look["request_id"] for look in desk.journal("look", user="alice")} == {live["request_id"]}
