"""The tickets, in one SQLite file. A ``Desk`` is one user's open connection to it, and sees that user's rows only."""

import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

USERS = ("alice", "bob", "carol")
TOKENS = {f"token-of-{user}": user for user in (*USERS, "supervisor")}

SCHEMA = """
pragma journal_mode = wal;
create table ticket (id integer primary key, owner text not null, subject text not null, size integer not null);
create table note (id integer primary key, owner text not null, text text not null);
"""
OPENING_SUBJECTS = ("The printer hums", "My screen flickers", "The coffee machine wants a password")


@dataclass(frozen=True, slots=True)
class Ticket:
    """``size`` is the length of the attached log in characters; the log itself is not kept."""

    id: int
    owner: str
    subject: str
    size: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something said about a ticket, or a notification about one."""

    id: int
    owner: str
    text: str


def prepare(path: str) -> None:
    """Create the file at ``path`` with three tickets for each user, unless it is there."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if not connection.execute("select name from sqlite_master").fetchall():
            connection.executescript(SCHEMA)
            rows = [(user, f"{subject} ({user})") for user in USERS for subject in OPENING_SUBJECTS]
            connection.executemany("insert into ticket (owner, subject, size) values (?, ?, 0)", rows)


class Desk:
    """One user's connection. Open one per request, close it at the end: ``opened`` and ``closed`` count them all."""

    opened: ClassVar[int] = 0
    closed: ClassVar[int] = 0
    _counting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: str, user: str) -> None:
        # FastAPI runs `def` endpoints in a worker thread, so one request uses its connection from two threads in turn.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.user = user
        with Desk._counting:
            Desk.opened += 1

    def close(self) -> None:
        """Close the connection; every later use raises ``sqlite3.ProgrammingError``."""
        self._connection.close()
        with Desk._counting:
            Desk.closed += 1

    def tickets(self) -> list[Ticket]:
        """The user's newest ten tickets."""
        rows = self._rows("select id, owner, subject, size from ticket where owner = ? order by id desc limit 10")
        return [Ticket(*row) for row in rows]

    def ticket(self, ticket_id: int) -> Ticket | None:
        """One of the user's tickets; another user's is as good as none."""
        rows = self._rows("select id, owner, subject, size from ticket where owner = ? and id = ?", ticket_id)
        return Ticket(*rows[0]) if rows else None

    def add_ticket(self, subject: str, size: int) -> Ticket:
        """File a ticket in the user's name."""
        insert = "insert into ticket (owner, subject, size) values (?, ?, ?) returning id, owner, subject, size"
        return Ticket(*self._rows(insert, subject, size)[0])

    def notes(self) -> list[Note]:
        """The user's newest ten notes."""
        rows = self._rows("select id, owner, text from note where owner = ? order by id desc limit 10")
        return [Note(*row) for row in rows]

    def add_note(self, text: str) -> Note:
        """Keep a note in the user's name."""
        return Note(*self._rows("insert into note (owner, text) values (?, ?) returning id, owner, text", text)[0])

    def _rows(self, statement: str, *values: object) -> list[Any]:
        # Every statement begins with the user: no method can forget whose rows these are.
        return self._connection.execute(statement, (self.user, *values)).fetchall()
