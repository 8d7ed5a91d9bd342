"""The page of examples/live_events in Chromium: two sign-ins beside each other, each with its user's events alone."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, WebSocket, expect

from support.waiting import PATIENCE, wait_until
from ucm_middleware.testing.server import Server

PASSWORDS = {"alice": "wonderland", "bob": "builder"}
LONGEST_WAIT = 30_000  # milliseconds, as in ucm-events.js


class Pane:
    """One of the two, and what somebody does with it."""

    def __init__(self, page: Page, side: str) -> None:
        self.root = page.locator(f"#{side}")
        self.state = self.root.locator(".state")
        self.answer = self.root.locator(".answer")
        self.problem = self.root.locator(".problem")
        self.numbers = self.root.locator(".log li:not(.note) .number")
        self.texts = self.root.locator(".log li:not(.note) .text")
        self.notes = self.root.locator(".log li.note .text")

    def sign_in(self, user: str) -> None:
        """Sign in, and wait until the connection is there."""
        self.root.get_by_label("User").fill(user)
        self.root.get_by_label("Password").fill(PASSWORDS[user])
        self.root.get_by_role("button", name="Sign in").click()
        expect(self.state).to_have_text("live")

    def send(self, to: str, text: str, *, answer: str | re.Pattern[str] = "delivered") -> None:
        """Send a text, and wait for what the server says to it."""
        self.root.get_by_label("Text").fill(text)
        self.root.get_by_role("button", name=f"To {to}").click()
        expect(self.answer).to_contain_text(answer)

    def click(self, button: str) -> Locator:
        """Press one of the other buttons."""
        found = self.root.get_by_role("button", name=button)
        found.click()
        return found


@pytest.fixture
def alice(page: Page) -> Pane:
    """On the left."""
    pane = Pane(page, "left")
    pane.sign_in("alice")
    return pane


@pytest.fixture
def bob(page: Page) -> Pane:
    """On the right."""
    pane = Pane(page, "right")
    pane.sign_in("bob")
    return pane


def test_each_pane_shows_its_own_user_s_events(alice: Pane, bob: Pane) -> None:
    """In order. What is for the other never comes, although the two are one page of one browser."""
    for number in (1, 2, 3):
        alice.send("alice", f"for alice {number}")
        bob.send("bob", f"for bob {number}")

    for pane, user in ((alice, "alice"), (bob, "bob")):
        expect(pane.texts).to_have_text([f"for {user} {number}" for number in (1, 2, 3)])
        expect(pane.numbers).to_have_text(["#1", "#2", "#3"])


def test_nobody_sends_to_anybody_else(alice: Pane, bob: Pane) -> None:
    """It is refused, and the other pane shows nothing but what its own user sent."""
    alice.send("bob", "from alice", answer="403")
    bob.send("alice", "from bob", answer="403")
    for pane, user in ((alice, "alice"), (bob, "bob")):
        pane.send(user, "own")
        expect(pane.texts).to_have_text(["own"])


def test_a_user_in_both_panes_gets_events_in_both(alice: Pane, page: Page) -> None:
    """They are two sign-ins and two connections of one user."""
    second = Pane(page, "right")
    second.sign_in("alice")
    second.send("alice", "for each", answer="delivered 2")
    for pane in (alice, second):
        expect(pane.texts).to_have_text(["for each"])


def test_what_came_in_between_is_replayed(alice: Pane, bob: Pane, page: Page) -> None:
    """After a dropped connection: in order, each once, and then what is live. Bob's is not touched by it."""
    alice.send("alice", "one")
    expect(alice.texts).to_have_text(["one"])
    for replayed in (["two", "three"], ["four"]):
        alice.click("Drop the connection")
        expect(alice.state).to_contain_text("again in")
        for text in replayed:
            alice.send("alice", text, answer="kept")
        bob.send("bob", f"meanwhile {replayed[0]}")
        page.clock.run_for(LONGEST_WAIT)
        expect(alice.state).to_have_text("live")
    alice.send("alice", "five", answer="delivered 1")

    expect(alice.texts).to_have_text(["one", "two", "three", "four", "five"])
    expect(alice.numbers).to_have_text([f"#{number}" for number in range(1, 6)])
    expect(alice.notes).to_have_text(
        [
            *("connection closed: 4000 dropped", "came back: last_sequence=1"),
            *("connection closed: 4000 dropped", "came back: last_sequence=3"),
        ]
    )
    expect(bob.texts).to_have_text(["meanwhile two", "meanwhile four"])
    expect(bob.notes).to_have_count(0)


def test_it_waits_longer_from_time_to_time(alice: Pane, page: Page) -> None:
    """Connections that do not hold: each wait is between the half and the whole of twice the one before."""
    waits: list[float] = []
    for _ in range(8):
        alice.click("Drop the connection")
        expect(alice.state).to_contain_text("again in")
        waits.append(float(re.findall(r"[\d.]+", alice.state.inner_text())[0]))
        page.clock.run_for(LONGEST_WAIT)
        expect(alice.state).to_have_text("live")

    for longest, wait in zip((0.5, 1, 2, 4, 8, 16, 30, 30), waits, strict=True):
        assert longest / 2 - 0.05 <= wait <= longest + 0.05


def test_a_gap_is_said(alice: Pane, page: Page, server: Server) -> None:
    """More came in between than is kept: the page says so, and goes on."""
    alice.send("alice", "before")
    expect(alice.texts).to_have_text(["before"])
    alice.click("Drop the connection")
    expect(alice.state).to_contain_text("again in")
    for number in range(21):
        answer = page.request.post(f"{server.url}/left/send", data={"to": "alice", "text": f"missed {number}"})
        assert answer.ok
    page.clock.run_for(LONGEST_WAIT)
    expect(alice.state).to_have_text("live")
    alice.send("alice", "after")

    expect(alice.texts).to_have_text(["before", "some events could not be replayed", "after"])
    expect(alice.numbers).to_have_text(["#1", "#22", "#23"])


def handshakes(server: Server, side: str) -> int:
    """How many a pane has asked for by now, those that were refused included: uvicorn says so."""
    return server.output.count(f'"WebSocket /{side}/events')


def test_a_revoked_user_is_out_for_good(alice: Pane, bob: Pane, page: Page, server: Server) -> None:
    """With 1008. However much time passes, alice's pane asks for nothing more; bob's goes on."""
    alice.send("alice", "one")
    alice.click("Revoke")
    expect(alice.problem).to_have_text("Ended: 1008 Valid credentials are required.")
    expect(alice.root.get_by_role("button", name="Sign in")).to_be_visible()
    page.clock.run_for(10 * LONGEST_WAIT)
    bob.send("bob", "still here", answer="delivered 1")

    expect(bob.texts).to_have_text(["still here"])
    alice.sign_in("alice")
    expect(alice.texts).to_have_count(0)  # what was kept went with it
    assert handshakes(server, "left") == 2


def test_a_user_revoked_while_away_does_not_come_back(alice: Pane, page: Page, server: Server) -> None:
    """No close code reaches who has no connection: the page asks whether its session still holds, and stops."""
    alice.click("Drop the connection")
    expect(alice.state).to_contain_text("again in")
    with page.expect_response("**/left/revoke"):
        alice.click("Revoke")
    page.clock.run_for(LONGEST_WAIT)

    expect(alice.problem).to_have_text("Ended: signed out")
    page.clock.run_for(10 * LONGEST_WAIT)
    alice.sign_in("alice")
    assert handshakes(server, "left") == 2


def test_it_goes_on_while_the_server_is_away(alice: Pane, page: Page, server: Server) -> None:
    """Nobody says then whether the session still holds, so it does."""
    server.stop()
    expect(alice.state).to_contain_text("again in")
    for attempt in (1, 2):
        page.clock.run_for(LONGEST_WAIT)
        expect(alice.notes).to_have_text(
            [re.compile(r"connection closed: 10\d\d")] + ["connection closed: 1006"] * attempt
        )
    expect(alice.state).to_contain_text("again in")
    expect(alice.problem).to_be_empty()


def test_what_users_send_is_text(alice: Pane, page: Page) -> None:
    """Markup in an event is shown as it was written, and makes no element."""
    attempts = [
        "<img src=x onerror=\"document.title='taken'\">",
        "<script>document.title='taken'</script>",
        "</span></li><b>bold</b>",
    ]
    for attempt in attempts:
        alice.send("alice", attempt)
    alice.send("alice", "last")

    expect(alice.texts).to_have_text([*attempts, "last"])
    expect(alice.root.locator(".log").locator("img, script, b")).to_have_count(0)
    expect(page).to_have_title("Live events")


def test_a_reload_comes_back_to_the_session(alice: Pane, bob: Pane, page: Page) -> None:
    """Each pane to its own, with what is still kept."""
    alice.send("alice", "one")
    bob.send("bob", "two")
    page.reload()
    for pane, text in ((alice, "one"), (bob, "two")):
        expect(pane.state).to_have_text("live")
        expect(pane.texts).to_have_text([text])


def handshake(page: Page, url: str) -> str:
    """Let the page open a WebSocket. Gives "open", or what Chromium says of the refusal."""
    errors: list[str] = []

    def note(websocket: WebSocket) -> None:
        websocket.on("socketerror", lambda error: errors.append(error))

    page.once("websocket", note)
    opened: bool = page.evaluate(
        """url => new Promise((resolve) => {
            const socket = new WebSocket(url);
            socket.onopen = () => { socket.close(); resolve(true); };
            socket.onclose = () => resolve(false);
        })""",
        url,
    )
    if opened:
        return "open"

    def is_told() -> bool:
        page.title()  # playwright hands on what happened while it is asked for something
        return bool(errors)

    wait_until(is_told, "Chromium says why a handshake was refused")
    return errors[0]


def test_pages_of_another_origin_are_refused(
    alice: Pane, page: Page, context: BrowserContext, server: Server, elsewhere: Server
) -> None:
    """A page of another port is another origin of the same site: it gets the cookie sent along, and 403."""
    url = f"{server.ws_url}/left/events"
    other = context.new_page()
    other.goto(
        f"{elsewhere.url}/static/page.css"
    )  # where no Content-Security-Policy of the page's own forbids it first

    assert "403" in handshake(other, url)
    assert handshake(page, url) == "open"
    context.clear_cookies()
    assert "Authentication failed" in handshake(page, url)  # as Chromium calls a 401


def test_it_is_pictured(alice: Pane, bob: Pane, page: Page, request: pytest.FixtureRequest) -> None:
    """For the guide, where the option says so."""
    for text in ("Your report is ready", "3 of 5 documents read"):
        alice.send("alice", text)
    bob.send("bob", "The build has begun")
    alice.click("Drop the connection")
    expect(alice.state).to_contain_text("again in")
    alice.send("alice", "4 of 5 documents read", answer="kept")
    alice.send("alice", "5 of 5 documents read", answer="kept")
    bob.send("bob", "<b>All tests pass</b>")
    page.clock.run_for(LONGEST_WAIT)
    alice.send("alice", "The summary is written")
    bob.send("alice", "Hello, alice", answer="403")
    expect(alice.texts).to_have_count(5)
    expect(bob.texts).to_have_count(2)

    path: Path | None = request.config.getoption("--write-screenshot")
    picture = page.screenshot(path=path, full_page=True, timeout=PATIENCE * 1000)
    assert picture
