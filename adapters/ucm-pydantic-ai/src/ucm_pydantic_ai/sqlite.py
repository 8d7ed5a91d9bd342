"""Conversations in a SQLite file: a store of Pydantic AI's kind, which knows nothing of users.

Each message is stored once, and a save writes only what is new, with the record in one transaction.
``UserConversations`` makes a user's own of it.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from pydantic import TypeAdapter
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
)
from pydantic_ai.messages import ModelMessagesTypeAdapter

from ucm_middleware import ConfigurationError

_T = TypeVar("_T")

_RECORD: Final = TypeAdapter(ConversationRecord)

# A tip is the newest entry of a history that a record still has: its own, or that of a branch which it left.
_SCHEMA: Final = """
create table if not exists conversations (
    id text primary key, scope text, revision text not null, updated real not null, record blob not null
) without rowid;
create index if not exists conversations_by_scope on conversations (scope, updated);
create table if not exists entries (id text primary key, parent_id text, message blob not null) without rowid;
create index if not exists entries_by_parent on entries (parent_id);
create table if not exists tips (entry_id text, conversation_id text, primary key (entry_id, conversation_id))
without rowid;
create index if not exists tips_by_conversation on tips (conversation_id);
"""

_HISTORY: Final = """
with recursive history (id, parent_id, message, back) as (
    select id, parent_id, message, 1 from entries where id = ?
    union all
    select entries.id, entries.parent_id, entries.message, back + 1
    from history join entries on entries.id = history.parent_id where back < ?
)
select id, parent_id, message from history order by back desc
"""


class SQLiteConversationStore(ConversationStore):
    """Keeps conversations in the file ``path``, which is made for its owner's eyes only (0600).

    Several processes may use one file, on one machine. Deleting a conversation deletes the messages that no other one
    shares. ``busy_timeout`` is how long to wait for another process's write, in seconds. Nothing is opened before the
    first use; ``aclose`` closes.

    Raises ConfigurationError for what names no file. What the operations raise besides the framework's errors is
    ``sqlite3.Error``.
    """

    def __init__(self, path: str | Path, *, busy_timeout: float = 5.0) -> None:
        if str(path) in {"", ":memory:"}:
            raise ConfigurationError(
                f"path is {str(path)!r}, and no file; name one, or take the framework's InMemoryConversationStore"
            )
        self._path = Path(path).absolute()  # wherever the process goes before the first use
        self._busy_timeout = busy_timeout
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        # All of the connection's work is done in one thread; the event loop never waits for the disk.
        self._thread = ThreadPoolExecutor(1, "ucm-conversations")

    async def aclose(self) -> None:
        """Close the file, after what is under way. What is asked of the store later opens it again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)

    # The operations of a store.

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        def read(connection: sqlite3.Connection) -> ConversationRecord | None:
            row = _one(connection, "select record from conversations where id = ?", conversation_id)
            return None if row is None else _RECORD.validate_json(row[0])

        return await self._do(read)

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        where, chosen = ("", []) if scope is None else ("where scope = ?", [scope])
        query = f"select record from conversations {where} order by updated desc limit ?"

        def read(connection: sqlite3.Connection) -> list[ConversationRecord]:
            rows = connection.execute(query, [*chosen, -1 if limit is None else limit])
            return [_RECORD.validate_json(row[0]) for row in rows]

        return await self._do(read)

    async def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> None:
        entries = [(entry.id, entry.parent_id, _dumped(entry)) for entry in new_entries]
        updated = record.updated_at.astimezone(UTC).timestamp()
        row = (record.conversation_id, record.scope, record.revision, updated, _RECORD.dump_json(record))
        tips = {(tip, record.conversation_id) for tip in (record.head_id, *record.branches) if tip is not None}

        def write(connection: sqlite3.Connection) -> None:
            _expect(connection, record.conversation_id, expected_revision)
            # What is there already is the same: a conversation that moves brings along what it shares with its forks.
            connection.executemany("insert into entries values (?, ?, ?) on conflict do nothing", entries)
            if record.head_id is not None and not _one(
                connection, "select 1 from entries where id = ?", record.head_id
            ):
                raise ConversationConflict(record.conversation_id)
            connection.execute("insert or replace into conversations values (?, ?, ?, ?, ?)", row)
            connection.execute("delete from tips where conversation_id = ?", [record.conversation_id])
            connection.executemany("insert into tips values (?, ?)", tips)

        await self._do(_in_transaction(write))

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        def delete(connection: sqlite3.Connection) -> None:
            _expect(connection, conversation_id, expected_revision)
            tips = connection.execute("select entry_id from tips where conversation_id = ?", [conversation_id])
            ends = [row[0] for row in tips]
            connection.execute("delete from conversations where id = ?", [conversation_id])
            connection.execute("delete from tips where conversation_id = ?", [conversation_id])
            for end in ends:
                _prune(connection, end)

        await self._do(_in_transaction(delete))

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        def read(connection: sqlite3.Connection) -> ConversationEntry:
            row = _one(connection, "select id, parent_id, message from entries where id = ?", entry_id)
            if row is None:
                raise KeyError(entry_id)
            return _entry(*row)

        return await self._do(read)

    async def read_history(self, head_id: str | None, *, limit: int | None = None) -> list[ConversationEntry]:
        if head_id is None or limit == 0:
            return []

        def read(connection: sqlite3.Connection) -> list[ConversationEntry]:
            rows = connection.execute(_HISTORY, [head_id, 1 << 62 if limit is None else limit]).fetchall()
            if not rows or (limit is None and rows[0][1] is not None):
                raise KeyError(head_id)  # as the framework wants it: an entry is gone, and it reads the record again
            return [_entry(*row) for row in rows]

        return await self._do(read)

    # The thread.

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._pid != os.getpid():
            raise ConfigurationError(
                "the conversation store was made before the process forked, and SQLite's connections do not survive "
                "that: make one in each worker, such as in the application's lifespan"
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._opened()))

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                self._path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False
            )
            try:
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma secure_delete = on")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _in_transaction(work: Callable[[sqlite3.Connection], _T]) -> Callable[[sqlite3.Connection], _T]:
    def run(connection: sqlite3.Connection) -> _T:
        connection.execute("begin immediate")  # what is read before the write holds until the write
        try:
            done = work(connection)
            connection.execute("commit")
        except BaseException:
            if connection.in_transaction:
                connection.execute("rollback")
            raise
        return done

    return run


def _one(connection: sqlite3.Connection, query: str, value: str) -> tuple[Any, ...] | None:
    with closing(connection.execute(query, [value])) as rows:
        return cast("tuple[Any, ...] | None", rows.fetchone())


def _expect(connection: sqlite3.Connection, conversation_id: str, revision: str | None) -> None:
    row = _one(connection, "select revision from conversations where id = ?", conversation_id)
    if (None if row is None else row[0]) != revision:
        raise ConversationConflict(conversation_id)


def _prune(connection: sqlite3.Connection, entry_id: str | None) -> None:
    """Delete a history from its end backwards, up to the first entry that something else still follows or ends in."""
    while entry_id is not None:
        row = _one(connection, "select parent_id from entries where id = ?", entry_id)
        if (
            row is None
            or _one(connection, "select 1 from entries where parent_id = ?", entry_id)
            or _one(connection, "select 1 from tips where entry_id = ?", entry_id)
        ):
            return
        connection.execute("delete from entries where id = ?", [entry_id])
        entry_id = row[0]


def _dumped(entry: ConversationEntry) -> bytes:
    return ModelMessagesTypeAdapter.dump_json([entry.message])


def _entry(entry_id: str, parent_id: str | None, message: bytes) -> ConversationEntry:
    (loaded,) = ModelMessagesTypeAdapter.validate_json(message)
    return ConversationEntry(id=entry_id, parent_id=parent_id, message=loaded)
