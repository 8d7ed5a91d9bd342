"""What outlives a request is named in its user's trail, on real servers; what ends with the request is not."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from support.fixtures import ServerFactory
from support.observer import client
from support.servers import SERVER_KINDS, Server
from support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.security

HOLDERS = {
    "task": r"task census_app\.sleeps, at .*census_app\.py:\d+",
    "timer": r"timer census_app\.rings, at .*census_app\.py:\d+",
    "thread": r"thread 'left behind' in census_app\.waits, at .*census_app\.py:\d+",
    "job": r"executor job census_app\.pool<held>.*",
    "generator": r"generator census_app\.reads, at .*census_app\.py:\d+, kept in census_app\.keep\[\d+\]",
    "reference": r"reference census_app\.keep\[\d+\]",
    "block": r"task census_app\.sleeps, at .*",
}
KINDS = {"job": "executor job", "block": "task"}

CLEAN = (
    *(f"{name}/twin" for name in HOLDERS),
    *("child", "worker", "timeout", "agent"),
    *("task/empty", "cycle", "plain", "sync", "stream", "background", "error", "gathered", "nowhere"),
    *("depends/sync", "depends/async", "depends/yield", "depends/yield-sync"),
)


class Door:
    """Asks the app of one server."""

    def __init__(self, server: Server, http: httpx.Client) -> None:
        self.server = server
        self._http = http

    def get(self, path: str, user: str) -> httpx.Response:
        return self._http.get(f"/{path}", params={"user": user})

    def ask(self, what: str) -> Any:
        return self._http.get(f"/door/{what}").json()

    def outlived(self, user: str) -> list[dict[str, Any]]:
        """What is on record of this user's contexts that were held."""
        trail = self.ask(f"trail/{user}")
        return [] if trail is None else [event for event in trail["events"] if event["event"] == "outlived"]

    def told(self, user: str) -> dict[str, Any]:
        """The one record, once it is there. After a search, the next look may be ten seconds away."""
        what = f"what outlived a request of {user} is on record"
        wait_until(lambda: bool(self.outlived(user)), what, timeout=4 * PATIENCE)
        (event,) = self.outlived(user)
        return event

    def until_looked(self, user: str) -> None:
        """Until all that was suspected before is judged: the census takes suspects in order, a reference last."""
        self.get("reference", user)
        self.told(user)


def opened(server: Server) -> Iterator[Door]:
    with client(server) as http:
        http.headers["Connection"] = "close"  # after an error uvicorn closes it anyhow
        door = Door(server, http)
        yield door
        door.ask("open")


@pytest.fixture(scope="module", params=[kind for kind in SERVER_KINDS if kind != "uvicorn-httptools"])
def door(request: pytest.FixtureRequest, module_server_factory: ServerFactory) -> Iterator[Door]:
    yield from opened(module_server_factory(request.param, "census_app:served", env={"CENSUS_ACTION": "record"}))


@pytest.fixture(scope="module", params=[kind for kind in SERVER_KINDS if kind.startswith("uvicorn")][:1])
def based(request: pytest.FixtureRequest, module_server_factory: ServerFactory) -> Iterator[Door]:
    """With a BaseHTTPMiddleware inside, which runs the app in a task of its own."""
    env = {"CENSUS_ACTION": "record", "CENSUS_BASED": "yes"}
    yield from opened(module_server_factory(request.param, "census_app:served", env=env))


@pytest.mark.parametrize("name", HOLDERS)
def test_each_holder_is_named(door: Door, name: str) -> None:
    user = f"user-{name}"
    assert door.get(name, user).status_code == 200
    event = door.told(user)
    assert event["kinds"] == [KINDS.get(name, name)]
    (holder,) = event["holders"]
    assert re.fullmatch(HOLDERS[name], holder)
    assert event["outcome"] == "failed"
    door.ask("open")


def test_clean_requests_leave_nothing_on_record(door: Door) -> None:
    for path in CLEAN:
        door.get(path, f"clean-{path.replace('/', '-')}")
    with connect(f"{door.server.ws_url}/socket?user=clean-socket", open_timeout=PATIENCE) as socket:
        assert socket.recv() == "clean-socket"
        socket.send("go")
    door.until_looked("sentinel")
    found = {path: door.outlived(f"clean-{path.replace('/', '-')}") for path in (*CLEAN, "socket")}
    assert {path: events for path, events in found.items() if events} == {}


def test_a_task_of_a_websocket_is_named(door: Door) -> None:
    with connect(f"{door.server.ws_url}/socket/task?user=socket-task", open_timeout=PATIENCE):
        pass
    assert door.told("socket-task")["kinds"] == ["task"]


def test_inside_of_another_middlewares_task(based: Door) -> None:
    for path in CLEAN:
        based.get(path, f"clean-{path.replace('/', '-')}")
    for name in ("task", "timer"):
        based.get(name, f"user-{name}")
        assert based.told(f"user-{name}")["kinds"] == [name]
    based.until_looked("sentinel")
    found = {path: based.outlived(f"clean-{path.replace('/', '-')}") for path in CLEAN}
    assert {path: events for path, events in found.items() if events} == {}


class TestActions:
    """What is done about what was found. The kind of server makes no difference here."""

    @pytest.fixture
    def serve(self, server_factory: ServerFactory) -> Iterator[Any]:
        doors: list[Iterator[Door]] = []

        def start(action: str, **env: str) -> Door:
            variables = {"CENSUS_ACTION": action, "PYTHONWARNINGS": "always::ResourceWarning", **env}
            doors.append(opened(server_factory(SERVER_KINDS[0], "census_app:served", env=variables)))
            return next(doors[-1])

        yield start
        for each in doors:
            next(each, None)

    def test_record_gives_no_warning(self, serve: Any) -> None:
        door = serve("record")
        door.get("task", "alice")
        door.told("alice")
        assert "ResourceWarning" not in door.server.output

    def test_warn_names_it_and_no_user(self, serve: Any) -> None:
        door = serve("warn")
        door.get("task", "alice")
        door.told("alice")
        door.server.wait_for_output("ResourceWarning: context request_")
        (line,) = [line for line in door.server.output.splitlines() if "ResourceWarning: context " in line]
        assert re.search(r"is closed and still held by task census_app\.sleeps, at .*census_app\.py:\d+", line)
        assert "alice" not in line

    def test_cancel_ends_tasks_and_timers(self, serve: Any) -> None:
        door = serve("cancel")
        door.get("task", "alice")
        door.get("timer", "bob")
        assert door.told("alice")["kinds"] == ["task"]
        assert door.told("bob")["kinds"] == ["timer"]
        wait_until(lambda: sorted(door.ask("cancelled")) == ["rings", "sleeps"], "both were cancelled")

    def test_raise_comes_after_the_answer(self, serve: Any) -> None:
        door = serve("raise")
        assert door.get("task", "alice").status_code == 200
        door.server.wait_for_output("ContextLeakError: context request_")
        assert door.told("alice")["kinds"] == ["task"]
        assert door.get("plain", "bob").text == '"bob"'
        door.until_looked("carol")
        assert door.outlived("bob") == []
        assert len(door.outlived("alice")) == 1

    def test_off_looks_at_nothing(self, serve: Any) -> None:
        door = serve("off")
        door.get("task", "alice")
        assert door.get("plain", "alice").text == '"alice"'
        assert door.outlived("alice") == []

    def test_what_is_allowed_is_left_alone(self, serve: Any) -> None:
        door = serve("cancel", CENSUS_ALLOW="census_app.sleeps")
        door.get("task", "alice")
        door.until_looked("bob")
        assert door.outlived("alice") == []
        assert door.ask("cancelled") == []
