"""SQLite files of ours: made whole or not at all, recognised before anything touches them, and errors for people."""

import os
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ucm_middleware.errors import LedgerFileError

PATIENCE: Final = 10.0
"""For how many seconds to wait for what other processes have locked."""


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of file, as the header says it (``docs/reference/ledger-format.md``)."""

    name: str
    application_id: int
    version: int


LEDGER: Final = Form("a ledger", 0x55434D4C, 1)
KEY_FILE: Final = Form("a key file", 0x55434D4B, 1)


def create_database(path: Path, form: Form, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Make the file, for its owner alone; where another process was faster, that one's stays.

    It is filled elsewhere and then put into its place, so that nobody ever sees half of it. Raises LedgerFileError.
    """
    try:
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            made = Path(folder, "new")
            made.touch(0o600)
            with errors_of(path), closing(_connect(made, "mode=rw")) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA journal_mode = WAL")
                with transaction(connection):
                    connection.execute(f"PRAGMA application_id = {form.application_id}")
                    connection.execute(f"PRAGMA user_version = {form.version}")
                    fill(connection)
            with suppress(FileExistsError):
                os.link(made, path)
    except OSError as error:
        raise LedgerFileError(
            str(path), f"cannot be made: {error.strerror}", "name a file in a folder that this process can write to"
        ) from error


def exists(path: Path) -> bool:
    """Whether there is anything. Raises LedgerFileError where that cannot be found out."""
    return _identity(path) is not None


def open_database(path: Path, form: Form, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection to an existing file of that form, in autocommit mode and for one thread at a time.

    What may only be read is opened for reading. Raises LedgerFileError, before anything is changed, for a file that is
    missing, a directory, no SQLite database, of another program, of another form or of another version.
    """
    _recognise(path, form)
    with errors_of(path):
        connection = _connect(path, _mode(path, read_only=read_only))
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA cache_size = -256")  # KiB
            connection.execute(f"PRAGMA query_only = {read_only}")
        except BaseException:
            connection.close()
            raise
    return connection


def _mode(path: Path, *, read_only: bool) -> str:
    if Path(f"{path.resolve()}-wal").exists():
        # Whoever is the last to close a file that it may write to puts the log into it and deletes the log.
        return "mode=ro" if read_only else "mode=rw"
    # To read while others may write, SQLite needs files beside it; with mode=ro it would leave them there. Where none
    # can be made, and there is no log, nobody writes: then the file is read as it is.
    is_writable = os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK)
    return "mode=rw" if is_writable else "immutable=1"


@contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """What is done within is written as one, or not at all. Others wait to write meanwhile."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def errors_of(path: Path) -> Generator[None]:
    """What SQLite raises within, as LedgerFileError."""
    try:
        yield
    except sqlite3.Error as error:
        problem, remedy = _EXPLAINED.get(
            getattr(error, "sqlite_errorcode", 0) & 0xFF,
            (f"SQLite says: {error}", "see whether it is the right file, or restore it"),
        )
        raise LedgerFileError(str(path), problem, remedy) from error


def identity_of(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Which file is there, and which log beside it, whatever is written to them; None for none.

    While a connection is open, SQLite leaves both in their places. Raises LedgerFileError where that cannot be found
    out.
    """
    return tuple(map(_identity, (path, Path(f"{path}-wal"))))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LedgerFileError(
            str(path), f"cannot be reached: {error.strerror}", "give this process access to its folder"
        ) from error
    return found.st_dev, found.st_ino


def is_read_only(error: sqlite3.Error) -> bool:
    """Whether what failed is that something was to be written to a file that may only be read."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY


_EXPLAINED: Final = {
    sqlite3.SQLITE_BUSY: (
        f"another process has had it locked for {PATIENCE:g} seconds",
        "find what has it open, end that, and try again",
    ),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "see that its folder exists, and that this process may read both"),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "restore it from a backup"),
    sqlite3.SQLITE_FULL: ("the disk is full", "make room on it"),
    sqlite3.SQLITE_IOERR: ("the disk reports an error", "see what the operating system says of the disk"),
    sqlite3.SQLITE_NOTADB: ("is no SQLite database", "name another file"),
    sqlite3.SQLITE_READONLY: (
        "can only be read, and something was to be written to it",
        "make it and its folder writable for this process",
    ),
}


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        timeout=PATIENCE,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )


def _recognise(path: Path, form: Form) -> None:
    if not exists(path):
        raise LedgerFileError(str(path), "does not exist", f"name {form.name} that does")
    if path.is_dir():
        raise LedgerFileError(str(path), f"is a directory, where {form.name} belongs", "name a file")
    if not path.is_file():
        raise LedgerFileError(str(path), f"is no ordinary file, as {form.name} is", "name another file")
    if not path.stat().st_size:
        raise LedgerFileError(str(path), f"is empty, where {form.name} belongs", "delete it, or name another file")
    # Immutable: nothing is locked, and no file is made beside it. SQLite reads it, and not open(), since closing any
    # file takes away the locks that this process has on it.
    with errors_of(path), closing(_connect(path, "immutable=1")) as connection:
        # So that SQLite takes the header as it is: in the middle of a checkpoint, of another process or one that a
        # crash has ended, it says more pages than there are yet. The log has them.
        connection.execute("PRAGMA writable_schema = ON")
        [(found,)] = connection.execute("PRAGMA application_id")
        [(version,)] = connection.execute("PRAGMA user_version")
    if found != form.application_id:
        ours = {known.application_id: known.name for known in (LEDGER, KEY_FILE)}
        what = ours.get(found, f"another program's database (application_id 0x{found & 0xFFFFFFFF:08x})")
        raise LedgerFileError(str(path), f"is {what}, where {form.name} belongs", "name another file")
    if version != form.version:
        raise LedgerFileError(
            str(path),
            f"is {form.name} of format {version}, and this version of ucm-middleware knows format {form.version}",
            "use the version that made it",
        )
