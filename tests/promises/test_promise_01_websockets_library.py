"""Promises 1, 4 and 9 on servers of the websockets library, each a process of its own."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from support.library import client
from support.servers import HOST
from support.waiting import PATIENCE

APP = Path(__file__).parent / "apps" / "promise_library.py"

USERS = [f"user-{number}" for number in range(20)]
MESSAGES = 10


@pytest.fixture(params=["asyncio", "sync"])
def server(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(APP), request.param], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def talk(connection: ClientConnection, user: str, name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Send marks of this connection's own. Returns the answers, and the user's events that came meanwhile."""
    answers: list[dict[str, Any]] = []
    heard: list[Any] = []
    other = USERS[(USERS.index(user) + 1) % len(USERS)]
    for number in range(MESSAGES):
        await connection.send(json.dumps({"mark": f"{user} {name} {number}", "other": other}))
    while len(answers) < MESSAGES or len(heard) < 2 * MESSAGES:
        message = json.loads(await connection.recv())
        if "type" in message:
            assert message["user_id"] == user
            heard.append((message["sequence"], message["data"]))
        else:
            answers.append(message)
    return answers, heard


async def test_each_connection_has_its_own_context_and_its_users_events(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    url = f"ws://{HOST}:{(await asyncio.to_thread(server.stdout.readline)).strip()}"
    async with asyncio.timeout(4 * PATIENCE), AsyncExitStack() as connections:
        pairs = [(user, name) for user in USERS for name in ("a", "b")]
        opened = [await connections.enter_async_context(client(url, user)) for user, _ in pairs]
        for connection in opened:  # once the handler answers, the connection is one of its user's
            await connection.send("null")
            assert await connection.recv() == "here"
        results = await asyncio.gather(
            *(talk(connection, *pair) for connection, pair in zip(opened, pairs, strict=True))
        )
        requests: set[str] = set()
        for (user, name), (answers, heard) in zip(pairs, results, strict=True):
            assert {answer["user"] for answer in answers} == {user}
            marks = [f"{user} {name} {number}" for number in range(MESSAGES)]
            assert [answer["note"] for answer in answers] == ["nothing", *marks[:-1]]
            assert [answer["data"] for answer in answers] == [None, *marks[:-1]]
            assert {answer["other"] for answer in answers} == {"denied"}
            assert len({answer["request"] for answer in answers}) == 1
            requests.add(answers[0]["request"])
            assert [sequence for sequence, _ in heard] == list(range(1, 2 * MESSAGES + 1))
            assert [data for _, data in heard if data in marks] == marks
        assert len(requests) == len(pairs)

        server.terminate()
        for connection in opened:
            with pytest.raises(ConnectionClosed):
                await connection.recv()
            assert connection.close_code == 1013
    assert await asyncio.to_thread(server.wait, PATIENCE) == 0
