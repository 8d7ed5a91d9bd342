"""The chat of examples/chat on a real server, driven without a browser; tests/browser/ drives its page."""

import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from support.waiting import PATIENCE
from ucm_middleware.testing.server import Server, start_server

ROOT = Path(__file__).parents[1]
APP = "examples.chat.app:app"
USERS = ("alice", "bob")
SECRETS = {user: f"the secret of {user} is {number}" for user, number in zip(USERS, (4711, 8150), strict=True)}

Said = dict[str, Any]


@contextmanager
def chat(folder: Path, **env: str | None) -> Generator[Server]:
    """The example, without anybody signed in, and with everything that it keeps in ``folder``."""
    given = {"CHAT_DATA": str(folder), "CHAT_MODEL": None, "UCM_SECRET": None, "UCM_ENVIRONMENT": "development"}
    with start_server(APP, app_dir=ROOT, env={**given, **env}) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The example with its own model. Tests have conversations of their own."""
    with chat(tmp_path_factory.mktemp("chat")) as server:
        yield server


@dataclass
class Turn:
    """What came of one question, until its last word; ``events`` is what came in between of any run of the user's."""

    end: Said
    tokens: list[str] = field(default_factory=list)
    events: list[Said] = field(default_factory=list)

    @property
    def types(self) -> list[str]:
        """Those of the events."""
        return [event["type"] for event in self.events]

    @property
    def text(self) -> str:
        """The answer, which is what the tokens make."""
        assert self.end["type"] == "answer"
        assert "".join(self.tokens) == self.end["text"]
        text: str = self.end["text"]
        return text


class Connection:
    """One WebSocket, and what is said over it."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self._numbers = count(1)

    def ask(self, text: str, conversation: str = "main") -> None:
        """Ask, and do not wait for the answer. The first turn is called 1."""
        turn = str(next(self._numbers))
        self.say({"type": "ask", "turn": turn, "conversation": conversation, "text": text})

    def say(self, message: object) -> None:
        """Send what is JSON."""
        self.websocket.send(json.dumps(message))

    def receive(self) -> Said:
        """The next message, whatever it is."""
        said: Said = json.loads(self.websocket.recv(PATIENCE))
        return said

    def until(self, *types: str) -> Turn:
        """Listen up to a message of one of these types."""
        turn = Turn({})
        while (said := self.receive())["type"] not in types:
            if "sequence" in said:
                turn.events.append(said)
            else:
                assert said["type"] == "token"
                turn.tokens.append(said["text"])
        turn.end = said
        return turn

    def until_the_end(self) -> Turn:
        """Listen to a whole answer, and to the event that its run has ended."""
        return self.until("answer", "failed", "stopped")

    def until_closed(self) -> int | None:
        """Listen until the server closes. Returns the close code."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.receive()
        return None if closed.value.rcvd is None else closed.value.rcvd.code


class Tab:
    """A sign-in, and what can be done with it."""

    def __init__(self, server: Server, user: str, http: httpx.Client) -> None:
        self.user = user
        self.http = http
        self._server = server
        self.session: str = http.post("/sign-in", json={"token": f"demo-token-of-{user}"}).json()["session"]
        http.headers["Authorization"] = f"Bearer {self.session}"

    @contextmanager
    def talk(self) -> Generator[Connection]:
        """Connect, as a page that was loaded does."""
        with handshake(self._server, self.session) as websocket:
            yield Connection(websocket)

    def lines(self, conversation: str = "main") -> list[tuple[str, str]]:
        """What a reloaded page shows of a conversation."""
        answer = self.http.get("/conversation", params={"name": conversation})
        assert answer.status_code == HTTPStatus.OK
        return [(line["who"], line["text"]) for line in answer.json()]

    def conversations(self) -> list[str]:
        """What a page offers to open."""
        names: list[str] = self.http.get("/conversations").json()
        return names


def handshake(server: Server, *sessions: str) -> ClientConnection:
    """Open a WebSocket, as a browser does that was given these."""
    protocols = [Subprotocol("chat"), *(Subprotocol(f"session.{session}") for session in sessions)]
    # Without a bound on what waits here, so that the client can close in the middle of an answer.
    websocket = connect(f"{server.ws_url}/talk", subprotocols=protocols, max_queue=None)
    assert websocket.subprotocol == "chat"
    return websocket


@contextmanager
def signed_in(server: Server, user: str) -> Generator[Tab]:
    """A user, for as long as the block."""
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        yield Tab(server, user, http)


@pytest.fixture
def alice(server: Server) -> Iterator[Tab]:
    """In a tab of hers."""
    with signed_in(server, "alice") as tab:
        yield tab


@pytest.fixture
def bob(server: Server) -> Iterator[Tab]:
    """In a tab of his."""
    with signed_in(server, "bob") as tab:
        yield tab


def numbers_in(said: object) -> set[str]:
    """Whose secrets are in it."""
    return set(re.findall(r"4711|8150", json.dumps(said)))


def test_two_users_talk_to_the_agent_at_once(tmp_path: Path) -> None:
    """In conversations of the same name. Each answer has its user's own notes, and so has each event."""
    with (
        chat(tmp_path) as server,
        signed_in(server, "alice") as alice,
        signed_in(server, "bob") as bob,
        alice.talk() as hers,
        bob.talk() as his,
    ):
        talks = {"alice": hers, "bob": his}
        for user, talk in talks.items():
            talk.ask(f"Remember that {SECRETS[user]}")
        kept = {user: talk.until_the_end() for user, talk in talks.items()}
        for talk in talks.values():
            talk.ask("What do you know?")
        told = {user: talk.until_the_end() for user, talk in talks.items()}

    for user, number in zip(USERS, ("4711", "8150"), strict=True):
        assert kept[user].text == "I have noted that. You have 1 note now."
        assert told[user].text.splitlines() == [
            "Question 2 in this conversation was: What do you know?",
            "As far as I can see, you have 1 note:",
            f"• {SECRETS[user]}",
        ]
        assert len(told[user].tokens) > 20
        events = kept[user].events + told[user].events
        assert {event["user_id"] for event in events} == {user}
        assert numbers_in([events, told[user].tokens]) == {number}
        assert [event["data"]["tool"] for event in events if event["type"] == "tool_completed"] == [
            "remember",
            "read_notes",
        ]
    files = sorted(path.name for path in tmp_path.glob("*.sqlite"))
    assert len(files) == 3  # the conversations, and the notes of each
    assert not [file for file in files if "alice" in file or "bob" in file]


def test_each_step_of_a_run_is_an_event(alice: Tab) -> None:
    """In order; a run that answers says so before its answer is whole or right after it."""
    with alice.talk() as talk:
        talk.ask("Remember that the parcel is next door")
        turn = talk.until("agent_completed")
        types = [event for event in turn.types if event != "agent_thinking"]
        thoughts = [event["data"].get("text") for event in turn.events if event["type"] == "agent_thinking"]

    assert types == ["agent_started", "tool_executing", "tool_completed"]
    assert thoughts == [None, "This is something to be kept.", None]


def test_a_reload_keeps_what_was_said(alice: Tab, bob: Tab) -> None:
    """Another connection, and the same tab's session: the conversation goes on where it was. Bob's is his own."""
    for number in (1, 2):
        with alice.talk() as talk:
            talk.ask("Is anybody there?", "plans")
            assert talk.until_the_end().text.startswith(f"Question {number} in this conversation")

    assert [who for who, _ in alice.lines("plans")] == ["user", "assistant"] * 2
    assert alice.lines("plans")[0] == ("user", "Is anybody there?")
    assert alice.conversations()[0] == "plans"
    assert bob.lines("plans") == []
    assert "plans" not in bob.conversations()
    with bob.talk() as talk:
        talk.ask("Hello", "plans")
        assert talk.until_the_end().text.startswith("Question 1 in this conversation")
    assert len(alice.lines("plans")) == 4


def test_another_tab_of_the_same_user_has_the_events_too(server: Server, alice: Tab) -> None:
    """And not the answer: that is for the tab that asked."""
    with signed_in(server, "alice") as second, alice.talk() as talk, second.talk() as other:
        talk.ask("Hello")
        talk.until_the_end()
        seen = other.until("agent_completed")

    assert seen.types[0] == "agent_started"
    assert seen.tokens == []


def test_stop_cuts_a_run_off(alice: Tab, bob: Tab) -> None:
    """Its events end with agent_failed, nothing of it is kept, and the next question is answered. Bob's goes on."""
    with alice.talk() as hers, bob.talk() as his:
        hers.ask("Tell me a story", "stopped")
        his.ask("Tell me a story", "stopped")
        hers.until("token")
        his.until("token")
        hers.say({"type": "stop"})
        stopped = hers.until_the_end()
        assert stopped.end == {"type": "stopped", "turn": "1"}
        (failed,) = [event for event in stopped.events if event["type"] == "agent_failed"]
        assert failed["data"]["reason"] == "cancelled"
        his.until("token")

        hers.ask("And now?", "stopped")
        assert hers.until_the_end().text.startswith("Question 1 in this conversation was: And now?")
        his.until("token")
    assert [text for who, text in alice.lines("stopped") if who == "user"] == ["And now?"]


def test_stop_before_the_first_word(alice: Tab) -> None:
    """However early, the page is told; and there may be nothing to stop."""
    with alice.talk() as talk:
        talk.say({"type": "stop"})
        talk.ask("Tell me a story")
        talk.say({"type": "stop"})
        assert talk.until_the_end().end == {"type": "stopped", "turn": "1"}
        talk.ask("Hello")
        assert "Hello" in talk.until_the_end().text


def test_one_question_at_a_time(alice: Tab) -> None:
    """A second one over the same connection is refused, and the first goes on."""
    with alice.talk() as talk:
        talk.ask("What do you know?")
        talk.ask("And besides?")
        refused = talk.until("refused").end
        assert refused == {
            "type": "refused",
            "turn": "2",
            "problem": "There is a question under way: stop it first.",
        }
        assert talk.until("answer").end["turn"] == "1"


def test_who_goes_away_ends_the_run(server: Server, alice: Tab) -> None:
    """The other tab sees it."""
    with signed_in(server, "alice") as second, second.talk() as other:
        with alice.talk() as talk:
            talk.ask("Tell me a story", "left")
            talk.until("token")
        failed = other.until("agent_failed").end
        assert failed["user_id"] == "alice"
    assert alice.lines("left") == []


def test_a_sign_out_ends_one_user_alone(server: Server, alice: Tab, bob: Tab) -> None:
    """Connections of alice's close with 1008, in all of her tabs, and her sessions are over. Bob's run goes on."""
    with signed_in(server, "alice") as second, alice.talk() as hers, second.talk() as other, bob.talk() as his:
        hers.ask("Tell me a story", "over")
        his.ask("Tell me a story", "over")
        hers.until("token")
        his.until("token")
        assert alice.http.post("/sign-out").status_code == HTTPStatus.OK

        assert [talk.until_closed() for talk in (hers, other)] == [1008, 1008]
        for tab in (alice, second):
            assert tab.http.get("/whoami").status_code == HTTPStatus.UNAUTHORIZED
            assert status_of_refusal(server, tab.session) == HTTPStatus.UNAUTHORIZED
        his.until("token")
        assert bob.http.get("/whoami").json() == {"user": "bob"}
    with signed_in(server, "alice") as again:
        assert again.lines("over") == []  # an answer that was cut off is not kept


def status_of_refusal(server: Server, *sessions: str) -> int:
    """With what a handshake is refused."""
    with pytest.raises(InvalidStatus) as refused:
        handshake(server, *sessions)
    return refused.value.response.status_code


def test_nobody_gets_in_without_a_session(server: Server, alice: Tab) -> None:
    """A demo token is exchanged for one and is none; neither is a name, nor nothing."""
    paths = ("/whoami", "/conversations", "/conversation?name=main")
    forged = ("alice", "demo-token-of-alice", "Bearer", "null", f"{alice.session}x")
    with httpx.Client(base_url=server.url, trust_env=False) as stranger:
        answers = [stranger.post("/sign-in", json={"token": token}) for token in ("", "alice", "demo-token-of-carol")]
        answers += [stranger.get(path) for path in paths]
        answers += [
            stranger.get(path, headers={"Authorization": f"Bearer {session}"}) for path in paths for session in forged
        ]
        answers += [stranger.post("/sign-out")]
        assert stranger.post("/sign-in", json={}).status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    assert {answer.status_code for answer in answers} == {HTTPStatus.UNAUTHORIZED}
    assert status_of_refusal(server) == HTTPStatus.UNAUTHORIZED
    for session in ("alice", "demo-token-of-alice", "null", f"{alice.session}x"):
        assert status_of_refusal(server, session) == HTTPStatus.UNAUTHORIZED


BAD = {
    "no object": (5, "JSON"),
    "no type": ({"turn": "1"}, "discriminator 'type'"),
    "another type": ({"type": "sing"}, "expected tags"),
    "no text": ({"type": "ask", "turn": "1", "conversation": "main", "text": ""}, "ask.text: "),
    "too long": ({"type": "ask", "turn": "1", "conversation": "main", "text": "4711" * 1001}, "ask.text: "),
    "no turn": ({"type": "ask", "conversation": "main", "text": "Hello"}, "ask.turn: "),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_question_is_refused(alice: Tab, message: str) -> None:
    """With what is wrong and without what was said; the connection goes on."""
    said, problem = BAD[message]
    with alice.talk() as talk:
        talk.say(said)
        refused = talk.until("refused").end
        assert problem in refused["problem"] or message == "no object"
        assert not numbers_in(refused)
        talk.ask("Hello")
        assert talk.until_the_end().text


@pytest.mark.parametrize("name", ["", "\n", "a\nb", "x" * 257])
def test_a_conversation_s_name_is_visible_text(alice: Tab, name: str) -> None:
    """Others are refused, and the page is told which rule they break."""
    with alice.talk() as talk:
        talk.ask("Hello", name)
        failed = talk.until_the_end().end
        assert failed["type"] == "failed"
        assert failed["problem"].startswith("The name of the conversation: ")
    assert alice.http.get("/conversation", params={"name": name}).status_code == HTTPStatus.BAD_REQUEST


def test_what_is_no_json_closes_the_connection(alice: Tab, bob: Tab) -> None:
    """That one."""
    with alice.talk() as hers, bob.talk() as his:
        hers.websocket.send("hello")
        assert hers.until_closed() == 1007
        his.ask("Hello")
        assert his.until_the_end().text


def test_another_model_is_one_setting_away(tmp_path: Path) -> None:
    """Here it is the framework's own for tests, which calls every tool; the page is told which one answers."""
    with chat(tmp_path, CHAT_MODEL="test") as server, signed_in(server, "alice") as alice, alice.talk() as talk:
        assert httpx.get(f"{server.url}/model", trust_env=False).json() == {"model": "test"}
        talk.ask("Hello")
        assert json.loads(talk.until_the_end().text).keys() == {"remember", "read_notes"}


def test_a_model_that_there_is_not_is_named_at_the_start(tmp_path: Path) -> None:
    """Rather than in the first answer."""
    with (
        pytest.raises(AssertionError, match="Unknown model: made-up:model"),
        chat(tmp_path, CHAT_MODEL="made-up:model"),
    ):
        pass


def test_production_needs_a_secret(tmp_path: Path) -> None:
    """It does not start without one. With one, a restart finds what was said before."""
    with pytest.raises(AssertionError, match="UCM_SECRET"), chat(tmp_path, UCM_ENVIRONMENT="production"):
        pass

    for number in (1, 2):
        with (
            chat(tmp_path, UCM_ENVIRONMENT="production", UCM_SECRET="bT8zq1Yp4vKx7Lr0Wm3sNc6Jd9Hf2Ga5Ue") as server,
            signed_in(server, "alice") as alice,
            alice.talk() as talk,
        ):
            talk.ask(f"Remember that {SECRETS['alice']}")
            assert talk.until_the_end().text.endswith(f"You have {number} note{'' if number == 1 else 's'} now.")
            assert len(alice.lines()) == 2 * number


def test_without_a_folder_nothing_is_left(tmp_path: Path) -> None:
    """What was kept is gone when the server has stopped."""
    with chat(tmp_path, CHAT_DATA=None, TMPDIR=str(tmp_path)) as server:
        with signed_in(server, "alice") as alice, alice.talk() as talk:
            talk.ask("Hello")
            talk.until_the_end()
        assert list(tmp_path.glob("chat-*/*.sqlite"))
    assert list(tmp_path.iterdir()) == []


def test_the_page_and_its_parts_are_served(server: Server) -> None:
    """To anybody; nothing in them is from elsewhere."""
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        parts = [client.get(path) for path in ("/", "/static/page.js", "/static/page.css", "/static/ucm-events.js")]

    assert {part.status_code for part in parts} == {HTTPStatus.OK}
    assert not [url for part in parts for url in re.findall(r"""\b(?:https?|wss?)://.*|["'(]//.*""", part.text)]
