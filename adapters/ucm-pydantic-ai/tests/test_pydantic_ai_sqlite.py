"""SQLiteConversationStore: what any store of the framework's does, from several processes, without losing a turn."""

import asyncio
import os
import sqlite3
import stat
import sys
from pathlib import Path

import pytest
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationConflict
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart

from ucm_middleware import ConfigurationError
from ucm_pydantic_ai import SQLiteConversationStore


def said(*words: str) -> list[ModelMessage]:
    return [ModelRequest(parts=[UserPromptPart(word)]) for word in words]


def rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute(f"select count(*) from {table}").fetchone()
    connection.close()
    return int(number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"  # where the fixture's store is


async def test_it_is_there_after_a_restart(sqlite_store: SQLiteConversationStore, path: Path) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1", messages=said("one", "two")), scope="a")
    await sqlite_store.aclose()
    again = SQLiteConversationStore(path)
    loaded = await again.load("c1", scope="a")
    assert loaded is not None
    assert loaded.messages == said_again(loaded.messages, "one", "two")
    assert await again.load("c1", scope="b") is None
    await again.aclose()


def said_again(messages: list[ModelMessage], *words: str) -> list[ModelMessage]:
    assert [part.content for message in messages for part in message.parts if part.part_kind == "user-prompt"] == [
        *words
    ]
    return messages


async def test_each_message_is_stored_once(sqlite_store: SQLiteConversationStore, path: Path) -> None:
    conversation = Conversation(conversation_id="c1", messages=said("one"))
    for number in range(2, 6):
        await sqlite_store.save(conversation)
        conversation.messages.extend(said(str(number)))
    assert rows(path, "entries") == 4


async def test_the_last_messages_alone_can_be_loaded(sqlite_store: SQLiteConversationStore) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1", messages=said(*"abcdef")))
    loaded = await sqlite_store.load("c1", limit=2)
    assert loaded is not None
    said_again(loaded.messages, "e", "f")
    loaded.messages.extend(said("g"))
    await sqlite_store.save(loaded)
    whole = await sqlite_store.load("c1")
    assert whole is not None
    said_again(whole.messages, *"abcdefg")
    empty = await sqlite_store.load("c1", limit=0)
    assert empty is not None
    assert empty.messages == []


async def test_the_newest_are_listed_first(sqlite_store: SQLiteConversationStore) -> None:
    for name in ("c1", "c2", "c3"):
        await sqlite_store.save(Conversation(conversation_id=name), scope="a")
    await sqlite_store.save(Conversation(conversation_id="c4"), scope="b")
    listed = await sqlite_store.list_conversations(scope="a", limit=2)
    assert [record.conversation_id for record in listed] == ["c3", "c2"]
    assert len(await sqlite_store.list_conversations()) == 4


async def test_a_conversation_that_changed_meanwhile_is_not_overwritten(path: Path) -> None:
    first, second = SQLiteConversationStore(path), SQLiteConversationStore(path)
    await first.save(Conversation(conversation_id="c1", messages=said("one")))
    here, there = await first.load("c1"), await second.load("c1")
    assert here is not None
    assert there is not None
    here.messages.extend(said("here"))
    there.messages.extend(said("there"))
    await first.save(here)
    with pytest.raises(ConversationConflict):
        await second.save(there)
    with pytest.raises(ConversationConflict):
        await second.save(Conversation(conversation_id="c1"))
    with pytest.raises(ConversationConflict):
        await second.delete_record("c1", expected_revision="another")
    assert rows(path, "entries") == 2
    for store in (first, second):
        await store.aclose()


async def test_only_one_of_many_at_once_wins_each_time(path: Path) -> None:
    stores = [SQLiteConversationStore(path) for _ in range(5)]

    async def append(store: SQLiteConversationStore, word: str) -> None:
        while True:
            conversation = await store.load("c1") or Conversation(conversation_id="c1")
            conversation.messages.extend(said(word))
            try:
                await store.save(conversation)
            except ConversationConflict:
                continue
            return

    await asyncio.gather(*(append(store, f"{number} {turn}") for number, store in enumerate(stores) for turn in "ab"))
    loaded = await stores[0].load("c1")
    assert loaded is not None
    assert len(loaded.messages) == 10
    for store in stores:
        await store.aclose()


async def test_what_is_deleted_leaves_no_message_that_nobody_shares(
    sqlite_store: SQLiteConversationStore, path: Path
) -> None:
    conversation = Conversation(conversation_id="c1", messages=said("one", "two", "three"))
    await sqlite_store.save(conversation)
    branched = await sqlite_store.branch("c1", at=1, expected_revision=conversation.revision)
    branched.messages.extend(said("four"))
    await sqlite_store.save(branched)
    fork = await sqlite_store.fork("c1", at=1, new_conversation_id="c2")
    assert rows(path, "entries") == 4
    await sqlite_store.delete("c1")
    assert rows(path, "entries") == 1
    said_again((await sqlite_store.load("c2") or fork).messages, "one")
    await sqlite_store.delete("c2")
    assert rows(path, "entries") == rows(path, "tips") == rows(path, "conversations") == 0


async def test_what_another_conversation_goes_on_from_stays(sqlite_store: SQLiteConversationStore, path: Path) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1", messages=said("one", "two")))
    fork = await sqlite_store.fork("c1", at=1, new_conversation_id="c2")
    fork.messages.extend(said("other"))
    await sqlite_store.save(fork)
    await sqlite_store.delete("c1")
    loaded = await sqlite_store.load("c2")
    assert loaded is not None
    said_again(loaded.messages, "one", "other")
    assert rows(path, "entries") == 2


async def test_a_fork_of_what_was_deleted_meanwhile_is_refused(sqlite_store: SQLiteConversationStore) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1", messages=said("one")))
    record = await sqlite_store.read_record("c1")
    assert record is not None
    await sqlite_store.delete("c1")
    record.conversation_id = "c2"
    with pytest.raises(ConversationConflict):
        await sqlite_store.write_record(record, expected_revision=None)
    with pytest.raises(KeyError):
        await sqlite_store.read_history(record.head_id)
    with pytest.raises(KeyError):
        await sqlite_store.read_entry(record.head_id or "")


async def test_the_file_is_for_its_owner_alone(sqlite_store: SQLiteConversationStore, path: Path) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1"))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_in_a_forked_process_it_is_refused(sqlite_store: SQLiteConversationStore) -> None:
    await sqlite_store.save(Conversation(conversation_id="c1"))
    pid = os.getpid()
    sqlite_store._pid = pid + 1  # as it looks there
    with pytest.raises(ConfigurationError, match="make one in each worker"):
        await sqlite_store.load("c1")
    sqlite_store._pid = pid


_KILLED = """
import asyncio, os, sys
from pydantic_ai.conversation import Conversation
from pydantic_ai.messages import ModelRequest, UserPromptPart
from ucm_pydantic_ai import SQLiteConversationStore
async def main():
    store = SQLiteConversationStore(sys.argv[1])
    await store.save(Conversation(conversation_id="c1", messages=[ModelRequest(parts=[UserPromptPart("one")])]))
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


async def test_what_was_saved_survives_the_process(sqlite_store: SQLiteConversationStore, path: Path) -> None:
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", _KILLED, str(path))
    assert await ended.wait() == -9
    loaded = await sqlite_store.load("c1")
    assert loaded is not None
    said_again(loaded.messages, "one")


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match="InMemoryConversationStore"):
        SQLiteConversationStore(path)


async def test_the_file_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = SQLiteConversationStore("here.db")
    monkeypatch.chdir("elsewhere")
    assert await store.load("c1") is None
    await store.aclose()
    assert (tmp_path / "here.db").exists()
