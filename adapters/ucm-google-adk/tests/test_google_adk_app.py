"""On a real server: requests of fifty users at once, and their events."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from secrets import token_hex

import httpx
import pytest
from websockets.asyncio.client import connect

from support.postgres import Database
from ucm_middleware.testing import Server
from ucm_middleware.testing.server import run_server

USERS = [f"user-{number}" for number in range(50)]
HERE = Path(__file__).parent


@pytest.fixture(params=["guarded", "bare"], scope="module")
def chat(
    request: pytest.FixtureRequest, shared_database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if request.param == "bare":
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('bare') / 'chat.db'}"
    else:
        url = shared_database.owner.url("postgresql+asyncpg")
    env = {
        "ADK_APP": request.param,
        "ADK_DATABASE": url,
        "PYTHONPATH": str(HERE),
        "UCM_SECRET": token_hex(32),
        "UCM_ENVIRONMENT": "testing",
    }
    with run_server("uvicorn", lambda port: ["adk_server", str(port)], app_dir=HERE / "apps", env=env) as server:
        yield server


@pytest.fixture
async def client(chat: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(base_url=chat.url, limits=limits, timeout=60) as made:
        yield made


@pytest.mark.parametrize("chat", ["guarded"], indirect=True)
async def test_fifty_users_talk_at_once(chat: Server, client: httpx.AsyncClient) -> None:
    async def talk(user: str, times: int) -> None:
        for number in range(1, times + 1):
            said = {"message": f"<secret {number} of {user}>"}
            answer = (await client.post("/chat/chat", params=said, headers={"user": user})).json()
            assert answer["user"] == user
            assert answer["text"] == "I have it"
            assert [other for other in USERS if other != user and f" of {other}>" in answer["asked"]] == []
            assert f"<secret 1 of {user}>" in answer["asked"]
            assert answer["asked"].count(f"{user} in chat") >= number

    async def follow(user: str) -> None:
        async with connect(f"{chat.ws_url}/events", additional_headers={"user": user}, open_timeout=60) as socket:
            talking = asyncio.create_task(talk(user, 2))
            seen = [json.loads(await socket.recv()) for _ in range(12)]  # six for each run
            await talking
        assert {event["data"]["agent"] for event in seen} == {"chat"}
        assert [event["type"] for event in seen].count("agent_completed") == 2

    followed, others = USERS[:10], USERS[10:]
    await asyncio.gather(*map(follow, followed), *(talk(user, 1) for user in others))


@pytest.mark.parametrize("chat", ["guarded", "bare"], indirect=True)
async def test_an_endpoint_that_believes_its_client(
    chat: Server, client: httpx.AsyncClient, request: pytest.FixtureRequest
) -> None:
    said = {"message": "<secret of alice>"}
    hers = await client.post("/direct/mine", params=said, headers={"user": "alice", "claims": "alice"})
    assert hers.status_code == 200
    stolen = await client.post(
        "/direct/mine", params={"message": "and?"}, headers={"user": "mallory", "claims": "alice"}
    )
    if "bare" in request.node.name:
        assert "<secret of alice>" in stolen.json()["asked"]
    else:
        assert stolen.status_code == 403
        own = await client.post(
            "/direct/mine", params={"message": "and?"}, headers={"user": "mallory", "claims": "mallory"}
        )
        assert own.status_code == 200
        assert "alice" not in own.text
    nobody = await client.post("/direct/mine", params=said, headers={"claims": "alice"})
    assert nobody.status_code == (200 if "bare" in request.node.name else 403)
