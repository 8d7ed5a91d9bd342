"""FastAPI on a real uvicorn, fifty users at once on three connections."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sqlalchemy_notes import DRIVERS, write_notes
from support.postgres import Database
from ucm_middleware.testing import Server, start_server

APPS = Path(__file__).parent / "apps"


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(database: Database, driver: str) -> Iterator[Server]:
    env = {"TEST_DATABASE": database.app.url(f"postgresql+{driver}")}
    with start_server("sqlalchemy_app:app", app_dir=APPS, env=env) as server:
        yield server


def as_user(server: Server, user_id: str | None) -> httpx.AsyncClient:
    headers = {} if user_id is None else {"Authorization": f"Bearer {user_id}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=30)


async def test_without_the_adapter_anybody_may_be_the_user_before(database: Database, driver: str) -> None:
    write_notes(database, alice="a1")
    env = {"TEST_DATABASE": database.app.url(f"postgresql+{driver}")}
    with start_server("sqlalchemy_app_unbound:app", app_dir=APPS, env=env) as server:
        async with as_user(server, "alice") as alice, as_user(server, None) as nobody:
            await alice.post("/careless")
            assert (await nobody.get("/own")).json() == ["a1"]


async def test_fifty_users_at_once(server: Server) -> None:
    async def visit(user_id: str) -> None:
        async with as_user(server, user_id) as client:
            (await client.post("/notes", params={"body": f"{user_id}'s"})).raise_for_status()
            (await client.post("/careless")).raise_for_status()
            assert (await client.post("/notes-and-fail")).status_code == 409
            for path in ("/own", "/session", "/session-at-once"):
                assert (await client.get(path)).json() == [f"{user_id}'s"]

    await asyncio.gather(*(visit(f"user{i}") for i in range(50)))
    async with as_user(server, None) as nobody:
        assert (await nobody.get("/session")).status_code == 401
        assert (await nobody.get("/own")).status_code == 401


async def test_a_request_that_asks_for_nothing_opens_no_connection(server: Server) -> None:
    async with as_user(server, "alice") as client:
        assert (await client.get("/nothing")).json() == 0
        await client.get("/session")
        assert (await client.get("/nothing")).json() == 1
