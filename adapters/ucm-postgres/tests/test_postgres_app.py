"""Through a real server: requests of many users, on keep-alive connections, never get at each other's rows."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import psycopg
import pytest

from postgres_drivers import DRIVERS
from support.postgres import Database
from ucm_middleware.testing.server import Server, start_server

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=DRIVERS)
def server(request: pytest.FixtureRequest, module_database: Database) -> Iterator[Server]:
    env = {
        "UCM_TEST_DRIVER": request.param,
        "UCM_TEST_LOGIN": json.dumps(asdict(module_database.app)),
        "PYTHONPATH": f"{HERE}:{HERE.parents[2] / 'tests'}",
    }
    with start_server("postgres_app:app", kind="uvicorn", app_dir=HERE / "apps", env=env) as server:
        yield server


@pytest.fixture
async def client(server: Server, emptied: Database) -> AsyncIterator[httpx.AsyncClient]:
    # A few connections for all users: each serves one user after another.
    limits = httpx.Limits(max_connections=4)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client:
        yield client


def as_(user: str) -> dict[str, str]:
    return {"x-test-user": user}


async def test_fifty_users_get_their_own_rows(client: httpx.AsyncClient) -> None:
    async def one(user: str, where: str) -> None:
        for number in range(3):
            assert (await client.post(f"{where}/{user}.{number}", headers=as_(user))).status_code == 200
            assert (await client.post("/notes/refused", headers=as_(user))).status_code == 418
            found = (await client.get("/notes", headers=as_(user))).json()
            assert found == [[user, f"{user}.{past}"] for past in range(number + 1)]
            assert (await client.get("/threads/notes", headers=as_(user))).json() == found

    await asyncio.gather(*(one(f"user{n}", "/threads/notes" if n % 2 else "/notes") for n in range(50)))


async def test_nobody_gets_nothing(client: httpx.AsyncClient) -> None:
    await client.post("/notes/milk", headers=as_("alice"))
    for path in ("/notes", "/threads/notes"):
        assert (await client.get(path)).status_code == 401


async def test_the_leak_is_there_for_requests_that_are_not_bound(client: httpx.AsyncClient) -> None:
    await client.post("/notes/milk", headers=as_("alice"))
    await client.post("/unbound/user/alice", headers=as_("alice"))
    assert (await client.get("/unbound/notes", headers=as_("bob"))).json() == [["alice", "milk"]]
    assert (await client.get("/notes", headers=as_("bob"))).json() == []


async def test_a_client_that_goes_away_leaves_nothing_behind(
    client: httpx.AsyncClient, module_database: Database
) -> None:
    for _ in range(3):  # the pool has two connections
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/slow", headers=as_("alice"), timeout=0.3)
    assert (await client.get("/notes", headers=as_("bob"), timeout=30)).json() == []
    with psycopg.connect(module_database.superuser.dsn) as connection:
        assert connection.execute("select count(*) from notes").fetchone() == (0,)
