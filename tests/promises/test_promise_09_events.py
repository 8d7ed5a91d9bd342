"""Promise 9: events reach their user only, on any of that user's connections, in order; a slow one delays nobody."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import count
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from support.fixtures import ServerFactory
from support.observer import Observer, observing, token_of
from support.raw_websocket import BINARY, CLOSE, PING, SMALL, TEXT, RawWebSocket, frame
from support.servers import WEBSOCKET_SERVER_KINDS, Server
from support.waiting import PATIENCE, wait_until

QUEUE_EVENTS, QUEUE_BYTES = 20, 512 * 1024
"""Of the halls whose queues are small."""

SIZE, BATCH = 32_000, 5
"""Of what is sent to fill a queue. A client that reads a batch at once keeps up."""

MOST_BATCHES = 400
"""64 MB: no kernel takes in so much for a client that does not read."""

CONNECTIONS = 8
BURST = 20
"""Messages of the bounded hall that may come at once: five seconds' worth."""

_numbers = count()


@pytest.fixture(scope="module", params=WEBSOCKET_SERVER_KINDS)
def server(request: pytest.FixtureRequest, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(request.param, "promise_events:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.fixture
def alice() -> str:
    """A user of this test alone, so that no other test's events are hers."""
    return f"alice{next(_numbers)}"


@pytest.fixture
def bob() -> str:
    return f"bob{next(_numbers)}"


class Halls:
    """What the test asks and does behind the door."""

    def __init__(self, desk: Observer, hall: str) -> None:
        self.desk = desk
        self.hall = hall

    def waiting(self, user: str) -> dict[str, int]:
        found: dict[str, int] = self.desk.ask(f"in/{self.hall}/waiting/{user}")
        return found

    def records(self, user: str, event: str) -> list[dict[str, Any]]:
        trail = self.desk.ask(f"in/{self.hall}/trail/{user}")
        return [record for record in trail["events"] if record["event"] == event]

    def send(self, user: str) -> dict[str, Any]:
        delivery: dict[str, Any] = self.desk.tell(f"in/{self.hall}/send/{user}")
        return delivery

    def send_batch(self, user: str) -> list[dict[str, Any]]:
        response = self.desk.request(user, f"/{self.hall}/send?count={BATCH}&size={SIZE}")
        assert response.status_code == 200
        deliveries: list[dict[str, Any]] = response.json()
        return deliveries

    def wait_for_connections(self, user: str, number: int) -> None:
        wait_until(lambda: self.waiting(user)["connections"] == number, f"{user} has {number} connections")


def echo(websocket: ClientConnection, text: str) -> None:
    """Show that a connection goes on; only then is it certain that its events have begun, too."""
    websocket.send(text)
    assert websocket.recv(PATIENCE) == f"echo {text}"


def event(websocket: ClientConnection) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(websocket.recv(PATIENCE))
    return found


def close_code(websocket: ClientConnection) -> int | None:
    """How the server closed it, after all that was still to come. None where the socket ended without a word."""
    while True:
        try:
            websocket.recv(PATIENCE)
        except ConnectionClosed as closed:
            return None if closed.rcvd is None else closed.rcvd.code


def test_events_reach_each_connection_of_their_user_in_order_and_nobody_else(
    desk: Observer, alice: str, bob: str
) -> None:
    with (
        desk.websocket(alice, "/main/events") as first,
        desk.websocket(alice, "/main/events") as second,
        desk.websocket(bob, "/main/events") as his,
        desk.websocket(None, "/main/events") as stranger,
    ):
        connections = {first: alice, second: alice, his: bob}
        for websocket in (*connections, stranger):
            echo(websocket, "here")
        requests = [
            desk.begin(user, path)
            for user in (alice, bob)
            for path in ("/main/send?count=30", "/main/post?count=30", "/main/thread?count=30")
        ]
        for websocket, user in connections.items():
            got = [event(websocket) for _ in range(90)]
            assert {each["user_id"] for each in got} == {user}
            assert [each["sequence"] for each in got] == list(range(1, 91))
            for by in ("task", "post", "thread"):
                assert [each["data"]["n"] for each in got if each["data"]["by"] == by] == list(range(30))
        assert {request.result().status_code for request in requests} == {200}
        for websocket in (*connections, stranger):
            echo(websocket, "nothing else")


def test_an_event_says_from_which_request_it_comes(desk: Observer, alice: str) -> None:
    with desk.websocket(alice, "/main/events") as websocket:
        echo(websocket, "here")
        desk.request(alice, "/main/send?count=1")
        sent = event(websocket)
        opened = Halls(desk, "main").records(alice, "opened")
        assert sent["request_id"] in {record["request_id"] for record in opened}
        Halls(desk, "main").send(alice)
        assert event(websocket)["request_id"] is None


def test_reads_are_never_stolen_from_the_handler(desk: Observer, alice: str) -> None:
    with desk.websocket(alice, "/main/events") as websocket:
        echo(websocket, "here")
        sending = desk.begin(alice, "/main/send?count=100")
        for number in range(100):
            websocket.send(str(number))
        got = [str(websocket.recv(PATIENCE)) for _ in range(200)]
        assert [text for text in got if text.startswith("echo")] == [f"echo {number}" for number in range(100)]
        assert sending.result().status_code == 200


# A client that does not read.


def fill(halls: Halls, user: str, reader: ClientConnection) -> list[dict[str, Any]]:
    """Send until somebody loses an event by it. The one who reads keeps up, batch by batch."""
    for _ in range(MOST_BATCHES):
        deliveries = halls.send_batch(user)
        assert [event(reader)["sequence"] for _ in range(BATCH)] == [each["sequence"] for each in deliveries]
        waiting = halls.waiting(user)
        assert waiting["events"] <= QUEUE_EVENTS
        assert waiting["bytes"] <= QUEUE_BYTES
        if any(each["dropped"] for each in deliveries):
            return deliveries
    raise AssertionError("nothing was ever lost")


def held_up(halls: Halls, user: str) -> tuple[Future[httpx.Response], int]:
    """Send until a sender has to wait. Returns its request, and the sequence of the last event that it will send."""
    for number in range(1, MOST_BATCHES):
        sending = halls.desk.begin(user, f"/{halls.hall}/send?count={BATCH}&size={SIZE}")

        def is_settled(sending: Future[httpx.Response] = sending) -> bool:
            return sending.done() or halls.waiting(user)["bytes"] > QUEUE_BYTES

        wait_until(is_settled, "the batch is sent, or more waits than may")
        if not sending.done():
            return sending, number * BATCH
    raise AssertionError("no sender ever had to wait")


def test_a_stalled_connection_is_closed_and_delays_nobody(desk: Observer, alice: str, bob: str) -> None:
    halls = Halls(desk, "close")
    with (
        RawWebSocket(desk.server, alice, "/close/events", SMALL) as stalled,
        desk.websocket(alice, "/close/events") as reader,
        desk.websocket(bob, "/close/events") as his,
    ):
        halls.wait_for_connections(alice, 2)
        echo(his, "here")
        deliveries = fill(halls, alice, reader)
        assert [why for each in deliveries for why in each["dropped"]] == ["full"]
        halls.wait_for_connections(alice, 1)
        halls.send(bob)
        assert event(his)["user_id"] == bob
        echo(reader, "still here")
        assert [record["dropped"] for record in halls.records(alice, "event_sent") if record["outcome"] != "ok"] == [1]
        assert stalled.read_to_the_end() in (1013, None)
        wait_until(
            lambda: "slow" in {record.get("reason") for record in halls.records(alice, "closed")}, "it is on record"
        )


def test_a_stalled_connection_may_lose_its_oldest_events(desk: Observer, alice: str) -> None:
    halls = Halls(desk, "drop")
    with (
        RawWebSocket(desk.server, alice, "/drop/events", SMALL) as stalled,
        desk.websocket(alice, "/drop/events") as reader,
    ):
        halls.wait_for_connections(alice, 2)
        deliveries = fill(halls, alice, reader)
        assert {why for each in deliveries for why in each["dropped"]} == {"oldest"}
        last = halls.send_batch(alice)[-1]["sequence"]
        got = [each["sequence"] for each in stalled.events(last)]
        assert got == sorted(set(got))
        assert len(got) < last
        assert got[-10:] == list(range(last - 9, last + 1))
        stalled.send(frame(TEXT, b"hello"))
        assert stalled.read() == (TEXT, b"echo hello")


def test_a_stalled_connection_may_hold_up_who_sends_to_it_and_nobody_else(desk: Observer, alice: str, bob: str) -> None:
    halls = Halls(desk, "wait")
    with (
        RawWebSocket(desk.server, alice, "/wait/events", SMALL) as stalled,
        desk.websocket(bob, "/wait/events") as his,
    ):
        halls.wait_for_connections(alice, 1)
        echo(his, "here")
        sending, last = held_up(halls, alice)
        halls.send(bob)
        assert event(his)["user_id"] == bob
        assert halls.waiting(alice)["bytes"] <= 2 * QUEUE_BYTES
        assert [each["sequence"] for each in stalled.events(last)] == list(range(1, last + 1))
        assert [each["dropped"] for each in sending.result().json()] == [[]] * BATCH


def test_who_waits_for_it_in_vain_goes_on_without_it(desk: Observer, alice: str) -> None:
    halls = Halls(desk, "briefly")
    with (
        RawWebSocket(desk.server, alice, "/briefly/events", SMALL) as stalled,
        desk.websocket(alice, "/briefly/events") as reader,
    ):
        halls.wait_for_connections(alice, 2)
        for _ in range(MOST_BATCHES):
            halls.send_batch(alice)
            for _ in range(BATCH):
                event(reader)
            if halls.waiting(alice)["connections"] == 1:
                break
        echo(reader, "still here")
        assert stalled.read_to_the_end() in (1013, None)


# Coming back.


def test_what_was_missed_is_replayed(desk: Observer, alice: str) -> None:
    halls = Halls(desk, "main")
    with desk.websocket(alice, "/main/events") as websocket:
        echo(websocket, "here")
        last = halls.send(alice)
        assert event(websocket)["sequence"] == last["sequence"]
    halls.wait_for_connections(alice, 0)
    missed = [halls.send(alice)["sequence"] for _ in range(3)]
    path = f"/main/events?epoch={last['epoch']}&last_sequence={last['sequence']}"
    with desk.websocket(alice, path) as websocket:
        assert [event(websocket)["sequence"] for _ in range(3)] == missed
        assert halls.send(alice)["sequence"] == event(websocket)["sequence"]
        echo(websocket, "that is all")


@pytest.mark.parametrize("query", ["last_sequence=5", "epoch=0123456789abcdef&last_sequence=1", "last_sequence=x"])
def test_an_unknown_last_event_is_said_so_and_then_come_live_ones(desk: Observer, alice: str, query: str) -> None:
    halls = Halls(desk, "main")
    with desk.websocket(alice, "/main/events") as first:
        echo(first, "here")
        sent = halls.send(alice)
        with desk.websocket(alice, f"/main/events?{query}") as websocket:
            told = event(websocket)
            assert (told["type"], told["epoch"], told["sequence"]) == ("events_missed", sent["epoch"], sent["sequence"])
            assert halls.send(alice)["sequence"] == event(websocket)["sequence"]


def test_a_connection_that_learns_its_user_late_gets_that_users_events(desk: Observer, alice: str) -> None:
    halls = Halls(desk, "main")
    with (
        desk.websocket(alice, "/main/events") as first,
        desk.websocket(None, "/main/log-in?last_sequence=0") as late,
    ):
        echo(first, "here")
        halls.send(alice)
        event(first)
        late.send(alice)
        got = [str(late.recv(PATIENCE)) for _ in range(2)]
        assert f"welcome {alice}" in got
        (replayed,) = [json.loads(text) for text in got if not text.startswith("welcome")]
        assert replayed["sequence"] == 1
        halls.send(alice)
        assert (event(first)["sequence"], event(late)["sequence"]) == (2, 2)


# The end of a user's time.


def test_a_revocation_reaches_whatever_the_user_has_and_nobody_else(desk: Observer, alice: str, bob: str) -> None:
    halls = Halls(desk, "main")
    with (
        desk.websocket(alice, "/main/events") as hers,
        desk.websocket(alice, "/main/elsewhere") as elsewhere,
        desk.websocket(bob, "/main/events") as his,
        desk.websocket(bob, "/main/elsewhere") as his_elsewhere,
    ):
        for websocket in (hers, his):
            echo(websocket, "here")
        holding = {user: desk.begin(user, "/main/hold") for user in (alice, bob)}
        for user in (alice, bob):
            desk.wait_for("held", user=user)
            halls.wait_for_connections(user, 2)
        last = halls.send(alice)
        assert desk.tell(f"in/main/revoke/{alice}") == 3
        assert (close_code(hers), close_code(elsewhere)) == (1008, 1008)
        assert holding[alice].result().status_code == 401
        interrupted = {(entry["name"], entry["user"]) for entry in desk.journal("interrupted")}
        assert interrupted == {("hold", alice), ("elsewhere", alice)}
        assert len([record for record in halls.records(alice, "revoked") if "reason" in record]) == 1
        # What was kept is gone, also for whoever comes back.
        with desk.websocket(alice, f"/main/events?epoch={last['epoch']}&last_sequence=0") as again:
            assert event(again)["type"] == "events_missed"
        halls.send(bob)
        assert event(his)["sequence"] == event(his_elsewhere)["sequence"] == 1
        echo(his, "untouched")
        desk.open("let go")
        assert holding[bob].result().status_code == 200


def test_a_handler_may_revoke_its_own_user(desk: Observer, alice: str) -> None:
    with desk.websocket(alice, "/main/sign-out") as websocket, desk.websocket(alice, "/main/events") as other:
        echo(other, "here")
        websocket.send("sign me out")
        assert (close_code(websocket), close_code(other)) == (1008, 1008)
    assert len(desk.journal("signed out")) == 1


@pytest.mark.parametrize("path", ["/main/events", "/main/elsewhere"])
def test_credentials_that_end_close_the_connection(desk: Observer, alice: str, bob: str, path: str) -> None:
    with desk.websocket(bob, "/main/events") as his, desk.websocket(f"{alice}-for-0.3", path) as websocket:
        assert close_code(websocket) == 1008
        echo(his, "untouched")


# What one client sends is that connection's own concern.


def test_a_message_that_is_too_big_closes_its_connection_alone(desk: Observer, alice: str) -> None:
    with desk.websocket(alice, "/bounded/events") as big, desk.websocket(alice, "/bounded/events") as other:
        echo(big, "x" * 1000)
        big.send("x" * 1001)
        assert close_code(big) == 1009
        echo(other, "untouched")


def test_too_many_messages_close_their_connection_alone(desk: Observer, alice: str) -> None:
    with desk.websocket(alice, "/bounded/events") as loud, desk.websocket(alice, "/bounded/events") as other:
        with pytest.raises(ConnectionClosed) as closed:
            for number in range(BURST * 10):
                echo(loud, str(number))  # one at a time: what a server leaves unread can cost its last word
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        echo(other, "untouched")


MALFORMED = {
    "an opcode that is none": frame(3, b"x"),
    "a control opcode that is none": frame(11, b"x"),
    "without a mask": frame(TEXT, b"hello", masked=False),
    "reserved bits": frame(TEXT, b"hello", reserved=7),
    "text that is no UTF-8": frame(TEXT, b"\xff\xfe\xfd"),
    "half of a character": frame(TEXT, b"\xe2\x82"),
    "a length with the highest bit": frame(BINARY, length=2**63),
    "a ping in two parts": frame(PING, b"x", final=False),
    "a ping that is too long": frame(PING, b"x" * 126),
    "a continuation of nothing": frame(0, b"x"),
    "text within a text": frame(TEXT, b"one", final=False) + frame(TEXT, b"two"),
    "a close code of one byte": frame(CLOSE, b"x"),
    "a close code that is none": frame(CLOSE, b"\x03\xed"),
    "no WebSocket at all": b"GET / HTTP/1.1\r\n\r\n" * 10,
}


def test_malformed_frames_close_their_connection_alone(desk: Observer, alice: str, bob: str) -> None:
    halls = Halls(desk, "main")
    with desk.websocket(bob, "/main/events") as his:
        echo(his, "here")
        for what, data in MALFORMED.items():
            with RawWebSocket(desk.server, alice, "/main/events") as raw:
                raw.send(data)
                assert raw.read_to_the_end() != 1000, what
            echo(his, what)
        halls.wait_for_connections(alice, 0)
        assert desk.request(alice, "/main/quick").status_code == 200


UNFINISHED = {
    "nothing": b"",
    "half of a header": b"\x81",
    "half of a length": b"\x81\xfe\x01",
    "half of a text": frame(TEXT, b"hel", length=5),
    "a text without its end": frame(TEXT, b"hello", final=False),
    "a length beyond all memory": frame(BINARY, b"x" * 1000, length=2**62),
}


def test_a_client_that_goes_in_the_middle_of_a_frame_leaves_nothing_behind(
    desk: Observer, alice: str, bob: str
) -> None:
    halls = Halls(desk, "main")
    with desk.websocket(bob, "/main/events") as his:
        echo(his, "here")
        for what, data in UNFINISHED.items():
            with RawWebSocket(desk.server, alice, "/main/events") as raw:
                raw.send(data)
            halls.wait_for_connections(alice, 0)
            echo(his, what)


# Who may connect.


def handshake(desk: Observer, headers: dict[str, str]) -> int:
    try:
        with connect(
            f"{desk.server.ws_url}/main/events", additional_headers=headers, open_timeout=PATIENCE
        ) as websocket:
            echo(websocket, "here")
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def test_a_page_of_another_site_cannot_connect_with_cookies(desk: Observer, alice: str) -> None:
    cookie = {"Cookie": f"session={alice}"}
    for origin in (
        "https://evil.example",
        "null",
        f"http://127.0.0.1:{desk.server.port + 1}",
        "https://app.example.co",
    ):
        assert handshake(desk, {**cookie, "Origin": origin}) == 403, origin
    for origin in ("https://app.example.com", desk.server.url):
        assert handshake(desk, {**cookie, "Origin": origin}) == 101, origin
    assert handshake(desk, cookie) == 101
    assert handshake(desk, {**token_of(alice), "Origin": "https://evil.example"}) == 101


def test_a_user_may_have_eight_connections_and_requests_still_get_in(desk: Observer, alice: str, bob: str) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            echo(stack.enter_context(desk.websocket(alice, "/main/events")), "here")
        with pytest.raises(InvalidStatus) as refused, desk.websocket(alice, "/main/events"):
            pass
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["retry-after"] == "1"
        assert desk.request(alice, "/main/quick").status_code == 200
        echo(stack.enter_context(desk.websocket(bob, "/main/events")), "nothing of his")
    Halls(desk, "main").wait_for_connections(alice, 0)


# A context for each message.


def test_the_data_of_a_message_is_gone_in_the_next(desk: Observer, alice: str) -> None:
    halls = Halls(desk, "bounded")
    answers = []
    with desk.websocket(alice, "/bounded/notes") as websocket:
        for text in ("one", "two", "three"):
            websocket.send(text)
            answers.append(event(websocket))
            assert event(websocket)["request_id"] == answers[-1]["request_id"]
    assert [answer["notes"] for answer in answers] == [["one"], ["two"], ["three"]]
    assert {answer["user"] for answer in answers} == {alice}
    assert {answer["parent"] for answer in answers} == {answers[0]["connection"]}
    ids = [answer["request_id"] for answer in answers]
    assert len({*ids, answers[0]["connection"]}) == 4
    wait_until(
        lambda: {*ids} <= {record["request_id"] for record in halls.records(alice, "closed")}, "each is on record"
    )
    assert [record["request_id"] for record in halls.records(alice, "event_sent")] == ids
