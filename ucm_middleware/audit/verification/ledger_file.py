"""Opens the file of a ledger, which anybody may have made, for reading alone; and checks it as an SQLite database."""

import os
import re
import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ucm_middleware.audit.verification.chain import HASH_BYTES, MAX_RECORD_BYTES, UNREADABLE, reason_of
from ucm_middleware.audit.verification.files import check_regular_file, read_start
from ucm_middleware.audit.verification.source import Claims, End, Row
from ucm_middleware.errors import LedgerFileError

_APPLICATION_ID: Final = 0x55434D4C
_FORMAT: Final = 1
_REMEDY: Final = "give the file of a ledger"
_CACHE_KIB: Final = 64 * 1024  # the index is looked up in at random
_INSTRUCTIONS_BETWEEN_TICKS: Final = 100_000
# Nothing that the schema says is run, and a file that shrinks meanwhile is an error and no signal.
_SETTINGS: Final = (
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA mmap_size = 0",
    "PRAGMA query_only = ON",
    "BEGIN",
)
_LONGEST_MESSAGE: Final = 500
# By the table alone: the index is checked against it, and not trusted before.
_ROWS: Final = "SELECT sequence, subject, body, hash FROM records NOT INDEXED ORDER BY sequence"
_ROW: Final = "SELECT sequence, subject, body, hash FROM records NOT INDEXED WHERE sequence = ?"
_MAGIC: Final = b"SQLite format 3\0"
_SMALLEST_PAGE: Final = 512
_SIDECARS: Final = "-wal", "-shm", "-journal"
_STREAM: Final = re.compile(r"stream_[0-9a-f]{32}")

_LEDGER: Final = (
    "CREATE TABLE ledger(one INTEGER PRIMARY KEY CHECK(one=1),stream TEXT NOT NULL,sealed INTEGER NOT NULL,"
    "size INTEGER NOT NULL,head BLOB NOT NULL,frontier BLOB NOT NULL)STRICT"
)
_RECORDS: Final = (
    "CREATE TABLE records(sequence INTEGER PRIMARY KEY,subject BLOB NOT NULL,"
    "body BLOB NOT NULL,hash BLOB NOT NULL)STRICT"
)
_BY_SUBJECT: Final = "CREATE INDEX records_by_subject ON records(sequence >> 10,subject)"
_SCHEMA: Final = frozenset(
    {("table", "ledger", _LEDGER), ("table", "records", _RECORDS), ("index", "records_by_subject", _BY_SUBJECT)}
)


class LedgerFile:
    """A ledger in one read transaction: what is written meanwhile is not seen."""

    __slots__ = ("_connection", "path")

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def check_identity(self) -> None:
        """Raise LedgerFileError unless the file says it is a ledger of the format that is known here."""
        try:
            application = self._pragma("application_id")
            version = self._pragma("user_version")
        except UNREADABLE as error:
            raise LedgerFileError(str(self.path), f"cannot be read: {reason_of(error)}", _REMEDY) from None
        if application != _APPLICATION_ID:
            raise LedgerFileError(
                str(self.path),
                f"is a database, but not a ledger (its application id is {application:#x}, and a ledger's is "
                f"{_APPLICATION_ID:#x})",
                _REMEDY,
            )
        if version != _FORMAT:
            raise LedgerFileError(
                str(self.path),
                f"is a ledger in format {version}, and this version reads format {_FORMAT}",
                "upgrade ucm-middleware" if version > _FORMAT else "look for the right file: there is no such format",
            )

    def _shape_problem(self) -> str | None:
        """What in the schema is not the format's, None when nothing is."""
        try:
            rows = self._connection.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
        except UNREADABLE as error:
            return f"the database is damaged, and its schema cannot be read: {reason_of(error)}"
        found = frozenset((str(kind), str(name), _normalised(sql)) for kind, name, sql in rows)
        if found == _SCHEMA and len(rows) == len(found):
            return None
        extra = [f"the {kind} {name}" for kind, name, _ in found - _SCHEMA]
        missing = [f"the {kind} {name}" for kind, name, _ in _SCHEMA - found]
        what = f"not of the format: {', '.join(sorted(extra)) or 'nothing'}; lacking: {', '.join(sorted(missing))}"
        return f"the schema was changed ({ascii(what[:_LONGEST_MESSAGE])[1:-1]})"

    def claims(self) -> Claims | str:
        """What the ledger says of itself; or what is wrong with that, or with the schema."""
        if (problem := self._shape_problem()) is not None:
            return problem
        try:
            rows = self._connection.execute(
                "SELECT stream, sealed, size, head, frontier FROM ledger NOT INDEXED LIMIT 2"
            ).fetchall()
        except UNREADABLE as error:
            return f"the database is damaged, and the table ledger cannot be read: {reason_of(error)}"
        if len(rows) != 1:
            return "the table ledger has no row" if not rows else "the table ledger has more than its one row"
        return _checked_claims(*rows[0])

    def rows(self) -> Iterator[Row]:
        """All records, by their numbers."""
        return self._connection.execute(_ROWS)

    def row(self, sequence: int) -> Row | None:
        """The record with this number."""
        found: Row | None = self._connection.execute(_ROW, (sequence,)).fetchone()
        return found

    def damage(self, tick: Callable[[], None]) -> str | None:
        """The first thing that SQLite finds wrong with the database, its index included; None for nothing.

        ``tick`` is called now and then.
        """
        interruption: list[BaseException] = []

        def on_progress() -> bool:
            try:
                tick()
            except BaseException as error:  # noqa: BLE001 - raised again below: SQLite would swallow it
                interruption.append(error)
            return bool(interruption)

        tick()
        self._connection.set_progress_handler(on_progress, _INSTRUCTIONS_BETWEEN_TICKS)
        try:
            self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            findings = self._connection.execute("PRAGMA integrity_check(1)").fetchall()
        except UNREADABLE as error:
            if interruption:
                raise interruption[0] from None
            return reason_of(error)
        finally:
            self._connection.set_progress_handler(None, 0)
        return None if findings == [("ok",)] else " ".join(" ".join(str(finding).split()) for (finding,) in findings)

    def _pragma(self, name: str) -> Any:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]


@contextmanager
def open_ledger(path: Path, *, untouched: bool) -> Generator[LedgerFile]:
    """Open a ledger for reading. With ``untouched`` the file is taken for one that nobody writes to, and no file is
    made beside it. Raises LedgerFileError when it is none, or a format from the future.
    """
    # The name that SQLite goes by, too, for the files beside it.
    uri = f"{path.resolve().as_uri()}?{'immutable=1' if untouched else 'mode=ro'}"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10)
    except UNREADABLE as error:
        raise LedgerFileError(str(path), f"cannot be opened: {reason_of(error)}", _REMEDY) from None
    with closing(connection):
        connection.text_factory = _text
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_RECORD_BYTES)
        for statement in _SETTINGS:
            _execute(connection, statement, path)
        ledger = LedgerFile(path, connection)
        ledger.check_identity()
        yield ledger


@dataclass(frozen=True, slots=True)
class Quiet:
    """A file as it was when nobody was writing to it."""

    path: Path
    status: os.stat_result

    def still(self) -> bool:
        """Whether nobody has written to it since."""
        try:
            now, then = self.path.stat(), self.status
        except OSError:
            return False
        unchanged = (now.st_ino, now.st_size, now.st_mtime_ns) == (then.st_ino, then.st_size, then.st_mtime_ns)
        return unchanged and _is_alone(self.path)


def quiet(path: Path) -> Quiet | None:
    """The file as it is, None when there are signs of a writer, or of one that crashed. Raises LedgerFileError when it
    is no file.
    """
    status = check_regular_file(path, _REMEDY)
    if status.st_size == 0:  # and SQLite would delete what it takes for a stale log beside an empty file
        raise LedgerFileError(str(path), "is empty, which not even a ledger without records is", _REMEDY)
    if read_start(path, len(_MAGIC), _REMEDY) != _MAGIC:
        raise LedgerFileError(str(path), "is not an SQLite database", _REMEDY)
    if status.st_size < _SMALLEST_PAGE:
        raise LedgerFileError(str(path), f"has only {status.st_size} bytes: it was cut short", "look for a copy")
    file = path.resolve()
    return Quiet(file, status) if _is_alone(file) else None


def _is_alone(file: Path) -> bool:
    return not any(os.path.exists(f"{file}{suffix}") for suffix in _SIDECARS)


def _checked_claims(stream: Any, sealed: Any, size: Any, head: Any, frontier: Any) -> Claims | str:
    if not isinstance(stream, str) or not _STREAM.fullmatch(stream):
        return "the ledger's stream is not a name of one"
    if sealed not in (0, 1):
        return "the ledger says neither that it is sealed nor that it is not"
    if not isinstance(size, int) or size < 0:
        return "the ledger's size is not a number of records"
    if not isinstance(head, bytes) or len(head) != HASH_BYTES:
        return f"the ledger's head is not {HASH_BYTES} bytes"
    if not isinstance(frontier, bytes) or len(frontier) != HASH_BYTES * size.bit_count():
        return f"the ledger's frontier is not {HASH_BYTES * size.bit_count()} bytes, as its size asks for"
    return Claims(stream, sealed, End(size, head, frontier))


def _normalised(sql: object) -> str:
    """The statement without comments, and with blanks only where they mean something."""
    without_comments = re.sub(r"--[^\n]*", "", sql if isinstance(sql, str) else "")
    return re.sub(r"\s*([(),=])\s*", r"\1", re.sub(r"\s+", " ", without_comments)).strip()


def _execute(connection: sqlite3.Connection, statement: str, path: Path) -> None:
    try:
        connection.execute(statement)
    except UNREADABLE as error:
        raise LedgerFileError(str(path), f"cannot be read: {reason_of(error)}", _REMEDY) from None


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
