"""ucm-events.js in Chromium, against a server that says what no real one does."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, WebSocketRoute

LONGEST_WAIT = 30_000  # milliseconds, as in ucm-events.js

CLIENT = """async () => {
    const { UserEvents } = await import("/static/ucm-events.js");
    window.seen = [];
    window.states = [];
    window.mayReconnect = () => true;
    window.client = new UserEvents("/made-up", { mayReconnect: () => window.mayReconnect() })
        .on("message", (event) => window.seen.push(event.data))
        .on("events_missed", (event) => window.seen.push("missed"))
        .onState((state, { code }) => window.states.push(code === undefined ? state : `${state} ${code}`));
    window.client.connect();
}"""


class Peer:
    """The other end of the client's connections, and what the client did."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.connections: list[WebSocketRoute] = []
        page.route_web_socket("**/made-up*", lambda connection: self.connections.append(connection))

    def queries(self) -> list[dict[str, list[str]]]:
        """What each connection has asked for."""
        return [parse_qs(urlsplit(connection.url).query) for connection in self.connections]

    def say(self, epoch: str, sequence: int, event_type: str = "message") -> None:
        """Send an event, whose data is its place."""
        self.send({"type": event_type, "epoch": epoch, "sequence": sequence, "data": f"{epoch}{sequence}"})

    def send(self, message: object) -> None:
        """Send a message that is JSON."""
        self.connections[-1].send(json.dumps(message))

    def close(self, code: int) -> None:
        """Close the connection, and wait until the client knows."""
        self.connections[-1].close(code=code)
        self.wait_for_state(f"{code}")

    def let_time_pass(self) -> None:
        """As much as the longest wait."""
        self.page.clock.run_for(LONGEST_WAIT)

    def answer(self, expression: str) -> None:
        """What the client is told from now on when it asks whether it may reconnect."""
        self.page.evaluate(f"() => {{ window.mayReconnect = () => {expression}; }}")

    def wait_for_state(self, text: str) -> None:
        """Wait until the state that the client told last has this in it."""
        self.page.wait_for_function("text => window.states.at(-1).includes(text)", arg=text)

    def wait_for(self, *seen: str) -> None:
        """Wait until the client has handed on this, and nothing else."""
        self.page.wait_for_function(
            "seen => JSON.stringify(window.seen) === seen", arg=json.dumps(seen).replace(" ", "")
        )


@pytest.fixture
def peer(page: Page) -> Peer:
    """With a client that is connected."""
    peer = Peer(page)
    page.reload()  # the routes hold from the next document on
    page.evaluate(CLIENT)
    peer.wait_for_state("open")
    return peer


def test_it_comes_back_to_the_last_event(peer: Peer) -> None:
    """The first connection takes what is kept; each later one names the newest event, of whatever epoch."""
    peer.close(1012)
    peer.let_time_pass()
    peer.wait_for_state("open")
    peer.say("a", 7)
    peer.wait_for("a7")
    peer.close(1013)
    peer.let_time_pass()
    peer.wait_for_state("open")
    peer.say("b", 2, "events_missed")
    peer.wait_for("a7", "missed")
    peer.close(1001)
    peer.let_time_pass()
    peer.wait_for_state("open")

    first = {"last_sequence": ["0"]}
    assert peer.queries() == [
        first,
        first,
        {"epoch": ["a"], "last_sequence": ["7"]},
        {"epoch": ["b"], "last_sequence": ["2"]},
    ]


def test_it_hands_on_each_event_once(peer: Peer) -> None:
    """One that it had, in the same epoch, is left out. In a new epoch the numbers begin anew."""
    for epoch, sequence in (("a", 1), ("a", 2), ("a", 2), ("a", 1), ("a", 9), ("b", 1), ("b", 1), ("b", 2)):
        peer.say(epoch, sequence)

    peer.wait_for("a1", "a2", "a9", "b1", "b2")


def test_what_is_no_event_is_left_out(peer: Peer) -> None:
    """The application's own messages, of types that nobody asked for, and what only looks like an event."""
    peer.connections[-1].send("no JSON")
    nearly: list[object] = [{"type": "message"}, {"type": "message", "epoch": "a", "sequence": "1"}]
    for message in (None, 5, "text", [], {}, *nearly):
        peer.send(message)
    peer.say("a", 1, "of another type")
    peer.say("a", 2)

    peer.wait_for("a2")


def test_what_is_no_event_is_the_application_s(peer: Peer) -> None:
    """Handed on as it came, and an event is not; what the application sends goes out while there is a connection."""
    heard: list[str | bytes] = []
    peer.connections[-1].on_message(lambda text: heard.append(text))
    peer.page.evaluate("() => { window.texts = []; client.onText((text) => texts.push(text)); }")
    peer.connections[-1].send("no JSON")
    peer.say("a", 1)
    peer.send({"type": "token"})
    peer.wait_for("a1")
    peer.page.wait_for_function("texts.length === 2")
    assert peer.page.evaluate("texts") == ["no JSON", '{"type": "token"}']

    assert peer.page.evaluate("client.send('first')")
    peer.close(1012)
    assert not peer.page.evaluate("client.send('lost')")
    peer.let_time_pass()
    peer.wait_for_state("open")
    assert heard == ["first"]


def test_1008_ends_it(peer: Peer) -> None:
    """Until it is told to begin again, which it does from where it was."""
    peer.say("a", 3)
    peer.wait_for("a3")
    peer.close(1008)
    peer.wait_for_state("ended 1008")
    for _ in range(3):
        peer.let_time_pass()
    peer.page.evaluate("client.connect()")
    peer.wait_for_state("open")
    assert peer.queries()[1:] == [{"epoch": ["a"], "last_sequence": ["3"]}]


def test_close_ends_it(peer: Peer) -> None:
    """While it is connected, and while it waits."""
    peer.page.evaluate("client.close()")
    peer.wait_for_state("ended null")
    peer.page.evaluate("client.connect()")
    peer.wait_for_state("open")
    peer.close(1012)
    peer.page.evaluate("client.close()")
    peer.wait_for_state("ended null")
    peer.let_time_pass()

    assert peer.page.evaluate("states.filter((state) => state === 'connecting').length") == 2


@pytest.mark.parametrize("says_no", ["false", "Promise.resolve(false)"])
def test_it_asks_whether_it_may_reconnect(peer: Peer, says_no: str) -> None:
    """No ends it, and an error is no answer."""
    for answer in ("{ throw new Error('no network'); }", "Promise.reject(new Error('no network'))"):
        peer.answer(answer)
        peer.close(1012)
        peer.let_time_pass()
        peer.wait_for_state("open")
    peer.answer(says_no)
    peer.close(1012)
    peer.let_time_pass()
    peer.wait_for_state("ended null")

    assert len(peer.connections) == 3
