"""A chat on a real server, with fifty users who all call their conversation the same."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from ucm_middleware.testing import Server, start_server

USERS = [f"user-{number:02}" for number in range(50)]

_USER = re.compile(r"user-\d\d")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {
        "CHAT_FILE": str(tmp_path_factory.mktemp("chat") / "chat.db"),
        "UCM_SECRET": secrets.token_urlsafe(32),
    }
    with start_server("pydantic_ai_app:app", app_dir=Path(__file__).parent / "apps", env=env) as started:
        yield started


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    # Fewer connections than users, so that each serves one after another.
    async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=20), timeout=60) as made:
        yield made


def users_in(text: str) -> set[str]:
    return set(_USER.findall(text))


async def test_fifty_users_chat_at_once(client: httpx.AsyncClient) -> None:
    async def hurry(user_id: str) -> None:
        """Goes away in the middle of an answer."""
        asked = {"prompt": f"hurried secret of {user_id}"}
        async with client.stream("POST", "/stream", json=asked, headers={"user": user_id}) as answer:
            async for chunk in answer.aiter_text():
                assert users_in(chunk) <= {user_id}
                return

    async def chat(user_id: str) -> None:
        for turn in range(3):
            path = "/stream" if turn == 1 else "/chat"
            asked = {"prompt": f"secret {turn} of {user_id}"}
            answer = await client.post(path, json=asked, headers={"user": user_id})
            assert answer.status_code == 200
            assert users_in(answer.text) == {user_id}
            assert f"secret {turn} of {user_id}" in answer.text
            assert f"loop of {user_id}" in answer.text
            assert f"thread of {user_id}" in answer.text
        history = (await client.get("/history", headers={"user": user_id})).json()
        assert users_in(str(history)) == {user_id}
        kept = [line for line in history if not line.startswith("hurried")]
        assert kept == [f"secret {turn} of {user_id}" for turn in range(3)]

    await asyncio.gather(*map(chat, USERS), *map(hurry, USERS[::5]))


async def test_who_has_no_user_has_no_conversation_of_anybody_s(client: httpx.AsyncClient) -> None:
    await client.post("/chat", json={"prompt": "secret of user-99"}, headers={"user": "user-99"})
    assert (await client.get("/history")).json() == []
    assert (await client.get("/history", headers={"user": "user-98"})).json() == []
