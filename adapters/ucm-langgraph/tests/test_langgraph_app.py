"""An application on a real server, fifty users at once, whose threads are all called the same."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from langgraph_agents import USERS, others_in, secret_of
from support.waiting import wait_until
from ucm_middleware.testing import Server, start_server

pytestmark = pytest.mark.timeout(120)  # with the start of the server

SECRET = "a secret for the tests of LangGraph: 0123456789"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"CHAT_FOLDER": str(tmp_path_factory.mktemp("chat")), "UCM_SECRET": SECRET}
    # Importing all that LangGraph imports takes its time on a busy machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ucm_middleware.testing.server.wait_until", partial(wait_until, timeout=60))
        with start_server("langgraph_app:app", app_dir=Path(__file__).parent / "apps", env=env) as server:
            yield server


@pytest.fixture
async def client(chat: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(base_url=chat.url, limits=limits, timeout=60) as made:
        yield made


async def post(client: httpx.AsyncClient, user_id: str, path: str, text: str) -> str:
    answer = await client.post(path, content=text, headers={"user": user_id})
    assert answer.status_code == 200, answer.text
    return answer.text


async def test_without_the_adapter_the_second_user_reads_the_first(client: httpx.AsyncClient) -> None:
    await post(client, "user-0", "/bare/trip-1", secret_of("user-0"))
    assert secret_of("user-0") in await post(client, "user-1", "/bare/trip-1", "what was said?")


async def test_fifty_users_in_threads_of_one_name(client: httpx.AsyncClient) -> None:
    async def talk(user_id: str) -> None:
        for path in random.sample(["/run/trip-1", "/direct/trip-1", "/stream/trip-1"], 3):
            answer = await post(client, user_id, path, f"use look: {secret_of(user_id)}")
            assert f"{secret_of(user_id)} in a thread" in answer
            assert not others_in(answer, user_id)
        state = await client.get("/state/trip-1", headers={"user": user_id})
        assert state.text.count(f"it said: {secret_of(user_id)}") == 3
        assert not others_in(state.text, user_id)

    async def give_up(user_id: str, patience: float) -> None:
        text = f"use look: {secret_of(user_id)}"
        try:
            async with asyncio.timeout(patience):
                await client.post("/stream/trip-2", content=text, headers={"user": user_id})
        except TimeoutError:
            return

    hurried = [give_up(user_id, number / 200) for number, user_id in enumerate(USERS[:20])]
    await asyncio.gather(*hurried, *map(talk, USERS))
    asked = (await client.get("/asked", headers={"user": "user-0"})).json()
    assert set(asked) == set(USERS)
    assert not any(asked.values())


async def test_each_request_without_a_user_is_somebody_else(client: httpx.AsyncClient) -> None:
    for path in ("/run/trip-1", "/direct/trip-1"):
        for _ in range(2):
            answer = await client.post(path, content="hello")
            assert answer.json() == "hello | you said: hello"
