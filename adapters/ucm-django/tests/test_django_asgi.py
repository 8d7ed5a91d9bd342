"""The project on a real server: many users at once, on few connections, and requests that are cut off."""

import asyncio
import json
from collections.abc import Generator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from django_project import ENGINE, PLAIN, database_settings, seed
from support.postgres import Database
from support.waiting import wait_until
from ucm_middleware.testing import Server, start_server

FEW: dict[str, Any] = {
    "pool of one": {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1}}},
    "pool of three": {"OPTIONS": {"pool": {"min_size": 1, "max_size": 3}}},
    "persistent": {"CONN_MAX_AGE": None},
}


@contextmanager
def serving(database: Database, settings: dict[str, Any] | None = None, **more: Any) -> Generator[Server]:
    options = more.pop("middleware", {})
    below = more.pop("below", False)
    env = {
        "NOTEBOOK_DATABASES": json.dumps({"default": database_settings(database.app, **more)}),
        "NOTEBOOK_SETTINGS": json.dumps(settings or {}),
        "NOTEBOOK_OPTIONS": json.dumps(options),
        **({"NOTEBOOK_IS_BELOW": "yes"} if below else {}),
    }
    # Else a connection that was idle for five seconds may be closed just as it is used again.
    patient = ("--timeout-keep-alive", "60")
    with start_server("django_notebook:app", app_dir=Path(__file__).parent, env=env, options=patient) as server:
        yield server


def get(server: Server, path: str, user: str) -> Any:
    response = httpx.get(f"{server.url}/{path}", headers={"user": user})
    assert response.status_code == 200, response.text
    return response.json()


def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.superuser.dsn) as admin:
        return admin.execute(query.encode()).fetchall()


@pytest.mark.parametrize("few", ["pool of one", "persistent"])
@pytest.mark.parametrize("engine", [PLAIN, ENGINE])
def test_what_is_left_on_a_connection(database: Database, engine: str, few: str) -> None:
    """Without the adapter the next request is alice's, to the database; with it, it is bob's own."""
    seed(database, "alice", "bob")
    # Under ASGI, persistent connections are shared where requests share threads.
    suffix = "_in_shared_thread" if few == "persistent" else ""
    settings = {"UCM_UNBOUND_DATABASES": ["default"] if engine == PLAIN else []}
    with serving(database, settings, ENGINE=engine, **FEW[few]) as server:
        get(server, f"set{suffix}", "alice")
        left = get(server, f"left{suffix}", "bob")
    if engine == PLAIN:
        assert (left["setting"], left["table"], left["owners"]) == ("alice", "left_behind", ["alice"])
    else:
        assert (left["setting"], left["table"], left["owners"]) == ("bob", None, ["bob"])


@pytest.mark.parametrize("few", list(FEW))
async def test_fifty_users_at_once(database: Database, few: str) -> None:
    users = [f"user{number}" for number in range(50)]
    seed(database, "victim", *users)
    seen_by = ("orm", "after a savepoint", "locked", "raw", "two statements", "iterator", "iterator in atomic", "copy")
    ways = (*seen_by, "retry", "on_commit")

    async def use(client: httpx.AsyncClient, user: str, path: str) -> None:
        response = await client.get(path, headers={"user": user})
        assert response.status_code == 200, response.text
        seen = response.json()
        assert {way: seen[way] for way in ways} == {way: [user] for way in ways}
        assert (seen["context"], seen["forged"]) == (user, "ProgrammingError")
        assert (seen["updated"], seen["deleted"]) == (0, 0)
        for path in ("streaming", "astreaming"):
            response = await client.get(path, headers={"user": user})
            assert set(response.text.split()) == {f"{user}:{user}"}, response.text
        for path in ("listing", "alisting"):
            seen = (await client.get(path, headers={"user": user})).json()
            assert seen["user"] == user
            assert seen["notes"][0] == f"secret of {user}"
            assert len(seen["notes"]) == 7, seen

    # A pool that is waited for longer than 30 seconds gives up.
    with serving(database, **FEW[few]) as server:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            await asyncio.gather(
                *(use(client, user, path) for user, path in zip(users, cycle(["everything", "aeverything"])))
            )
    assert rows(database, "select body from notes where user_id = 'victim'") == [("secret of victim",)]
    assert rows(database, "select count(*) from notes where body like '%of %' and body not like '%of ' || user_id") == [
        (0,)
    ]
    assert rows(database, "select count(distinct user_id), count(*) from notes") == [(51, 50 * 7 + 1)]


@pytest.mark.parametrize("how", ["disconnected", "expired"])
def test_a_request_that_is_cut_off_leaves_nothing(database: Database, how: str) -> None:
    options = {"cancel_on_disconnect": True} if how == "disconnected" else {"ttl": 2.0}
    with (
        serving(database, middleware=options, **FEW["pool of one"]) as server,
        psycopg.connect(database.superuser.dsn, autocommit=True) as admin,
    ):

        def waiting() -> bool:
            found = admin.execute("select count(*) from pg_locks where locktype = 'advisory' and not granted")
            return found.fetchone() == (1,)

        admin.execute("select pg_advisory_lock(42)")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if how == "disconnected":
                client.timeout = httpx.Timeout(60, read=2)
                with pytest.raises(httpx.ReadTimeout):
                    client.get("slow", headers={"user": "alice"})
            else:
                assert client.get("slow", headers={"user": "alice"}).status_code == 504
        wait_until(lambda: not waiting(), "the statement is cancelled")
        # The pool has one connection: it came back, and is in no transaction of alice's.
        assert get(server, "listing", "bob") == {"user": "bob", "notes": []}
        assert get(server, "left", "alice")["owners"] == []
    assert rows(database, "select * from notes") == []


@pytest.mark.parametrize("below", [False, True], ids=["Django alone", "below BaseHTTPMiddleware"])
@pytest.mark.parametrize("view", ["waiting", "ticking"])
def test_a_view_that_is_cut_off_ends_before_anything_is_released(database: Database, view: str, below: bool) -> None:
    """Django runs it in a task of its own, and leaves that to itself."""
    with serving(database, middleware={"ttl": 2.0}, below=below) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if view == "waiting":
                assert client.get(view, headers={"user": "alice"}).status_code == 504
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    client.get(view, headers={"user": "alice"})
        assert get(server, "ordered", "bob")["order"] == ["ended", "released"]
        server.stop()
        assert "Task exception was never retrieved" not in server.output
