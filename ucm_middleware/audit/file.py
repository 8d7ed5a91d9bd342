"""The file of a ledger: making one, going on with one, and appending to it. docs/reference/ledger-format.md."""

import secrets
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ucm_middleware.audit.chain import HASH_LENGTH, Chain, genesis, link
from ucm_middleware.audit.database import (
    LEDGER,
    create_database,
    errors_of,
    exists,
    identity_of,
    open_database,
    transaction,
)
from ucm_middleware.errors import LedgerFileError

TAIL: Final = 256
"""How many records are verified when a ledger is opened to go on with it."""

CACHE: Final = 4096
"""KiB of pages that a writer keeps."""

LOG: Final = 16_384
"""Pages of SQLite's log between two checkpoints, 64 MiB: checkpoints are few, since whoever commits when one is due
waits for it, and what was written often meanwhile, as pages of the index are, goes into the file once.
"""

PART_BITS: Final = 10
"""The index goes by parts of so many records, as a power of two. One over all would have a page of its own to write for
nearly each record of a batch, which costs more than the record; to ask each part costs about a microsecond.
"""

_SCHEMA: Final = (
    """CREATE TABLE ledger (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    stream TEXT NOT NULL,
    sealed INTEGER NOT NULL,
    size INTEGER NOT NULL,
    head BLOB NOT NULL,
    frontier BLOB NOT NULL
) STRICT""",
    """CREATE TABLE records (
    sequence INTEGER PRIMARY KEY,
    subject BLOB NOT NULL,
    body BLOB NOT NULL,
    hash BLOB NOT NULL
) STRICT""",
    f"CREATE INDEX records_by_subject ON records (sequence >> {PART_BITS}, subject)",
)

_READ_STATE: Final = "SELECT size, head, frontier FROM ledger"
_WRITE_STATE: Final = "UPDATE ledger SET size = ?, head = ?, frontier = ?"
_INSERT: Final = "INSERT INTO records VALUES (?, ?, ?, ?)"

Entry = tuple[bytes, bytes]
"""Subject and body of a record."""


class LedgerFile:
    """One connection to a ledger file, to go on with it. For one thread; any number of processes may have one each."""

    __slots__ = ("_chain", "_connection", "_identity", "path", "stream")

    def __init__(self, path: Path, connection: sqlite3.Connection, stream: str, chain: Chain) -> None:
        self.path = path
        self.stream = stream
        self._connection = connection
        self._chain = chain
        self._identity = identity_of(path)

    @classmethod
    def open(cls, path: Path, *, sealed: bool, stream: str | None = None, must_exist: bool = False) -> "LedgerFile":
        """The ledger at ``path``, with its tail verified. Made when there is none, unless it must exist, as one of a
        certain ``stream`` must.

        Raises LedgerFileError for what ``open_database`` refuses, for a ledger that was begun with keys and is opened
        without or the other way round, for another stream, and when its end is not as it was written.
        """
        if stream is None and not must_exist and not exists(path):
            create_database(path, LEDGER, lambda connection: _fill(connection, sealed=sealed))
        connection = open_database(path, LEDGER)
        try:
            with errors_of(path):
                connection.execute(f"PRAGMA cache_size = -{CACHE}")
                connection.execute(f"PRAGMA wal_autocheckpoint = {LOG}")
                with transaction(connection):  # nobody appends meanwhile
                    found = _checked_stream(path, connection, sealed=sealed, stream=stream)
                    chain = _checked_tail(path, connection, genesis(found, sealed=sealed))
                    # To begin a transaction works on a file that may only be read, too.
                    connection.execute("UPDATE ledger SET size = size")
            return cls(path, connection, found, chain)
        except BaseException:
            connection.close()
            raise

    @property
    def size(self) -> int:
        """How many records there were when they were last written here, or the file was opened."""
        return self._chain.size

    def append(self, entries: Iterable[Entry]) -> None:
        """Add records, all or none; they are on the disk when this returns. Raises LedgerFileError."""
        if identity_of(self.path) != self._identity:
            raise LedgerFileError(
                str(self.path),
                "was moved or deleted while records were written to it, or the file beside it that ends in -wal was",
                "put them back together; writing goes on by itself",
            )
        execute = self._connection.execute
        with errors_of(self.path), transaction(self._connection):  # from here on no other process can append
            size, head, frontier = execute(_READ_STATE).fetchone()
            if (size, head) != (self._chain.size, self._chain.head):
                self._chain = Chain(size, head, frontier)
            chain = self._chain.copy()
            rows = [(chain.size + 1, subject, body, chain.append(subject, body)) for subject, body in entries]
            self._connection.executemany(_INSERT, rows)
            execute(_WRITE_STATE, (chain.size, chain.head, chain.packed_frontier()))
        self._chain = chain

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


def read_header(path: Path, connection: sqlite3.Connection) -> tuple[str, bool]:
    """The stream of a ledger, and whether its personal fields are encrypted. Raises LedgerFileError and what SQLite
    raises."""
    rows = connection.execute("SELECT stream, sealed FROM ledger").fetchall()
    if len(rows) != 1:
        raise _bad_tail(path, f"it says {len(rows)} times what it is")
    [(stream, sealed)] = rows
    return str(stream), bool(sealed)


def _fill(connection: sqlite3.Connection, *, sealed: bool) -> None:
    stream = f"stream_{secrets.token_hex(16)}"
    for statement in _SCHEMA:
        connection.execute(statement)
    row = stream, sealed, genesis(stream, sealed=sealed)
    connection.execute("INSERT INTO ledger VALUES (1, ?, ?, 0, ?, x'')", row)


def _checked_stream(path: Path, connection: sqlite3.Connection, *, sealed: bool, stream: str | None) -> str:
    found, is_sealed = read_header(path, connection)
    if sealed != is_sealed:
        begun = "with keys" if is_sealed else "without keys"
        raise LedgerFileError(str(path), f"was begun {begun}, which cannot change", "open it so, or begin another one")
    if stream not in (None, found):
        raise LedgerFileError(str(path), f"is the ledger {found}, and {stream} was here before", "put that one back")
    return found


def _checked_tail(path: Path, connection: sqlite3.Connection, previous: bytes) -> Chain:
    size, head, frontier = connection.execute(_READ_STATE).fetchone()
    rows = connection.execute(
        "SELECT sequence, subject, body, hash FROM records ORDER BY sequence DESC LIMIT ?", (TAIL + 1,)
    ).fetchall()
    rows.reverse()
    at = 0
    if len(rows) > TAIL:
        at, _, _, previous = rows.pop(0)
    for sequence, subject, body, digest in rows:
        at += 1
        if sequence != at or link(previous, subject, body) != digest:
            raise _bad_tail(path, f"record {at} is not as it was written")
        previous = digest
    if (at, previous, len(frontier)) != (size, head, size.bit_count() * HASH_LENGTH):
        raise _bad_tail(path, f"it ends with record {at}, and was written up to record {size}")
    return Chain(size, head, frontier)


def _bad_tail(path: Path, problem: str) -> LedgerFileError:
    return LedgerFileError(
        str(path),
        f"was changed or damaged: {problem}",
        "keep it as evidence, see what `ucm audit verify` says, and begin another one",
    )
