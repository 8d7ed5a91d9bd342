"""The specification's integration suite: the parts together, on a real server, a real file and real sockets."""

import asyncio
import gc
import json
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from types import FrameType
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from support.clock import Clock
from support.contexts import MakeManager
from support.fixtures import ServerFactory
from support.servers import Server
from support.waiting import wait_until
from ucm_middleware import (
    UnifiedIDManager,
    UserContextManager,
    create_isolated_execution_context,
    managed_user_context,
)

KIND = "uvicorn-httptools"
APP = "notebook:app"
USERS = ("alice", "bob", "carol")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the application: a database of its own and a settings file."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "settings.env").write_text("REGION=eu\nAPI_KEY=from-the-file\n")
    return {
        "NOTEBOOK_FILE": str(folder / "notes.db"),
        "NOTEBOOK_SETTINGS": str(folder / "settings.env"),
        "API_KEY": "from-the-process",
        "UCM_ENVIRONMENT": "production",
    }


@pytest.fixture(scope="module")
def server(module_server_factory: ServerFactory, files: dict[str, str]) -> Server:
    return module_server_factory(KIND, APP, env=files)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """One keep-alive connection, whoever asks over it."""
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server.url, limits=limits, timeout=30) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def live_contexts(client: httpx.Client, user_id: str) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = client.get("/operator").json()["live"]
    return [entry for entry in shown if entry["user_id"] == user_id]


def trail_of(client: httpx.Client, user_id: str) -> dict[str, Any]:
    answer = client.get(f"/audit/{user_id}", params={"reason": "the test"}, headers=bearer("auditor"))
    trail: dict[str, Any] = answer.json()
    return trail


def fails(server: Server, method: str, path: str, token: str | None = None, **params: str) -> bool:
    """Whether this is a 500, after which a server ends the connection: so it goes over one of its own."""
    headers = bearer(token) if token else None
    return httpx.request(method, f"{server.url}{path}", params=params, headers=headers).status_code == 500


class TestIds:
    """Every request has ids of its own, made by the product and in order, whatever a client sends."""

    def test_ids_are_prefixed_ordered_and_never_repeat(self, client: httpx.Client) -> None:
        ids = UnifiedIDManager()
        asked = [client.get("/ids", headers=bearer(user)).json() for user in USERS * 10]
        assert [answer["user_id"] for answer in asked] == [*USERS * 10]
        request_ids = [answer["request_id"] for answer in asked]
        assert request_ids == sorted(set(request_ids))
        for answer in asked:
            assert ids.parse(answer["request_id"]).kind == "request"
            assert ids.extract_thread_id(answer["run_id"]) == answer["thread_id"]
            assert answer["websocket_client_id"] is None
            assert answer["agent_context_keys"] == ["seen"]

    def test_a_client_names_neither_itself_nor_its_request(self, client: httpx.Client) -> None:
        forged = {"x-user-id": "alice", "x-request-id": "r-1", "cookie": "user_id=alice", "baggage": "user_id=alice"}
        answer = client.get("/ids", headers=forged).json()
        assert answer["is_anonymous"] is True
        assert UnifiedIDManager().validate(answer["user_id"], "anonymous")
        assert answer["request_id"] != "r-1"

    def test_strangers_over_one_connection_are_not_the_same(self, client: httpx.Client) -> None:
        assert len({client.get("/ids").json()["user_id"] for _ in range(5)}) == 5

    def test_children_name_their_parents(self, client: httpx.Client) -> None:
        root, child, grandchild = client.get("/children", headers=bearer("alice")).json()
        assert [one["operation_depth"] for one in (root, child, grandchild)] == [0, 1, 2]
        assert child["parent_request_id"] == root["request_id"]
        assert grandchild["parent_request_id"] == child["request_id"]
        assert root["thread_id"] == child["thread_id"] == grandchild["thread_id"]

    @pytest.mark.parametrize(
        "user_id", ["alice@example.com", "auth0|5f7c", "O'Brien", "3f2504e0-4f89-41d3-9a0c-0305e82c3301"]
    )
    def test_ordinary_ids_arrive_unchanged(self, client: httpx.Client, user_id: str) -> None:
        assert client.get("/ids", headers=bearer(user_id)).json()["user_id"] == user_id

    @pytest.mark.parametrize("user_id", ["none", "placeholder", "temp_1", "a" * 257, "anonymous_" + "0" * 32])
    def test_bad_ids_are_a_400(self, client: httpx.Client, user_id: str) -> None:
        answer = client.get("/ids", headers=bearer(user_id))
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith("user_id: ")


class TestEnvironment:
    """Settings come from the process and its files; what one request sets, no other sees."""

    def test_the_process_wins_over_the_file(self, client: httpx.Client) -> None:
        assert client.get("/settings/REGION").json()["here"] == "eu"
        assert client.get("/settings/API_KEY").json()["here"] == "from-the-process"

    def test_a_setting_of_one_request_ends_with_it(self, client: httpx.Client) -> None:
        for user in USERS:
            own = client.put("/settings/REGION", params={"value": f"of {user}"}, headers=bearer(user)).json()
            assert own == {"here": f"of {user}", "process": None}
            for reader in USERS:
                assert client.get("/settings/REGION", headers=bearer(reader)).json()["here"] == "eu"

    def test_nobody_loosens_the_rules(self, server: Server, client: httpx.Client) -> None:
        assert client.get("/settings/REGION").json()["environment"] == "production"
        assert fails(server, "PUT", "/settings/UCM_ENVIRONMENT", value="testing")
        assert client.get("/ids", headers=bearer("test_alice")).status_code == 400

    def test_ids_for_tests_are_for_a_testing_environment(
        self, server_factory: ServerFactory, files: dict[str, str]
    ) -> None:
        testing = server_factory(KIND, APP, env={**files, "UCM_ENVIRONMENT": "testing"})
        assert httpx.get(f"{testing.url}/ids", headers=bearer("test_alice")).json()["user_id"] == "test_alice"

    def test_a_misspelt_environment_does_not_start(self, server_factory: ServerFactory, files: dict[str, str]) -> None:
        with pytest.raises(AssertionError, match="UCM_ENVIRONMENT is 'producton', which is no environment"):
            server_factory(KIND, APP, env={**files, "UCM_ENVIRONMENT": "producton"})


class TestAuditCompliance:
    """What an auditor asks for is on record, of requests that are long over too."""

    FIXED = ("user_id", "context_set_at", "context_source", "isolation_verified", "compliance_version", "events")

    def test_the_fields_are_there_during_the_request_and_after(self, client: httpx.Client) -> None:
        during = client.get("/trail", headers=bearer("audited")).json()
        after = trail_of(client, "audited")
        for trail in (during, after):
            assert [name for name in self.FIXED if name not in trail] == []
            assert trail["user_id"] == "audited"
            assert trail["context_source"] == "connection"
            assert trail["isolation_verified"] is True
            assert datetime.now(UTC) - datetime.fromisoformat(trail["context_set_at"]) < timedelta(minutes=5)
        assert during["context_set_at"] == after["context_set_at"]
        assert [event["event"] for event in after["events"]] == ["opened", "closed", "privileged"]
        assert after["events"][1]["reason"] == "finished"

    def test_a_denial_and_the_one_who_looked_are_on_record(self, client: httpx.Client) -> None:
        assert client.get("/of/bob", headers=bearer("nosy")).status_code == 403
        first, second = (trail_of(client, "nosy") for _ in range(2))
        [denial] = [event for event in second["events"] if event["event"] == "denied"]
        assert (denial["action"], denial["asked_for"]) == ("get_context", "bob")
        looks = [event for event in second["events"] if event["event"] == "privileged"]
        assert [look["reason"] for look in looks] == ["the test", "the test"]
        assert len(second["events"]) == len(first["events"]) + 1

    def test_of_somebody_never_seen_there_is_nothing(self, client: httpx.Client) -> None:
        answer = client.get("/audit/unseen", params={"reason": "the test"}, headers=bearer("auditor"))
        assert (answer.status_code, answer.json()) == (200, None)

    def test_without_a_reason_nobody_looks(self, server: Server) -> None:
        assert fails(server, "GET", "/audit/alice", "auditor", reason=" ")

    def test_what_failed_says_so(self, server: Server, client: httpx.Client) -> None:
        assert fails(server, "POST", "/notes", "clumsy", text="a mistake")
        [end] = [event for event in trail_of(client, "clumsy")["events"] if event["event"] == "closed"]
        assert (end["reason"], end["outcome"]) == ("failed", "failed")


@contextmanager
def connected(server: Server, token: str | None, path: str = "/socket") -> Iterator[ClientConnection]:
    with connect(f"{server.ws_url}{path}", additional_headers=bearer(token) if token else None) as websocket:
        yield websocket


def received(websocket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(websocket.recv(timeout=15))
    return message


def close_code(websocket: ClientConnection) -> int | None:
    """The code that the server closes with."""
    with pytest.raises(ConnectionClosed) as caught:
        websocket.recv(timeout=15)
    return caught.value.rcvd.code if caught.value.rcvd else None


class TestWebSocket:
    """A connection is in one context from the handshake to the end, and in nobody else's."""

    def test_each_connection_has_a_context_of_its_own(self, server: Server, client: httpx.Client) -> None:
        with ExitStack() as stack:
            sockets = [(user, stack.enter_context(connected(server, user))) for user in USERS * 2]
            first = [received(websocket) for _, websocket in sockets]
            assert [answer["user_id"] for answer in first] == [user for user, _ in sockets]
            assert len({answer["websocket_client_id"] for answer in first}) == 6
            for round_number in range(3):
                for number, (_, websocket) in enumerate(sockets):
                    websocket.send(f"{number}/{round_number}")
            for number, (user, websocket) in enumerate(sockets):
                answers = [received(websocket) for _ in range(3)]
                assert answers[-1] == {"user": user, "messages": [f"{number}/{turn}" for turn in range(3)]}
            assert len(live_contexts(client, "alice")) == 2
            assert client.get("/operator").json()["isolated"] is True
        wait_until(lambda: not live_contexts(client, "alice"), "the contexts of the connections are closed")

    @pytest.mark.parametrize(("token", "status"), [(None, 401), ("", 401), ("alice+-1", 401), ("none", 400)])
    def test_who_may_not_in_gets_an_answer_before_the_handshake(
        self, server: Server, token: str | None, status: int
    ) -> None:
        with pytest.raises(InvalidStatus) as caught, connected(server, token):
            raise AssertionError("it was accepted")
        assert caught.value.response.status_code == status

    def test_it_ends_with_the_credentials(self, server: Server, client: httpx.Client) -> None:
        with connected(server, "shortly+0.5") as websocket:
            assert received(websocket)["user_id"] == "shortly"
            assert close_code(websocket) == 1008
        [end] = [event for event in trail_of(client, "shortly")["events"] if event["event"] == "closed"]
        assert end["reason"] == "expired"

    def test_reaching_for_another_user_ends_it(self, server: Server) -> None:
        codes = []
        with connected(server, "bob") as bob:
            received(bob)
            for target in ("bob", "somebody who is not there"):
                with connected(server, "alice") as alice:
                    received(alice)
                    alice.send(f"reach {target}")
                    codes.append(close_code(alice))
            bob.send("still here")
            assert received(bob) == {"user": "bob", "messages": ["still here"]}
        assert codes == [1008, 1008]

    def test_it_learns_its_user_once(self, server: Server, client: httpx.Client) -> None:
        with connected(server, None, "/login") as websocket:
            websocket.send("late-alice")
            known = received(websocket)
            assert known["user_id"] == "late-alice"
            assert [shown["request_id"] for shown in live_contexts(client, "late-alice")] == [known["request_id"]]
            websocket.send("late-alice")
            assert received(websocket) == known
            websocket.send("late-bob")
            assert close_code(websocket) == 1008

    def test_an_id_whose_refusal_is_long_still_closes_properly(self, server: Server) -> None:
        with connected(server, None, "/login") as websocket:
            websocket.send("test_alice")
            assert close_code(websocket) == 1008

    def test_one_user_at_the_limit_keeps_nobody_else_out(self, server: Server, client: httpx.Client) -> None:
        with ExitStack() as stack:
            sockets = [stack.enter_context(connected(server, "greedy")) for _ in range(8)]
            for websocket in sockets:
                received(websocket)
            with pytest.raises(InvalidStatus) as caught, connected(server, "greedy"):
                raise AssertionError("it was accepted")
            assert caught.value.response.status_code == 429
            assert caught.value.response.headers["retry-after"]
            assert client.get("/ids", headers=bearer("greedy")).status_code == 200  # requests find room
            assert client.get("/ids", headers=bearer("modest")).status_code == 200
            sockets[0].close()
            wait_until(lambda: len(live_contexts(client, "greedy")) == 7, "the closed one does not count any more")
            received(stack.enter_context(connected(server, "greedy")))


class TestDatabase:
    """One transaction for each request, of its user, committed or rolled back with it, and always closed."""

    def test_each_user_reads_their_own_over_one_connection(self, client: httpx.Client) -> None:
        for user in USERS:
            for number in range(3):
                written = client.post("/notes", params={"text": f"{user}'s {number}"}, headers=bearer(user))
                assert written.status_code == 200
        for user in USERS:
            expected = [f"{user}'s {number}" for number in range(3)]
            assert client.get("/notes", headers=bearer(user)).json() == expected
            assert client.get("/notes/stream", headers=bearer(user)).text.splitlines() == expected

    def test_many_at_once(self, server: Server, client: httpx.Client, files: dict[str, str]) -> None:
        users = [f"writer-{number}" for number in range(8)]

        def work(user: str) -> list[str]:
            with httpx.Client(base_url=server.url, headers=bearer(user), timeout=60) as own:
                for number in range(5):
                    own.post("/notes", params={"text": f"{user} {number}"}).raise_for_status()
                notes: list[str] = own.get("/notes").json()
                return notes

        with ThreadPoolExecutor(len(users)) as pool:
            read = list(pool.map(work, users))
        assert read == [[f"{user} {number}" for number in range(5)] for user in users]
        with sqlite3.connect(files["NOTEBOOK_FILE"]) as database:
            rows = database.execute("select owner, text from notes where owner like 'writer-%'").fetchall()
        database.close()
        assert len(rows) == 40
        assert all(text.startswith(f"{owner} ") for owner, text in rows)

    def test_what_fails_is_rolled_back_and_closed(self, server: Server, client: httpx.Client) -> None:
        assert client.post("/notes", params={"text": "kept"}, headers=bearer("writer")).status_code == 200
        assert fails(server, "POST", "/notes", "writer", text="a mistake")
        assert client.get("/notes", headers=bearer("writer")).json() == ["kept"]
        assert client.get("/operator").json()["databases"] == 0

    def test_a_session_given_to_a_context_is_its_own_and_closed_with_it(self, files: dict[str, str]) -> None:
        database = sqlite3.connect(files["NOTEBOOK_FILE"])
        manager = UserContextManager()
        with managed_user_context(manager.create_isolated_context("alice", db_session=database)) as context:
            assert context.db_session is database
            assert context.create_child_context("part").db_session is database
            assert database.execute("select 1").fetchone() == (1,)
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            database.execute("select 1")

    def test_one_session_for_two_users_is_found(self, files: dict[str, str], make_manager: MakeManager) -> None:
        database = sqlite3.connect(files["NOTEBOOK_FILE"])
        manager = make_manager()
        for user in ("alice", "bob"):
            manager.create_isolated_context(user, db_session=database)
        [finding] = manager.isolation_report().findings
        assert "alice.db_session" in str(finding)
        assert "bob.db_session" in str(finding)
        database.close()


class TestErrorHandling:
    """Whatever goes wrong, it is that one request's, and the connection and everybody else go on."""

    @pytest.mark.parametrize(
        ("path", "token", "status"),
        [
            ("/teapot", "alice", 418),
            ("/nowhere", "alice", 404),
            ("/of/bob", "alice", 403),
            ("/trail", None, 401),
            ("/ids", "alice+-1", 401),
            ("/ids", "undefined", 400),
        ],
    )
    def test_an_error_is_answered_and_the_next_request_is_somebody_elses(
        self, client: httpx.Client, path: str, token: str | None, status: int
    ) -> None:
        for _ in range(3):
            assert client.get(path, headers=bearer(token) if token else None).status_code == status
            assert client.get("/ids", headers=bearer("bob")).json()["user_id"] == "bob"
            assert client.get("/ids").json()["is_anonymous"] is True
        assert live_contexts(client, "alice") == []

    def test_a_response_that_breaks_off_takes_its_context_with_it(self, client: httpx.Client) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/broken-off", headers=bearer("alice"))
        assert client.get("/ids", headers=bearer("bob")).json()["user_id"] == "bob"
        assert live_contexts(client, "alice") == []

    def test_a_broken_socket_is_closed_and_its_neighbour_is_not(self, server: Server, client: httpx.Client) -> None:
        with connected(server, "bob") as bob, connected(server, "alice") as alice:
            received(alice)
            received(bob)
            alice.send("a mistake")
            assert close_code(alice) in (1006, 1011, None)
            bob.send("hello")
            assert received(bob) == {"user": "bob", "messages": ["hello"]}
            wait_until(lambda: not live_contexts(client, "alice"), "the broken one's context is closed")

    def test_an_id_out_of_a_path_that_is_no_id_is_a_400(self, client: httpx.Client) -> None:
        assert client.get("/of/%20", headers=bearer("alice")).status_code == 400

    def test_the_server_stops_with_a_socket_open(self, server_factory: ServerFactory, files: dict[str, str]) -> None:
        stopping = server_factory("uvicorn-h11", APP, env=files)
        with connected(stopping, "alice") as websocket:
            received(websocket)
            stopping.stop()
            assert close_code(websocket) in (1001, 1012, 1013, None)


def calls_of(work: Callable[[], object]) -> int:
    """How many functions, Python's and C's, are called for this."""
    calls = count()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(calls)

    gc.disable()  # a collection calls back whoever asked for it, hypothesis for one
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return next(calls)


OPERATIONS: dict[str, Callable[[UserContextManager], object]] = {
    "create and close": lambda manager: manager.create_isolated_context("alice", "r-1").close(),
    "create with a deadline and close": lambda manager: manager.create_managed_context("alice", "r-1").close(),
    "get": lambda manager: manager.get_context("bob"),
    "get nothing": lambda manager: manager.clear_context("dan"),
    "set anew": lambda manager: manager.set_context("bob", manager.get_context("bob"), 600),
    "sweep": lambda manager: manager.sweep(),
    "read a trail": lambda manager: manager.get_audit_trail("bob"),
}


class TestPerformance:
    """Counted, not timed: nothing on a request's path grows with the number of live contexts."""

    @pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
    def test_the_work_is_the_same_with_ten_contexts_and_with_three_thousand(
        self, operation: Callable[[UserContextManager], object], make_manager: MakeManager
    ) -> None:
        counted = []
        for crowd in (10, 3000):
            manager = make_manager(clock=Clock())
            manager.set_context("bob", create_isolated_execution_context("bob"), 600)
            for number in range(crowd):
                manager.create_isolated_context(f"user-{number}", ttl_seconds=600)
            operation(manager)
            counted.append(calls_of(lambda manager=manager: operation(manager)))  # type: ignore[misc]
        assert counted[0] == counted[1]

    def test_a_sweep_costs_what_is_due_and_not_what_waits(self, make_manager: MakeManager) -> None:
        counted = []
        for waiting in (10, 3000):
            clock = Clock()
            manager = make_manager(clock=clock)
            for number in range(waiting):
                manager.create_isolated_context(f"user-{number}", ttl_seconds=600)
            for _ in range(5):
                manager.create_isolated_context("alice", ttl_seconds=60)
            clock.advance(60)
            counted.append(calls_of(manager.sweep))
            assert len(manager.get_active_contexts()) == waiting
        assert counted[0] == counted[1]

    def test_misses_leave_nothing_behind(self) -> None:
        manager = UserContextManager()
        sizes = []
        for _ in range(2):
            for number in range(1000):
                manager.clear_context(f"nobody-{number}")
                manager.get_audit_trail(f"nobody-{number}")
            registry = manager._registry
            sizes.append((len(registry._named.lone), len(registry._by_key), len(registry._by_owner)))
        assert sizes == [(0, 0, 0), (0, 0, 0)]

    def test_contexts_share_one_thread_and_need_no_task(self, make_manager: MakeManager) -> None:
        before = set(threading.enumerate())
        manager = make_manager()
        for number in range(500):
            manager.create_isolated_context(f"user-{number}", ttl_seconds=60 + number)
        assert len(set(threading.enumerate()) - before) == 1

    async def test_a_context_without_resources_needs_no_task(self) -> None:
        before = asyncio.all_tasks()
        manager = UserContextManager()
        for number in range(100):
            async with managed_user_context(manager.create_isolated_context(f"user-{number}")):
                assert asyncio.all_tasks() == before

    def test_a_thousand_requests_leave_nothing_live(self, server: Server, client: httpx.Client) -> None:
        def work(user: str) -> Counter[str]:
            with httpx.Client(base_url=server.url, headers=bearer(user), timeout=60) as own:
                paths = ("/ids", "/ids-from-a-thread")
                return Counter(own.get(paths[number % 2]).json()["user_id"] for number in range(125))

        users = [f"busy-{number}" for number in range(8)]
        with ThreadPoolExecutor(len(users)) as pool:
            assert list(pool.map(work, users)) == [Counter({user: 125}) for user in users]
        assert client.get("/operator").json() == {"live": [], "isolated": True, "databases": 0}
