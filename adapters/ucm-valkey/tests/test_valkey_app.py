"""An application on a real server, fifty users at once, whose caches share a few connections."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from support.valkey import ADMIN, GATE, LIBRARIES, SECRET, ValkeyServer
from ucm_middleware.testing import Server, start_server

USERS = [f"user-{number}" for number in range(46)] + ["*", "a:b", "[a]", "?"]


KINDS = [(mode, *given) for mode in ("prefixes", "server users") for given in ((LIBRARIES[0], 1), (LIBRARIES[1], 3))]


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(map(str, kind)), scope="module")
def shop(request: pytest.FixtureRequest, valkey_process: ValkeyServer) -> Iterator[Server]:
    mode, library, connections = request.param
    env = {
        "SHOP_LIBRARY": library,
        "SHOP_CONNECTIONS": str(connections),
        "SHOP_VALKEY_PORT": str(valkey_process.port),
        "SHOP_MODE": mode,
        "SHOP_ADMIN": ADMIN,
        "SHOP_GATE": GATE,
        "UCM_SECRET": SECRET,
    }
    with start_server("valkey_app:app", app_dir=Path(__file__).parent / "apps", env=env) as server:
        yield server


@pytest.fixture
async def client(shop: Server, valkey_server: ValkeyServer) -> AsyncIterator[httpx.AsyncClient]:
    # Fewer connections than users, so that each serves one after another.
    limits = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(base_url=shop.url, limits=limits, timeout=30) as made:
        yield made


async def test_fifty_users_fill_their_baskets_at_once(client: httpx.AsyncClient) -> None:
    async def fill(user_id: str) -> None:
        for number in range(1, 5):
            answer = await client.post("/basket", content=f"{number} of {user_id}", headers={"user": user_id})
            assert answer.json() == {
                "user": user_id,
                "items": [f"{each} of {user_id}" for each in range(1, number + 1)],
            }
        answer = await client.get("/basket", headers={"user": user_id})
        assert sorted(answer.json()) == [f"{each} of {user_id}" for each in range(1, 5)]

    await asyncio.gather(*map(fill, USERS))


async def test_users_who_give_up_leave_nothing_to_others(
    client: httpx.AsyncClient, valkey_server: ValkeyServer
) -> None:
    """Some go away at any moment; the rest get what is theirs, and the few connections are not used up."""

    async def hurry(user_id: str, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await client.post("/basket", content=f"of {user_id}", headers={"user": user_id})
        except TimeoutError:
            return

    async def stay(user_id: str) -> None:
        for _ in range(3):
            answer = await client.post("/basket", content=f"of {user_id}", headers={"user": user_id})
            assert set(answer.json()["items"]) == {f"of {user_id}"}

    hurried = [hurry(user_id, number / 500) for number, user_id in enumerate(USERS)]
    await asyncio.gather(*hurried, *map(stay, USERS[:10]))
    await asyncio.gather(*map(stay, USERS))


async def test_who_has_no_user_has_no_cache_unless_it_is_for_that(
    client: httpx.AsyncClient, valkey_server: ValkeyServer
) -> None:
    assert (await client.get("/basket")).status_code == 401
    assert valkey_server.admin.keys("*") == []
    for _ in range(2):  # each request is somebody else
        answer = (await client.get("/visit")).json()
        assert answer["visits"] == 1
        assert 0 < answer["ttl"] <= 60
    for number in (1, 2):
        answer = (await client.get("/visit", headers={"user": "alice"})).json()
        assert answer["visits"] == number
        assert answer["ttl"] > 200


async def test_a_request_that_touches_no_cache_asks_the_server_nothing(
    client: httpx.AsyncClient, valkey_server: ValkeyServer
) -> None:
    before = valkey_server.admin.info("stats")["total_connections_received"]
    for user_id in USERS[:5]:
        assert (await client.get("/idle", headers={"user": user_id})).status_code == 200
    assert valkey_server.admin.info("stats")["total_connections_received"] == before
    assert not [each for each in valkey_server.admin.acl_users() if each.startswith("ucm_")]
