"""The guide to live events is what it says: its program runs as it stands there, its tables are those of the code."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from support.waiting import PATIENCE
from ucm_middleware import Delivery, EventPolicy
from ucm_middleware.testing.server import Server, start_server

GUIDE = (Path(__file__).parents[1] / "docs" / "how-to" / "show-live-events.md").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The program of the guide."""
    folder = tmp_path_factory.mktemp("guide")
    [program] = re.findall(r'```python title="reports.py"\n(.*?)```', GUIDE, re.DOTALL)
    (folder / "reports.py").write_text(program)
    with start_server("reports:app", app_dir=folder) as server:
        yield server


def token(user: str) -> dict[str, str]:
    """The headers of somebody's request."""
    return {"Authorization": f"Bearer token-of-{user}"}


def listen(server: Server, user: str, query: str = "") -> ClientConnection:
    """Open somebody's WebSocket."""
    return connect(f"{server.ws_url}/events{query}", additional_headers=token(user))


def post(server: Server, user: str, path: str, **params: str | float) -> httpx.Response:
    """Ask for something as somebody."""
    return httpx.post(f"{server.url}{path}", params=params, headers=token(user), trust_env=False)


def event(connection: ClientConnection) -> dict[str, Any]:
    """The next event."""
    received: dict[str, Any] = json.loads(connection.recv(PATIENCE))
    return received


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first row."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names(heading: str) -> list[str]:
    """What the first column of a table names."""
    return [name for row in rows(heading) for name in re.findall(r"`(\w+)`", row[0])]


def test_users_send_to_themselves_and_jobs_to_those_they_name(server: Server) -> None:
    """Anybody else is refused, whether or not they exist."""
    with listen(server, "alice") as alice, listen(server, "bob") as bob:
        sent = post(server, "alice", "/message", to="alice", text="mine").json()
        refused = [post(server, "alice", "/message", to=user, text="for you") for user in ("bob", "nobody-at-all")]
        assert post(server, "job", "/announce", to="bob", text="for bob").is_success

        first = event(alice)
        assert (first["type"], first["data"], first["sequence"]) == ("message", {"text": "mine"}, sent["sequence"])
        assert event(bob)["data"] == {"text": "for bob"}
    assert sent["delivered"] + sent["queued"] == 1
    assert [(answer.status_code, answer.json()) for answer in refused] == [(403, refused[0].json())] * 2


def test_the_envelope_has_the_fields_of_the_guide(server: Server) -> None:
    """In that order; from a job, there is no request of the user's."""
    with listen(server, "alice") as alice:
        post(server, "alice", "/message", to="alice", text="mine")
        post(server, "job", "/announce", to="alice", text="from a job")
        mine, from_job = event(alice), event(alice)

    assert list(mine) == names("What is on the wire")
    assert mine["user_id"] == from_job["user_id"] == "alice"
    assert None not in (mine["thread_id"], mine["run_id"], mine["request_id"])
    assert from_job["thread_id"] is from_job["run_id"] is from_job["request_id"] is None


def test_an_event_of_a_thread_reaches_those_who_follow_it(server: Server) -> None:
    """Also when it is replayed; the others see its number left out."""
    with listen(server, "alice", "?report=q3") as following, listen(server, "alice") as other:
        assert post(server, "alice", "/progress", report="q3", done=0.5).is_success
        post(server, "alice", "/message", to="alice", text="done")
        half = event(following)
        assert (half["type"], half["data"]) == ("progress", {"done": 0.5})
        assert event(following)["data"] == {"text": "done"}
        seen = event(other)
        assert (seen["data"], seen["sequence"]) == ({"text": "done"}, half["sequence"] + 1)

    since = f"?epoch={half['epoch']}&last_sequence={half['sequence'] - 1}"
    with listen(server, "alice", since) as other:
        assert event(other)["data"] == {"text": "done"}
    with listen(server, "alice", f"{since}&report=q3") as following:
        assert [event(following)["data"] for _ in range(2)] == [{"done": 0.5}, {"text": "done"}]


def test_what_cannot_be_replayed_is_said(server: Server) -> None:
    """With what the client had named, and from where it goes on."""
    with listen(server, "alice", "?epoch=another&last_sequence=3") as alice:
        missed = event(alice)
        sent = post(server, "alice", "/message", to="alice", text="live").json()
        assert event(alice)["sequence"] == sent["sequence"]
    assert (missed["type"], missed["data"]) == ("events_missed", {"epoch": "another", "sequence": 3})
    assert missed["sequence"] == sent["sequence"] - 1


def test_the_tables_are_those_of_the_code() -> None:
    """What an answer tells, and each setting with its default."""
    answer = Delivery("epoch", 1, 1, 0, (), kept=True)
    assert all(hasattr(answer, name) for name in names("Send"))
    assert len(names("Send")) == 6

    policy = EventPolicy()
    defaults = [[f"`{field.name}`", repr(getattr(policy, field.name))] for field in fields(policy)]
    assert [[name, default.strip("`")] for name, default, _ in rows("Bound it")] == defaults
