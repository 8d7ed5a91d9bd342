"""A user's notes: a SQLite file of their own, and a connection to it that its tools hold by an owned handle."""

import sqlite3
from pathlib import Path

from ucm_middleware import UserExecutionContext

SCHEMA = "create table if not exists note (id integer primary key, text text not null)"


class Notes:
    """One user's connection. It lives as long as the run that it was opened for."""

    def __init__(self, path: Path) -> None:
        # A tool that is no coroutine runs in a thread.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute(SCHEMA)

    def add(self, text: str) -> int:
        """Keep a note. Returns how many there are now."""
        self._connection.execute("insert into note (text) values (?)", (text,))
        row: tuple[int] = self._connection.execute("select count(*) from note").fetchone()
        return row[0]

    def newest(self, count: int) -> list[str]:
        """So many of them, the oldest first."""
        rows = self._connection.execute("select text from note order by id desc limit ?", (count,))
        return [text for (text,) in rows][::-1]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def open_notes(folder: Path, context: UserExecutionContext) -> Notes:
    """The notes of a context's user, for as long as the context lives. What is given out is a handle: it does nothing
    in another user's code, and nothing any more once the context has ended.

    The file's name is a key of the user's, which nobody else's context derives.
    """
    notes = Notes(folder / f"{context.derive_key('notes', 'mine')}.sqlite")
    context.closing(notes)
    return context.own(notes, name="notes")
