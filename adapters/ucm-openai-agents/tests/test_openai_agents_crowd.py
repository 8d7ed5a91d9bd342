"""Fifty users at once, who all call their conversation the same: nobody's secret in anything of another's."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from agents import Runner, SQLiteSession
from agents.extensions.memory import SQLAlchemySession
from agents.memory import Session
from offline_team import EVERYTHING, SECRETS, Team, secret_of
from sqlalchemy.ext.asyncio import create_async_engine

from support.events import Client, connect
from support.postgres import Database
from support.tracing import Sdk, installed
from ucm_openai_agents import OpenAIAgents

USERS = [f"user-{number}" for number in range(48)] + ["*", "user-1:chat"]

Make = Callable[[str], Session]


class Store:
    """Where sessions are, and all that is in there."""

    def __init__(self, make: Make, rows: Callable[[], list[tuple[str, str]]], busy: list[str]) -> None:
        self.make = make
        self.rows = rows
        self.busy = busy
        """Who has every kind of tool called; the others have one. A server is asked by all, and what tools do is the
        same on each store.
        """


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    query = "select session_id, message_data from agent_messages order by id"
    if request.param == "sqlite":
        path = tmp_path / "sessions.db"
        SQLiteSession("first", path).close()  # the tables

        def rows() -> list[tuple[str, str]]:
            with closing(sqlite3.connect(path)) as connection:
                return connection.execute(query).fetchall()

        yield Store(lambda key: SQLiteSession(key, path), rows, USERS)
        return
    database: Database = request.getfixturevalue("database")
    engine = create_async_engine(database.owner.url("postgresql+asyncpg"), pool_size=10, max_overflow=0)
    await SQLAlchemySession("first", engine=engine, create_tables=True).get_items()

    def postgres_rows() -> list[tuple[str, str]]:
        with psycopg.connect(database.owner.dsn) as connection:
            return connection.execute(query).fetchall()

    yield Store(lambda key: SQLAlchemySession(key, engine=engine), postgres_rows, USERS[-7:])
    await engine.dispose()


def mixed(texts: list[str]) -> list[set[str]]:
    """Those of the texts that have secrets of more than one user."""
    return [found for text in texts if len(found := set(SECRETS.findall(text))) > 1]


def messages(user_id: str, what: str = EVERYTHING) -> list[str]:
    return [f"{what}; say {secret_of(user_id)}", f"say again {secret_of(user_id)}"]


@pytest.mark.timeout(240)  # it takes seconds, and on a busy machine many
async def test_nobody_sees_anything_of_another_s(store: Store) -> None:
    team = Team()
    manager = team.manager(OpenAIAgents(sessions=store.make))
    clients: dict[str, Client] = {}

    async def talk(user_id: str) -> None:
        for message in messages(user_id, EVERYTHING if user_id in store.busy else "recall()"):
            given = {"input": message, "session_id": "chat"}
            result = await manager.execute_with_agent(user_id, "front", given)
            assert set(SECRETS.findall(result.final_output)) == {user_id}

    with installed(Sdk()) as sdk:
        for user_id in USERS:
            _, clients[user_id], _ = connect(manager, user_id)
        await asyncio.gather(*map(talk, USERS))

    assert mixed(team.model.seen) == []
    assert sum(secret_of(USERS[-1]) in seen for seen in team.model.seen) > 5  # and it was there to be seen
    assert {user_id for _, user_id in team.called} == set(USERS)
    assert len(team.called) == len(USERS) + len(store.busy) * 5

    kept: dict[str, list[str]] = {}
    for key, message in store.rows():
        kept.setdefault(key, []).append(message)
    assert mixed(["".join(each) for each in kept.values()]) == []
    assert len(kept) == len(USERS)
    assert not [key for key in kept if "chat" in key or "user" in key]

    for user_id, client in clients.items():
        events = "".join(client.frames)
        assert set(SECRETS.findall(events)) == {user_id}
        runs = 4 if user_id in store.busy else 2
        assert events.count('"agent_started"') == events.count('"agent_completed"') == runs
        trail = manager.get_audit_trail(user_id)
        assert trail is not None
        assert SECRETS.findall(repr(trail)) == []
    assert SECRETS.findall(repr([(span.name, dict(span.attributes or {}), span.events) for span in sdk.spans])) == []
    assert len(sdk.named("invoke_agent helper")) == len(store.busy)


async def test_bare_everybody_is_in_the_conversation_of_that_name(store: Store) -> None:
    team = Team()

    async def talk(user_id: str) -> None:
        for message in messages(user_id):
            session = store.make("chat")
            try:
                await Runner.run(team.front, message, context=user_id, session=session)
            finally:
                if isinstance(session, SQLiteSession):
                    session.close()

    for user_id in USERS[:3]:  # one after another is enough
        await talk(user_id)
    assert {"user-0", "user-1", "user-2"} in mixed(team.model.seen)
    assert {key for key, _ in store.rows()} == {"chat"}
