"""A plugin for transactions, on a database of SQLite: the smallest that does what the port asks."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import aiosqlite

from ucm_middleware import IsolationLevel, StatementResult, Transaction, TransactionLog, UserExecutionContext, hookimpl

SCHEMA = """
create table people (name text primary key);
create table notes (id integer primary key, person text references people deferrable initially deferred, body text);
insert into people values ('alice'), ('bob');
"""


class SQLiteNotes:
    """Give it to a manager as a plugin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[SQLiteTransaction] = []
        with sqlite3.connect(path) as connection:
            connection.executescript(SCHEMA)
        connection.close()

    def bodies(self) -> list[str]:
        """What is committed."""
        connection = sqlite3.connect(self.path)
        try:
            return [body for (body,) in connection.execute("select body from notes order by id")]
        finally:
            connection.close()

    @hookimpl
    def ucm_open_transaction(
        self, context: UserExecutionContext, isolation_level: IsolationLevel | None
    ) -> Transaction:
        opened = SQLiteTransaction(self.path, context, isolation_level)
        self.opened.append(opened)
        return opened


class SQLiteTransaction:
    """Opens its connection with the first statement."""

    def __init__(self, path: Path, context: UserExecutionContext, level: IsolationLevel | None) -> None:
        self._path = path
        self._connection: aiosqlite.Connection | None = None
        self._log = TransactionLog(context, "notes", isolation_level=level)
        self.ends: list[BaseException | None] = []
        self.level = level

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def session(self) -> "SQLiteTransaction":
        return self

    async def execute(self, statement: object, parameters: object = None) -> StatementResult:
        connection = self._connection
        if connection is None:
            self._log.begin()
            connection = self._connection = await aiosqlite.connect(self._path, isolation_level=None)
            await connection.execute("pragma foreign_keys = on")
            await connection.execute("begin immediate")
        self._log.statements += 1
        cursor = await connection.execute(cast("str", statement), cast("Mapping[str, Any]", parameters or {}))
        names = [column[0] for column in cursor.description or ()]
        rows = tuple(dict(zip(names, tuple(row), strict=True)) for row in await cursor.fetchall())
        return StatementResult(rows, cursor.rowcount)

    async def end(self, error: BaseException | None) -> None:
        self.ends.append(error)
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if error is None:
                await connection.commit()
                self._log.commit()
        finally:
            await connection.close()  # which rolls back what is not committed
            self._log.rollback(error)
