"""The example of live events on a real server, driven without a browser; tests/browser/ drives its page."""

import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from support.waiting import PATIENCE
from ucm_middleware.testing.server import Server, start_server

ROOT = Path(__file__).parents[1]
APP = "examples.live_events.app:app"
PASSWORDS = {"alice": "wonderland", "bob": "builder"}
ELSEWHERE = "https://elsewhere.example"


@pytest.fixture
def server() -> Iterator[Server]:
    """The example, without anybody signed in."""
    with start_server(APP, app_dir=ROOT) as server:
        yield server


class User:
    """A sign-in on one of the two sides, and what can be done with it."""

    def __init__(self, name: str, events: str, http: httpx.Client) -> None:
        self.name = name
        self.http = http
        self._events = events
        answer = self.sign_in()
        assert answer.status_code == HTTPStatus.OK
        self.set_cookie = answer.headers["set-cookie"]

    def sign_in(self) -> httpx.Response:
        """Begin another session."""
        return self.http.post("/login", json={"user": self.name, "password": PASSWORDS[self.name]})

    def listen(self, query: str = "", origin: str | None = None) -> ClientConnection:
        """Open a WebSocket with the session's cookie."""
        cookie = {"Cookie": f"session={self.http.cookies['session']}"}
        return connect(
            self._events + query, additional_headers=cookie, origin=None if origin is None else Origin(origin)
        )

    def send(self, text: str, to: str | None = None) -> httpx.Response:
        """Send a message, to oneself if nobody else is named."""
        return self.http.post("/send", json={"to": to or self.name, "text": text})


@contextmanager
def signed_in(server: Server, name: str, side: str) -> Generator[User]:
    """A user, for as long as the block."""
    with httpx.Client(base_url=f"{server.url}/{side}", trust_env=False) as http:
        yield User(name, f"{server.ws_url}/{side}/events", http)


@pytest.fixture
def alice(server: Server) -> Iterator[User]:
    """Signed in on the left."""
    with signed_in(server, "alice", "left") as user:
        yield user


@pytest.fixture
def bob(server: Server) -> Iterator[User]:
    """Signed in on the right."""
    with signed_in(server, "bob", "right") as user:
        yield user


def receive(connection: ClientConnection) -> dict[str, Any]:
    """The next event."""
    event: dict[str, Any] = json.loads(connection.recv(PATIENCE))
    return event


def texts(connection: ClientConnection, count: int) -> list[str]:
    """What so many messages say."""
    return [receive(connection)["data"]["text"] for _ in range(count)]


def status_of_refusal(user: User, *, origin: str | None = None) -> int:
    """With what a handshake is refused."""
    with pytest.raises(InvalidStatus) as refused:
        user.listen(origin=origin)
    return refused.value.response.status_code


def test_a_session_is_only_for_those_who_signed_in(server: Server, alice: User) -> None:
    """A wrong password, a made-up session, another side's session or a name in a header make nobody a user."""
    assert alice.http.get("/whoami").json() == {"user": "alice"}
    assert {"HttpOnly", "SameSite=strict", "Path=/left"} <= set(alice.set_cookie.split("; "))

    with httpx.Client(base_url=server.url, trust_env=False) as stranger:
        wrong = [
            stranger.post("/left/login", json={"user": user, "password": password})
            for user, password in [("alice", "builder"), ("carol", "wonderland"), ("", "")]
        ]
        forged = [
            stranger.get("/left/whoami", headers=headers)
            for headers in [{}, {"Cookie": "session=alice"}, {"X-User": "alice"}, {"Authorization": "Bearer alice"}]
        ]
    assert {answer.status_code for answer in wrong + forged} == {HTTPStatus.UNAUTHORIZED}
    assert alice.http.get(f"{server.url}/right/whoami").status_code == HTTPStatus.UNAUTHORIZED


def test_events_reach_their_user_on_each_connection(server: Server, alice: User, bob: User) -> None:
    """Alice's on both of hers, bob's on his; and nobody sends to anybody else."""
    with (
        signed_in(server, "alice", "right") as elsewhere,
        alice.listen() as first,
        elsewhere.listen() as second,
        bob.listen() as his,
    ):
        assert alice.send("for alice").json()["delivered"] == 2
        refused = [alice.send("from alice", to=user) for user in ("bob", "nobody-at-all")]
        assert bob.send("for bob").json()["delivered"] == 1

        event = receive(first)
        assert (event["type"], event["user_id"], event["sequence"]) == ("message", "alice", 1)
        assert event["data"] == {"text": "for alice"}
        assert receive(second) == event
        assert texts(his, 1) == ["for bob"]  # the first that ever came
    assert {answer.status_code for answer in refused} == {HTTPStatus.FORBIDDEN}
    assert refused[0].json() == refused[1].json()


def test_what_came_in_between_is_replayed(alice: User) -> None:
    """In order, once, from the last event that the client names; then comes what is live."""
    with alice.listen() as connection:
        alice.send("one")
        last = receive(connection)
    for text in ("two", "three"):
        assert alice.send(text).json()["kept"]

    with alice.listen(f"?epoch={last['epoch']}&last_sequence={last['sequence']}") as connection:
        alice.send("four")
        assert texts(connection, 3) == ["two", "three", "four"]
    with alice.listen("?last_sequence=0") as connection:
        assert texts(connection, 4) == ["one", "two", "three", "four"]


def test_a_gap_is_said(alice: User) -> None:
    """More than is kept came in between: the client is told, and goes on from there."""
    with alice.listen() as connection:
        alice.send("before")
        last = receive(connection)
    for number in range(21):
        alice.send(f"missed {number}")

    with alice.listen(f"?epoch={last['epoch']}&last_sequence=1") as connection:
        missed = receive(connection)
        assert (missed["type"], missed["sequence"]) == ("events_missed", 22)
        assert missed["data"] == {"epoch": last["epoch"], "sequence": 1}
        alice.send("after")
        assert texts(connection, 1) == ["after"]


def test_revocation_ends_one_user_alone(alice: User, bob: User) -> None:
    """Alice's connection is closed with 1008, her session is over, and nothing of hers is left to replay."""
    with alice.listen() as hers, bob.listen() as his:
        alice.send("one")
        last = receive(hers)
        assert alice.http.post("/revoke").json() == {"ended": 2}  # the connection, and this request

        with pytest.raises(ConnectionClosed) as closed:
            hers.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert status_of_refusal(alice) == HTTPStatus.UNAUTHORIZED
        assert alice.http.get("/whoami").status_code == HTTPStatus.UNAUTHORIZED

        bob.send("still here")
        assert texts(his, 1) == ["still here"]

    assert alice.sign_in().status_code == HTTPStatus.OK
    with alice.listen(f"?epoch={last['epoch']}&last_sequence=0") as connection:
        assert receive(connection)["type"] == "events_missed"


def test_pages_of_other_sites_are_refused(alice: User, server: Server) -> None:
    """Whatever cookies come with their handshakes; those of the site itself are not."""
    assert status_of_refusal(alice, origin=ELSEWHERE) == HTTPStatus.FORBIDDEN
    with alice.listen(origin=server.url) as connection:
        alice.send("from here")
        assert texts(connection, 1) == ["from here"]


def test_an_origin_on_the_list_is_let_in() -> None:
    """As the environment names it."""
    with (
        start_server(APP, app_dir=ROOT, env={"LIVE_EVENTS_ORIGINS": ELSEWHERE}) as server,
        signed_in(server, "alice", "left") as alice,
        alice.listen(origin=ELSEWHERE) as connection,
    ):
        alice.send("from elsewhere")
        assert texts(connection, 1) == ["from elsewhere"]


def test_the_page_and_its_parts_are_served(server: Server) -> None:
    """To anybody; nothing in them is from elsewhere."""
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        parts = [client.get(path) for path in ("/", "/static/page.js", "/static/page.css", "/static/ucm-events.js")]

    assert {part.status_code for part in parts} == {HTTPStatus.OK}
    assert not [url for part in parts for url in re.findall(r"""\b(?:https?|wss?)://.*|["'(]//.*""", part.text)]
