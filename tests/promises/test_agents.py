"""Agents on real servers: fifty users at once run them over HTTP and WebSockets, and nobody gets another's secret.

Below `/bare` the same agents run as they are, and the same questions show the leak.
"""

import asyncio
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from support.fixtures import ServerFactory
from support.observer import client, token_of
from support.servers import Server
from support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.security

USERS = [f"user{number}" for number in range(50)]
SECRET = re.compile(r"secret-[0-9a-f]{32}")


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_agents:app")


@pytest.fixture
def door(server: Server) -> Iterator[httpx.Client]:
    with client(server) as door:
        yield door


class User:
    """One user's clients. ``got`` is all that came back to them."""

    def __init__(self, server: Server, name: str, http: httpx.AsyncClient) -> None:
        self.name = name
        self.secret = f"secret-{secrets.token_hex(16)}"
        self.got: list[str] = []
        self.events: Counter[str] = Counter()
        self._server = server
        self._http = http

    async def get(self, path: str, **params: str) -> httpx.Response:
        params["secret"] = self.secret
        response = await self._http.get(f"{self._server.url}{path}", params=params, headers=token_of(self.name))
        self.got.append(response.text)
        return response

    async def run_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (self.ask(), self.talk(), self.go_away(), self.time_out(), self.live(), self.hang_up()):
                group.create_task(work)

    async def ask(self) -> None:
        answer = (await self.get("/ask")).json()
        assert answer == {"memory": [self.secret], "found": [self.secret] * 2, "read": [[self.secret] * 2] * 2}

    async def talk(self) -> None:
        lines = (await self.get("/talk")).text.splitlines()
        assert [json.loads(line) for line in lines] == [[self.secret] * 2] * 12

    async def go_away(self) -> None:
        url = f"{self._server.url}/talk?secret={self.secret}"
        async with self._http.stream("GET", url, headers=token_of(self.name)) as response:
            async for line in response.aiter_lines():
                self.got.append(line)
                break

    async def time_out(self) -> None:
        assert "did not end within 0.05 seconds" in (await self.get("/time_out")).json()

    async def live(self) -> None:
        async with self._connect() as websocket:
            for message in ("ask", "talk", "ask"):
                await websocket.send(message)
                while (envelope := json.loads(await websocket.recv()))["type"] != "answer":
                    self._take(envelope)
                self._take(envelope)
            while not self.events["agent_completed"]:  # an answer may overtake events
                self._take(json.loads(await websocket.recv()))

    async def hang_up(self) -> None:
        async with self._connect() as websocket:
            await websocket.send("ask")
            self._take(json.loads(await websocket.recv()))
            websocket.transport.abort()

    def _connect(self) -> connect:
        url = f"{self._server.ws_url}/live?secret={self.secret}"
        return connect(url, additional_headers=token_of(self.name), open_timeout=None, ping_interval=None)

    def _take(self, envelope: dict[str, Any]) -> None:
        assert envelope["user_id"] == self.name
        self.got.append(json.dumps(envelope))
        self.events[envelope["type"]] += 1


async def crowd(server: Server) -> list[User]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(timeout=PATIENCE * 4, verify=False, limits=limits) as http:
        users = [User(server, name, http) for name in USERS]
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user.run_all())
    return users


@pytest.mark.timeout(300)
def test_nobody_gets_another_s_secret_in_an_answer_an_event_a_record_or_a_span(
    server: Server, door: httpx.Client
) -> None:
    users = asyncio.run(crowd(server))
    for user in users:
        assert set(SECRET.findall("".join(user.got))) == {user.secret}
        assert user.events["answer"] == 3
        assert user.events.keys() >= {"agent_started", "tool_executing", "tool_completed", "agent_completed"}
    wait_until(lambda: door.get("/seen").json()["busy"] == 0, "every run and thread has ended")
    seen = door.get("/seen").json()
    assert SECRET.findall("".join(seen["records"] + seen["spans"])) == []
    assert seen["late"] == []
    told = Counter((run["user"], run["request"], run["phase"]) for run in seen["runs"])
    for (user, request, phase), count in told.items():
        if phase == "agent_started":
            ends = told[(user, request, "agent_completed")] + told[(user, request, "agent_failed")]
            assert (count, ends) == (1, 1)
        if phase == "tool_executing":
            assert told[(user, request, "tool_completed")] == count
    assert {user for user, _, _ in told} == set(USERS)
    whose = {(run["request"], run["user"]) for run in seen["runs"]}
    assert len({request for request, _ in whose}) == len(whose)  # no request is two users'
    spans = [json.loads(span)["name"] for span in seen["spans"]]
    assert spans.count("invoke_agent slow") == len(USERS)


async def read_another_s(server: Server, prefix: str) -> tuple[User, User, httpx.Response]:
    async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
        alice, bob = User(server, "alice", http), User(server, "bob", http)
        _, answer = await asyncio.gather(
            alice.get(f"{prefix}/publish", name=prefix + "hers"), bob.get(f"{prefix}/read", name=prefix + "hers")
        )
    return alice, bob, answer


def test_a_stream_of_another_s_is_not_read(server: Server) -> None:
    alice, bob, answer = asyncio.run(read_another_s(server, ""))
    assert answer.status_code == 403
    assert SECRET.findall(answer.text) == []
    assert alice.got == ['"read"']
    assert len(bob.got) == 1


def test_bare_a_stream_runs_as_whoever_reads_it(server: Server) -> None:
    alice, bob, answer = asyncio.run(read_another_s(server, "/bare"))
    assert answer.json() == [[alice.secret, bob.secret]] * 12


def test_bare_an_agent_remembers_what_others_asked(server: Server) -> None:
    async def ask_both() -> tuple[User, httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
            alice, bob = User(server, "alice", http), User(server, "bob", http)
            await alice.get("/bare/ask")
            return alice, await bob.get("/bare/ask")

    alice, answer = asyncio.run(ask_both())
    assert alice.secret in answer.json()["memory"]
