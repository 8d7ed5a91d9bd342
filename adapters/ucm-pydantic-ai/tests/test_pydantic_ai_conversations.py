"""UserConversations: what one user called a conversation is nothing to another, in any store of the framework's."""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
    InMemoryConversationStore,
)
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart

from ucm_middleware import (
    ContextNotFoundError,
    CrossUserAccessError,
    InvalidContextError,
    UserContextManager,
    managed_user_context,
)
from ucm_pydantic_ai import SQLiteConversationStore, UserConversations

OLD, NEW = secrets.token_bytes(32), secrets.token_bytes(32)


def said(text: str) -> ModelMessage:
    return ModelRequest(parts=[UserPromptPart(text)])


def texts(conversation: Conversation | None) -> list[object]:
    assert conversation is not None
    return [part.content for message in conversation.messages for part in message.parts]  # type: ignore[union-attr]


@pytest.fixture(params=["memory", "sqlite"])
def inner(request: pytest.FixtureRequest) -> ConversationStore:
    if request.param == "memory":
        return InMemoryConversationStore()
    store: ConversationStore = request.getfixturevalue("sqlite_store")
    return store


@pytest.fixture
def conversations(inner: ConversationStore) -> UserConversations:
    return UserConversations(inner)


async def test_bare_whoever_names_the_conversation_gets_it(inner: ConversationStore) -> None:
    await inner.save(Conversation(conversation_id="c1", messages=[said("alice's secret")]))
    assert texts(await inner.load("c1")) == ["alice's secret"]  # whoever asks: this is what the adapter is there for


async def test_a_user_gets_back_what_the_user_saved(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("one")]))
    async with managed_user_context(manager.create_isolated_context("alice")):
        conversation = await conversations.load("c1")
        assert conversation is not None
        assert conversation.conversation_id == "c1"
        conversation.messages.append(said("two"))
        (entry,) = await conversations.save(conversation)
        assert (await conversations.read_entry(entry.id)).message == entry.message
        assert texts(await conversations.load("c1")) == ["one", "two"]
        assert [record.conversation_id for record in await conversations.list_conversations()] == ["c1"]


async def test_another_user_finds_nothing_under_the_same_names(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        entries = await conversations.save(Conversation(conversation_id="c1", messages=[said("alice's secret")]))
        theirs = await conversations.load("c1")
        assert theirs is not None
    async with managed_user_context(manager.create_isolated_context("bob")):
        assert await conversations.load("c1") is None
        assert await conversations.load_entries("c1") is None
        assert await conversations.list_conversations() == []
        for entry in entries:
            with pytest.raises(KeyError):
                await conversations.read_entry(entry.id)
            with pytest.raises(KeyError):
                await conversations.read_history(entry.id)
        await conversations.delete("c1")
        with pytest.raises(UserError, match="not in the store"):
            await conversations.fork("c1")
        with pytest.raises(UserError, match="not in the store"):
            await conversations.branch("c1", at=0, expected_revision=theirs.revision)
        with pytest.raises(ConversationConflict):
            await conversations.save(theirs)  # with alice's revision
        await conversations.save(Conversation(conversation_id="c1", messages=[said("bob's own")]))
        assert texts(await conversations.load("c1")) == ["bob's own"]
        with pytest.raises(UserError, match="not in the history"):
            await conversations.fork("c1", from_entry=entries[0].id)
    async with managed_user_context(manager.create_isolated_context("alice")):
        assert texts(await conversations.load("c1")) == ["alice's secret"]


async def test_a_record_cannot_end_in_another_user_s_message(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        (entry,) = await conversations.save(Conversation(conversation_id="c1", messages=[said("alice's secret")]))
    async with managed_user_context(manager.create_isolated_context("bob")):
        with pytest.raises((ConversationConflict, KeyError)):
            await conversations.write_record(
                ConversationRecord(conversation_id="mine", head_id=entry.id), expected_revision=None
            )
            await conversations.load("mine")


async def test_fifty_users_at_once_under_one_name(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async def user(number: int) -> None:
        async with managed_user_context(manager.create_isolated_context(f"user-{number}")):
            for turn in range(3):
                conversation = await conversations.load("main") or Conversation(conversation_id="main")
                assert texts(conversation) == [f"secret {number}.{earlier}" for earlier in range(turn)]
                conversation.messages.append(said(f"secret {number}.{turn}"))
                await conversations.save(conversation)
            (record,) = await conversations.list_conversations()
            assert record.conversation_id == "main"

    await asyncio.gather(*map(user, range(50)))


async def test_branches_and_forks_stay_the_user_s(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        first = Conversation(conversation_id="c1", messages=[said("one"), said("two")])
        entries = await conversations.save(first)
        fork = await conversations.fork("c1", at=1, new_conversation_id="c2")
        fork.messages.append(said("other"))
        await conversations.save(fork)
        branched = await conversations.branch("c1", at=1, expected_revision=first.revision)
        branched.messages.append(said("three"))
        await conversations.save(branched)
        assert texts(await conversations.load("c1")) == ["one", "three"]
        assert texts(await conversations.load("c2")) == ["one", "other"]
        record = await conversations.read_record("c2")
        assert record is not None
        assert (record.forked_from, record.forked_at) == ("c1", entries[0].id)
        assert [entry.message for entry in await conversations.read_history(entries[1].id)] == first.messages
        await conversations.delete("c1")
        assert texts(await conversations.load("c2")) == ["one", "other"]
        assert await conversations.load("c1") is None


async def test_the_conflict_names_the_user_s_id_and_no_key(
    conversations: UserConversations, manager: UserContextManager
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("one")]))
        loaded = [await conversations.load("c1"), await conversations.load("c1")]
        for conversation in loaded:
            assert conversation is not None
            conversation.messages.append(said("two"))
        assert loaded[0] is not None
        assert loaded[1] is not None
        await conversations.save(loaded[0])
        with pytest.raises(ConversationConflict) as caught:
            await conversations.save(loaded[1])
        assert "'c1'" in str(caught.value)
        assert "ucm1_" not in str(caught.value)


async def test_outside_of_a_context_nothing_is_found_or_written(conversations: UserConversations) -> None:
    with pytest.raises(ContextNotFoundError):
        await conversations.load("c1")
    with pytest.raises(ContextNotFoundError):
        await conversations.list_conversations()
    with pytest.raises(ContextNotFoundError):
        await conversations.save(Conversation(conversation_id="c1"))
    with pytest.raises(ContextNotFoundError):
        await conversations.read_entry("1")
    with pytest.raises(ContextNotFoundError):
        await conversations.delete_record("c1", expected_revision="1")


@pytest.mark.parametrize("conversation_id", ["", " ", "a\nb", "x" * 257, "undefined"])
async def test_a_bad_id_is_refused(
    conversations: UserConversations, manager: UserContextManager, conversation_id: str
) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        with pytest.raises(InvalidContextError):
            await conversations.load(conversation_id)


async def test_a_scope_is_refused(conversations: UserConversations, manager: UserContextManager) -> None:
    async with managed_user_context(manager.create_isolated_context("alice")):
        with pytest.raises(UserError, match="scope= has no place"):
            await conversations.save(Conversation(conversation_id="c1"), scope="alice")
        with pytest.raises(UserError, match="scope= has no place"):
            await conversations.list_conversations(scope="bob")


class Confused(InMemoryConversationStore):
    """Answers as a broken cache does: with what somebody else asked for before."""

    confused = False

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        return next(iter(self._records.values())) if self.confused else await super().read_record(conversation_id)

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        return list(self._records.values()) if self.confused else await super().read_records(scope=scope, limit=limit)

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        return next(iter(self._entries.values())) if self.confused else await super().read_entry(entry_id)


async def test_what_a_store_mixes_up_is_not_given_on(manager: UserContextManager) -> None:
    store = Confused()
    conversations = UserConversations(store)
    async with managed_user_context(manager.create_isolated_context("alice")):
        (entry,) = await conversations.save(Conversation(conversation_id="c1", messages=[said("alice's secret")]))
    async with managed_user_context(manager.create_isolated_context("bob")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("bob's own")]))
        store.confused = True
        with pytest.raises(CrossUserAccessError):
            await conversations.load("c1")
        with pytest.raises(CrossUserAccessError):
            await conversations.list_conversations()
        with pytest.raises(CrossUserAccessError):
            await conversations.read_entry(entry.id)
    trail = manager.get_audit_trail("bob")
    assert trail is not None
    assert [event["event"] for event in trail["events"]].count("denied") >= 2  # a flood of them is counted


async def test_what_a_store_mixes_up_is_not_given_on_where_there_are_no_messages_yet(
    manager: UserContextManager,
) -> None:
    store = Confused()
    conversations = UserConversations(store)
    async with managed_user_context(manager.create_isolated_context("alice")):
        await conversations.save(Conversation(conversation_id="c1"))
        store.confused = True
        with pytest.raises(CrossUserAccessError):
            await conversations.load("c2")  # her own, and another one
        assert await conversations.load("c1") is not None
    async with managed_user_context(manager.create_isolated_context("bob")):
        with pytest.raises(CrossUserAccessError):
            await conversations.load("c1")
        with pytest.raises(CrossUserAccessError):
            await conversations.list_conversations()


async def test_after_a_rotation_conversations_move_to_the_new_secret(
    inner: ConversationStore,
) -> None:
    conversations = UserConversations(inner)
    before = UserContextManager(secret=OLD)
    async with managed_user_context(before.create_isolated_context("alice")):
        first = Conversation(conversation_id="c1", messages=[said("one"), said("two")])
        await conversations.save(first)
        branched = await conversations.branch("c1", at=1, expected_revision=first.revision)
        branched.messages.append(said("three"))
        await conversations.save(branched)
        await conversations.save(Conversation(conversation_id="c2", messages=[said("other")]))
    after = UserContextManager(secret=NEW, previous_secrets=[OLD])
    async with managed_user_context(after.create_isolated_context("alice")):
        assert {record.conversation_id for record in await conversations.list_conversations()} == {"c1", "c2"}
        moved = await conversations.load("c1")
        assert texts(moved) == ["one", "three"]
        assert moved is not None
        moved.messages.append(said("four"))
        await conversations.save(moved)
    without_the_old = UserContextManager(secret=NEW)
    async with managed_user_context(without_the_old.create_isolated_context("alice")):
        assert texts(await conversations.load("c1")) == ["one", "three", "four"]
        assert [record.conversation_id for record in await conversations.list_conversations()] == ["c1"]
        assert len((await conversations.read_record("c1")).branches) == 1  # type: ignore[union-attr]
    async with managed_user_context(before.create_isolated_context("alice")):
        assert await conversations.load("c1") is None  # it is in one place alone


async def test_after_a_rotation_forks_move_one_by_one(inner: ConversationStore) -> None:
    conversations = UserConversations(inner)
    before = UserContextManager(secret=OLD)
    async with managed_user_context(before.create_isolated_context("alice")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("one"), said("two")]))
        fork = await conversations.fork("c1", at=1)
        fork.messages.append(said("three"))
        await conversations.save(fork)
    after = UserContextManager(secret=NEW, previous_secrets=[OLD])
    async with managed_user_context(after.create_isolated_context("alice")):
        assert texts(await conversations.load("c1")) == ["one", "two"]
        assert texts(await conversations.load(fork.conversation_id)) == ["one", "three"]
        await conversations.delete("c1")
    async with managed_user_context(UserContextManager(secret=NEW).create_isolated_context("alice")):
        assert texts(await conversations.load(fork.conversation_id)) == ["one", "three"]


class CutOff(InMemoryConversationStore):
    """Ends, once, before it has deleted what was moved."""

    cut_off = True

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        if self.cut_off:
            self.cut_off = False
            raise OSError("cut off")
        await super().delete_record(conversation_id, expected_revision=expected_revision)


async def test_what_is_deleted_does_not_come_back_from_under_the_old_secret() -> None:
    store = CutOff()
    conversations = UserConversations(store)
    async with managed_user_context(UserContextManager(secret=OLD).create_isolated_context("alice")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("one")]))
    after = UserContextManager(secret=NEW, previous_secrets=[OLD])
    async with managed_user_context(after.create_isolated_context("alice")):
        with pytest.raises(OSError, match="cut off"):
            await conversations.load("c1")
        assert texts(await conversations.load("c1")) == ["one"]
        await conversations.delete("c1")
        assert await conversations.load("c1") is None
        assert not await conversations.list_conversations()
    assert not store._records


async def test_nothing_of_a_user_id_is_in_the_file(
    sqlite_store: SQLiteConversationStore, manager: UserContextManager, tmp_path: Path
) -> None:
    conversations = UserConversations(sqlite_store)
    async with managed_user_context(manager.create_isolated_context("alice.liddell@example.org")):
        await conversations.save(Conversation(conversation_id="c1", messages=[said("hello")]))
    await sqlite_store.aclose()
    assert b"liddell" not in (tmp_path / "conversations.db").read_bytes()
