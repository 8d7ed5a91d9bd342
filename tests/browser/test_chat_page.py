"""The page of examples/chat in Chromium: two users in two tabs of one browser, who talk to the same agent."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, expect

from support.waiting import PATIENCE
from ucm_middleware.testing.server import Server, start_server

ROOT = Path(__file__).parents[2]
APP = "examples.chat.app:app"
STORY = "Tell me a story"

UNNAMED = """[...document.querySelectorAll("button, input, textarea, ol")]
    .filter((part) => !(part.ariaLabel ?? part.labels?.[0]?.textContent ?? part.textContent).trim())
    .map((part) => part.outerHTML)"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The example, without anybody signed in."""
    env = {"CHAT_DATA": str(tmp_path), "CHAT_MODEL": None, "UCM_SECRET": None, "UCM_ENVIRONMENT": "development"}
    with start_server(APP, app_dir=ROOT, env=env) as server:
        yield server


class Tab:
    """A tab, and what somebody does with it."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.addresses: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(url)
        self.state = self.page.locator(".state")
        self.lines = self.page.get_by_role("log").locator("li")
        self.answers = self.page.locator(".lines .assistant")
        self.question = self.page.get_by_label("Your question")
        self.events = self.page.locator(".events .type")
        self.whats = self.page.locator(".events .what")
        self.problem = self.page.get_by_role("alert")

    def sign_in(self, user: str) -> None:
        """Sign in, and wait until the connection is there."""
        self.button(f"Sign in as {user}").click()
        expect(self.state).to_have_text("live")
        expect(self.page.locator(".name")).to_have_text(user)

    def ask(self, text: str) -> None:
        """Ask, and do not wait for the answer."""
        self.question.fill(text)
        self.button("Ask").click()

    def ask_and_wait(self, text: str) -> None:
        """Wait for the whole answer."""
        self.ask(text)
        expect(self.button("Ask")).to_be_enabled()
        expect(self.page.locator("[aria-busy]")).to_have_count(0)

    def open(self, name: str) -> None:
        """Go to another conversation."""
        self.page.get_by_label("Conversation", exact=True).fill(name)
        self.button("Open").click()

    def button(self, name: str) -> Locator:
        """One of the page's buttons."""
        return self.page.get_by_role("button", name=name, exact=True)


@pytest.fixture
def alice(context: BrowserContext, server: Server) -> Tab:
    """In a tab."""
    tab = Tab(context, server.url)
    tab.sign_in("alice")
    return tab


@pytest.fixture
def bob(context: BrowserContext, server: Server) -> Tab:
    """In another tab of the same browser."""
    tab = Tab(context, server.url)
    tab.sign_in("bob")
    return tab


def test_two_tabs_are_two_users(alice: Tab, bob: Tab) -> None:
    """Who talk to the agent at once, in conversations of one name: each has what is their own."""
    notes = {"alice": "the safe opens at 4711", "bob": "the key is under the mat"}
    for tab, user in ((alice, "alice"), (bob, "bob")):
        tab.ask(f"Remember that {notes[user]}")
    for tab in (alice, bob):
        expect(tab.button("Ask")).to_be_enabled()
        tab.ask("What do you know?")
    for tab, user, other in ((alice, "alice", "bob"), (bob, "bob", "alice")):
        expect(tab.answers).to_have_text(
            ["I have noted that. You have 1 note now.", re.compile(re.escape(f"you have 1 note:\n• {notes[user]}"))]
        )
        one_run = ["agent_started", "agent_thinking", "agent_thinking", "tool_executing", "tool_completed"]
        expect(tab.events).to_have_text([*one_run, "agent_thinking", "agent_completed"] * 2)
        expect(tab.whats.nth(3)).to_have_text("remember")
        expect(tab.whats.nth(10)).to_have_text("read_notes")
        assert notes[other] not in tab.page.content()


def test_an_answer_comes_word_by_word(alice: Tab) -> None:
    """And Stop ends it: what it was is on record as an event, and not in the conversation."""
    alice.ask(STORY)
    expect(alice.answers).to_contain_text("Chapter 1.")
    expect(alice.answers).not_to_contain_text("Chapter 200.")
    expect(alice.button("Ask")).to_be_disabled()
    expect(alice.button("Open")).to_be_disabled()
    expect(alice.answers).to_contain_text("Chapter 2.")
    alice.button("Stop").click()

    expect(alice.lines.last).to_have_text("Stopped. Neither question nor answer is kept.")
    expect(alice.events.last).to_have_text("agent_failed")
    expect(alice.whats.last).to_contain_text("cancelled")
    alice.ask_and_wait("And now?")
    expect(alice.answers.last).to_contain_text("Question 1 in this conversation was: And now?")


def test_a_reload_keeps_the_tab(alice: Tab, bob: Tab) -> None:
    """Its user, its conversation and what was said in it, and the events that are still kept."""
    alice.open("plans")
    expect(alice.lines).to_have_count(0)
    alice.ask_and_wait("Hello")
    alice.page.reload()

    expect(alice.state).to_have_text("live")
    expect(alice.page.locator(".name")).to_have_text("alice")
    expect(alice.page.get_by_label("Conversation", exact=True)).to_have_value("plans")
    expect(alice.lines).to_have_text(["Hello", re.compile("^Question 1 in this conversation was: Hello")])
    expect(alice.events.last).to_have_text("agent_completed")
    bob.open("plans")
    bob.ask_and_wait("Hello, bob here")
    expect(bob.lines.nth(1)).to_contain_text("Question 1 in this conversation")
    alice.open("main")
    expect(alice.lines).to_have_count(0)
    alice.open("plans")
    expect(alice.lines).to_have_count(2)


def test_a_sign_out_ends_all_tabs_of_a_user(alice: Tab, bob: Tab, context: BrowserContext, server: Server) -> None:
    """With the run that is under way; and a reload does not bring it back. Bob's tab is not touched."""
    second = Tab(context, server.url)
    second.sign_in("alice")
    second.ask(STORY)
    bob.ask(STORY)
    expect(second.answers).to_contain_text("Chapter 1.")
    alice.button("Sign out").click()

    for tab in (alice, second):
        expect(tab.problem).to_have_text("You are signed out.")
        expect(tab.button("Sign in as alice")).to_be_visible()
        tab.page.reload()
        expect(tab.button("Sign in as alice")).to_be_visible()
        expect(tab.lines).to_have_count(0)
    expect(bob.button("Stop")).to_be_enabled()
    expect(bob.state).to_have_text("live")


def test_what_is_said_is_text(alice: Tab) -> None:
    """Markup in a question, in an answer, in a note and in a conversation's name makes no element."""
    attempt = "<img src=x onerror=\"document.title='taken'\">"
    alice.open(attempt)
    alice.ask_and_wait(f"Remember that {attempt}")
    alice.ask_and_wait(f"<b>{attempt}</b>")
    alice.page.reload()
    expect(alice.answers.last).to_contain_text(f"• {attempt}")
    expect(alice.page.locator("img, .lines b")).to_have_count(0)
    expect(alice.page).to_have_title("alice: chat")


def test_a_lost_connection_is_said(alice: Tab, server: Server) -> None:
    """An answer that was under way is lost with it, and nothing can be asked meanwhile."""
    alice.ask(STORY)
    expect(alice.answers).to_contain_text("Chapter 1.")
    server.kill()
    expect(alice.lines.last).to_have_text("The connection was lost, and the answer with it.")
    expect(alice.state).to_have_text(re.compile("connecting"))
    alice.ask("Hello")
    expect(alice.lines.last).to_have_text("There is no connection at the moment.")
    expect(alice.question).to_have_value("Hello")


def test_it_goes_by_keyboard(context: BrowserContext, server: Server) -> None:
    """From the sign-in to the answer, and what has no text of its own has a name."""
    tab = Tab(context, server.url)
    keyboard = tab.page.keyboard
    expect(tab.page.get_by_role("status")).to_contain_text(["Offline: a scripted model answers."])
    expect(tab.page.get_by_text("Demo tokens:")).to_be_visible()
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(tab.question).to_be_focused()
    expect(tab.state).to_have_text("live")
    keyboard.type("Hello")
    keyboard.press("Shift+Enter")
    keyboard.type("again")
    keyboard.press("Enter")
    expect(tab.answers).to_contain_text("Question 1 in this conversation was: Hello\nagain")
    expect(tab.question).to_be_focused()
    assert tab.page.evaluate(UNNAMED) == []


def test_it_needs_nothing_from_elsewhere(alice: Tab, server: Server) -> None:
    """All that the page asks for is the server's own, and no session is in an address."""
    alice.ask_and_wait("Hello")
    assert [url for url in alice.addresses if not url.startswith((server.url, "data:"))] == []
    session: str = alice.page.evaluate("sessionStorage.getItem('session')")
    assert not [url for url in alice.addresses if session in url]
    assert session not in server.output


def test_it_is_pictured(alice: Tab, bob: Tab, request: pytest.FixtureRequest) -> None:
    """For its README, where the option says so."""
    bob.ask_and_wait("Remember that the key is under the mat")
    alice.ask_and_wait("Remember that the parcel is next door")
    alice.ask_and_wait("What do you know about me?")
    alice.ask(STORY)
    expect(alice.answers.last).to_contain_text("Chapter 3.")
    alice.button("Stop").click()
    expect(alice.lines.last).to_contain_text("Stopped")

    path: Path | None = request.config.getoption("--write-chat-screenshot")
    assert alice.page.screenshot(path=path, full_page=True, timeout=PATIENCE * 1000)
