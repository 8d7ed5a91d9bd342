"""A chat on a real server, fifty users at once, who all call their conversation the same."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from offline_chat import chat_of, served
from offline_team import EVERYTHING, SECRETS, Team, secret_of

USERS = [f"user-{number}" for number in range(50)]


@dataclass
class Chat:
    """The team behind a server."""

    url: str
    team: Team

    def mixed(self) -> list[set[str]]:
        """What the model was shown that has secrets of more than one user."""
        return [found for text in self.team.model.seen if len(found := set(SECRETS.findall(text))) > 1]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    team = Team()
    with served(chat_of(team, tmp_path / "chat.db")) as url:
        yield Chat(url, team)


@pytest.fixture
async def client(chat: Chat) -> AsyncIterator[httpx.AsyncClient]:
    # Fewer connections than users, so that each serves one after another.
    limits = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(base_url=chat.url, limits=limits, timeout=50) as made:
        yield made


async def test_fifty_users_talk_at_once(chat: Chat, client: httpx.AsyncClient) -> None:
    async def talk(user: str) -> None:
        async def post(path: str, message: str) -> httpx.Response:
            answer = await client.post(path, json={"message": message}, headers={"user": user})
            assert set(SECRETS.findall(answer.text)) <= {user}
            return answer

        begin = EVERYTHING if user in USERS[:5] else "recall()"
        first = await post("/chat/chat", f"{begin}; say {secret_of(user)}")
        assert first.json()["said"] == secret_of(user)
        again = (await post("/direct/chat", "recall()")).json()
        assert again["said"] == f"done: {secret_of(user)}"
        assert again["history"].count(f"; say {secret_of(user)}") == 1  # the same conversation
        assert (await post("/stream/chat", "say bye")).text.splitlines()[-1] == "bye"

    await asyncio.gather(*map(talk, USERS))
    assert chat.mixed() == []
    assert {user for _, user in chat.team.called} == set(USERS)


async def test_bare_users_are_in_each_other_s_conversation(chat: Chat, client: httpx.AsyncClient) -> None:
    answers = [
        await client.post("/bare/chat", json={"message": f"say {secret_of(user)}"}, headers={"user": user})
        for user in USERS[:3]
    ]
    assert set(SECRETS.findall(answers[-1].text)) == set(USERS[:3])
    assert set(USERS[:3]) in chat.mixed()


async def test_users_who_go_away_in_the_middle_of_a_stream_leave_the_others_alone(
    chat: Chat, client: httpx.AsyncClient
) -> None:
    async def hurry(user: str) -> None:
        given = {"message": f"{EVERYTHING}; say {secret_of(user)}"}
        async with client.stream("POST", "/stream/hurried", json=given, headers={"user": user}) as answer:
            async for _ in answer.aiter_text():
                break

    async def stay(user: str) -> None:
        answer = await client.post("/chat/stay", json={"message": "recall()"}, headers={"user": user})
        assert set(SECRETS.findall(answer.text)) == {user}

    await asyncio.gather(*map(hurry, USERS[:10]), *map(stay, USERS[10:20]))
    await asyncio.gather(*map(stay, USERS[:10]))
    assert chat.mixed() == []


async def test_who_has_no_user_has_no_conversation_that_outlives_the_request(client: httpx.AsyncClient) -> None:
    for _ in range(2):  # each request is somebody else
        answer = await client.post("/chat/chat", json={"message": "say hello"})
        assert answer.json()["history"].count("say hello") == 1
