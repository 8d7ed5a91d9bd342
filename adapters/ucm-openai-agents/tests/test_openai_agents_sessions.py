"""Sessions of the SDK's, each kind on its real store: whose they are, what other users find, and keys that changed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, OpenAIConversationsSession, Runner, SessionSettings, SQLiteSession
from agents.extensions.memory import AdvancedSQLiteSession, AsyncSQLiteSession, EncryptedSession, SQLAlchemySession
from agents.memory import OpenAIResponsesCompactionSession, Session
from offline_model import OfflineModel
from offline_team import SECRET
from openai import AsyncOpenAI
from sqlalchemy.ext.asyncio import create_async_engine

from support.postgres import Database
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
    current_context,
    managed_user_context,
)
from ucm_openai_agents import OpenAIAgents, OwnedSessions, guard_agent
from ucm_openai_agents.sessions import AnySession

LATER = "q3Yb0vTzW1x5nK8sLcR7dHjE2uF9aG4iQo6tVyXkMmP"

KINDS = [
    "sqlite",
    "async sqlite",
    "advanced sqlite",
    "encrypted",
    "compacting",
    "sqlalchemy on sqlite",
    "sqlalchemy on postgres",
]
Make = Callable[[str], AnySession]


@pytest.fixture(params=KINDS)
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """What makes a session of this kind, for a key."""
    path = tmp_path / "sessions.db"

    def encrypted(key: str) -> AnySession:
        inner = SQLiteSession(key, path)
        return EncryptedSession(session_id=key, underlying_session=inner, encryption_key="a master key of the app's")

    def compacting(key: str) -> AnySession:
        client = AsyncOpenAI(api_key="unused")
        inner = AsyncSQLiteSession(key, path)
        return OpenAIResponsesCompactionSession(key, inner, client=client, should_trigger_compaction=lambda _: False)

    simple: dict[str, Make] = {
        "sqlite": lambda key: SQLiteSession(key, path),
        "async sqlite": lambda key: AsyncSQLiteSession(key, path),
        "advanced sqlite": lambda key: AdvancedSQLiteSession(session_id=key, db_path=path, create_tables=True),
        "encrypted": encrypted,
        "compacting": compacting,
    }
    if request.param in simple:
        yield simple[request.param]
        return
    if request.param == "sqlalchemy on sqlite":
        url = f"sqlite+aiosqlite:///{path}"
    else:
        database: Database = request.getfixturevalue("database")
        url = database.owner.url("postgresql+asyncpg")
    engine = create_async_engine(url)
    yield lambda key: SQLAlchemySession(key, engine=engine, create_tables=True)
    await engine.dispose()


def manager_of(make: Make | OwnedSessions[Any], secret: str = SECRET, **settings: Any) -> UserContextManager:
    """One with an agent that says what it was told before."""
    agent = Agent[Any]("front", model=OfflineModel())
    manager = UserContextManager(plugins=[OpenAIAgents(sessions=make)], secret=secret, **settings)
    manager.register_agent("front", lambda _: agent, stateless=True)
    return manager


async def said(manager: UserContextManager, user: str, text: str, session_id: str = "chat") -> list[str]:
    """Say something in a conversation; returns all that the model was shown of the user's."""
    given = {"input": f"say ok to {text}", "session_id": session_id}
    result = await manager.execute_with_agent(user, "front", given)
    items = result.to_input_list()
    return [item["content"].removeprefix("say ok to ") for item in items if item.get("role") == "user"]


async def as_user(manager: UserContextManager, user: str, work: Callable[[], Any]) -> Any:
    """What work comes to in a context of the user's."""

    async def inside() -> Any:
        async with managed_user_context(manager.create_isolated_context(user)):
            return await work()

    return await asyncio.create_task(inside())


async def test_a_conversation_goes_on_for_its_user_and_no_other(make: Make) -> None:
    manager = manager_of(make)
    assert await said(manager, "alice", "the code is 1234") == ["the code is 1234"]
    for user in ("bob", "alice:chat", "ALICE"):
        assert await said(manager, user, "what is the code") == ["what is the code"]
    assert await said(manager, "alice", "and now", "other") == ["and now"]
    assert await said(manager, "alice", "what is the code") == ["the code is 1234", "what is the code"]


async def test_whoever_knows_another_user_s_very_key_gets_nothing_by_it(make: Make) -> None:
    manager = manager_of(make)
    await said(manager, "alice", "the code is 1234")
    key = manager.create_isolated_context("alice").derive_key("openai_agents_session", "chat")
    assert await said(manager, "bob", "what is the code", key) == ["what is the code"]


async def test_bare_whoever_names_a_conversation_has_it(make: Make) -> None:
    agent = Agent[Any]("front", model=OfflineModel())
    for text in ("say ok to the code is 1234", "say ok to what is the code"):
        session = make("chat")
        result = await Runner.run(agent, text, session=session)
        inner: Any = getattr(session, "underlying_session", session)
        ended = inner.close() if hasattr(inner, "close") else None
        if asyncio.iscoroutine(ended):
            await ended
    assert "1234" in json.dumps(result.to_input_list())


async def test_apps_that_call_the_runner_themselves_open_sessions_of_the_running_user_s(make: Make) -> None:
    sessions = OwnedSessions(make)
    manager = UserContextManager(secret=SECRET)
    agent = guard_agent(Agent[Any]("front", model=OfflineModel()))

    async def ask(text: str) -> str:
        session = await sessions.open("chat")
        result = await Runner.run(agent, f"say {text}", context=current_context(), session=session)
        return json.dumps(result.to_input_list())

    await as_user(manager, "alice", lambda: ask("the code is 1234"))
    assert "1234" not in await as_user(manager, "bob", lambda: ask("hello"))
    assert "1234" in await as_user(manager, "alice", lambda: ask("hello"))


async def test_a_session_works_for_its_user_until_the_context_closes(make: Make) -> None:
    sessions = OwnedSessions(make)
    manager = UserContextManager(secret=SECRET)
    context = manager.create_isolated_context("alice")
    async with managed_user_context(context):
        session = await sessions.open("chat")
        assert isinstance(session, Session)
        await session.add_items([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
        assert await session.pop_item() == {"role": "user", "content": "two"}

        async def steal_as_bob() -> None:
            for name in ("get_items", "clear_session", "pop_item"):
                with pytest.raises(CrossUserAccessError):
                    await getattr(session, name)()
            with pytest.raises(CrossUserAccessError):
                await session.add_items([{"role": "user", "content": "forged"}])

        await as_user_elsewhere(manager, "bob", steal_as_bob)
        assert await session.get_items() == [{"role": "user", "content": "one"}]
    with pytest.raises(ContextClosedError):
        await session.get_items()


async def as_user_elsewhere(manager: UserContextManager, user: str, work: Callable[[], Any]) -> None:
    """The same as ``as_user`` where a context is open: another request's task, which inherits nothing."""
    loop = asyncio.get_running_loop()
    await Context().run(lambda: loop.create_task(as_user(manager, user, work)))


async def test_deleting_deletes_one_s_own(make: Make) -> None:
    sessions = OwnedSessions(make)
    manager = manager_of(sessions)
    for user in ("alice", "bob"):
        await said(manager, user, f"I am {user}")

    async def clear() -> None:
        await (await sessions.open("chat")).clear_session()

    await as_user(manager, "bob", clear)
    assert await said(manager, "alice", "still here") == ["I am alice", "still here"]
    assert await said(manager, "bob", "anew") == ["anew"]


async def test_after_a_rotation_conversations_move_to_the_key_under_the_new_secret(make: Make) -> None:
    await said(manager_of(make), "alice", "before")
    later = manager_of(make, LATER, previous_secrets=[SECRET])
    # At once, as of two tabs: moved once.
    given = {"input": "say ok", "session_id": "chat"}
    await asyncio.gather(*(later.execute_with_agent("alice", "front", given) for _ in range(2)))
    after = await said(later, "alice", "after")
    assert after == ["before", "say ok", "say ok", "after"]
    assert await said(later, "bob", "what") == ["what"]
    # Without the earlier secret nothing is missed any more, and under the earlier one nothing is left.
    assert (await said(manager_of(make, LATER), "alice", "later"))[0] == "before"
    assert await said(manager_of(make), "alice", "old") == ["old"]


async def test_what_an_earlier_process_still_writes_overwrites_nothing(make: Make) -> None:
    await said(manager_of(make), "alice", "before")
    later = manager_of(make, LATER, previous_secrets=[SECRET])
    await said(later, "alice", "moved")
    await said(manager_of(make), "alice", "by the earlier process")
    assert await said(later, "alice", "now") == ["before", "moved", "now"]


async def test_outside_of_a_context_there_is_no_session(make: Make) -> None:
    sessions = OwnedSessions(make)
    with pytest.raises(ContextNotFoundError):
        await sessions.open("chat")
    shared = sessions.of_each_user("chat")
    with pytest.raises(AttributeError, match="session_id"):
        shared.session_id = "chat"
    with pytest.raises(ContextNotFoundError):
        await shared.get_items()
    with pytest.raises(ContextNotFoundError):
        await Runner.run(Agent[Any]("front", model=OfflineModel()), "say hello", session=shared)


async def test_one_session_for_an_agent_that_is_a_tool_is_each_user_s_own(make: Make) -> None:
    model = OfflineModel()
    memory = OwnedSessions(make).of_each_user("helper")
    helper = Agent[Any]("helper", model=model)
    front = Agent[Any]("front", model=model, tools=[helper.as_tool("ask", "", session=memory)])
    manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
    manager.register_agent("front", lambda _: front, stateless=True)
    for user in ("alice", "bob", "alice"):
        await manager.execute_with_agent(user, "front", {"input": f"ask(input=say I am {user})"})
    of_helper = [text for text in model.seen if "ask(" not in text]
    assert [("I am alice" in text, "I am bob" in text) for text in of_helper] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert of_helper[-1].count("say I am alice") == 2
    opened: Any = vars(memory)["_opened"]
    assert opened == {}  # what it keeps for a run goes with it


async def test_a_session_is_closed_with_its_context_once() -> None:
    closed: list[str] = []

    class Counted(SQLiteSession):
        def close(self) -> None:
            closed.append(self.session_id)
            super().close()

    manager = manager_of(lambda key: Counted(key))
    await said(manager, "alice", "hello")
    assert len(closed) == 1
    kept: dict[str, Counted] = {}
    keeping = manager_of(OwnedSessions(lambda key: kept.setdefault(key, Counted(key)), close=False))
    await said(keeping, "alice", "one")
    assert await said(keeping, "alice", "two") == ["one", "two"]
    assert len(closed) == 1
    for session in kept.values():
        session.close()


async def test_settings_of_a_session_count_as_the_sdk_has_them(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    manager = manager_of(lambda key: SQLiteSession(key, path, session_settings=SessionSettings(limit=2)))
    for text in ("one", "two"):
        await said(manager, "alice", text)
    assert await said(manager, "alice", "three") == ["two", "three"]


@pytest.mark.parametrize("session_id", ["", " ", "a\x00b", "x" * 300])
async def test_bad_ids_are_refused(session_id: str) -> None:
    with pytest.raises(InvalidContextError, match="client_id"):
        await said(manager_of(SQLiteSession), "alice", "hello", session_id)


async def test_a_store_that_does_not_use_its_key_is_refused_before_anything_is_read() -> None:
    client = AsyncOpenAI(api_key="unused")
    wrong: list[Make] = [
        lambda key: SQLiteSession("chat"),
        lambda key: EncryptedSession(session_id=key, underlying_session=SQLiteSession("chat"), encryption_key="k"),
        lambda key: EncryptedSession(session_id="chat", underlying_session=SQLiteSession(key), encryption_key="k"),
        lambda key: OpenAIConversationsSession(openai_client=client),
        lambda key: OpenAIConversationsSession(openai_client=client, conversation_id="conv_1"),
    ]
    for make in wrong:
        with pytest.raises(ConfigurationError, match="does not use the key"):
            await said(manager_of(make), "alice", "hello")


def test_what_makes_no_sessions_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be a function from a key to a session, not a str"):
        OpenAIAgents(sessions="sessions.db")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def test_in_production_there_must_be_a_secret() -> None:
    manager = UserContextManager(plugins=[OpenAIAgents(sessions=SQLiteSession)])
    agent = Agent[Any]("front", model=OfflineModel())
    manager.register_agent("front", lambda _: agent, stateless=True)
    with pytest.raises(ConfigurationError, match="UCM_SECRET"):
        await manager.execute_with_agent("alice", "front", {"input": "say hi", "session_id": "chat"})
