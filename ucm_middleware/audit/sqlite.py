"""SQLiteLedger: the embedded ledger that keeps records for good, in one file for all processes of an application."""

import threading
import weakref
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ucm_middleware.audit.encoding import encode_plain, encode_sealed, users_in
from ucm_middleware.audit.erasure import erase_user
from ucm_middleware.audit.file import Entry, LedgerFile
from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.reader import LedgerReader
from ucm_middleware.audit.records import Row, UserMention
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.audit.writer import Writer
from ucm_middleware.errors import ConfigurationError, LedgerFileError, LedgerUnavailableError
from ucm_middleware.forking import quiet_during_fork
from ucm_middleware.secret import SecretRing

CAPACITY: Final = 65_536
"""How many records may wait in line."""

PATIENCE: Final = 30.0
"""Seconds that synchronous code waits for room, or until what is in line is written."""

STOP_PATIENCE: Final = 5.0
"""Seconds that a stop, and so the end of the process, tries to write the last records while that fails."""


class SQLiteLedger:
    """Records in an SQLite file, hash-chained, written by one thread for each process, many in one transaction.

    Any number of processes may have the same ``path``, on a local disk. ``keys`` is another file, best on another
    volume: personal fields are then encrypted under keys of their users, which are kept there, so that a user can be
    erased; UCM_SECRET must be set for it in production. With ``keys=None`` everything stands in the clear, and nobody
    can be erased. A ledger stays as it was begun.

    Up to ``capacity`` records wait in line. From half of that on, new contexts wait until there is room; at all of it,
    whatever appends waits, or is refused when the file cannot be written. What has happened already, the end of a
    context, is kept in any case.

    Raises ConfigurationError.
    """

    def __init__(self, path: str | Path, *, keys: str | Path | None, capacity: int = CAPACITY) -> None:
        self.path = Path(path).resolve()  # wherever the process goes; SQLite keeps its log beside what a link leads to
        self.keys = None if keys is None else Path(keys).resolve()
        if self.keys == self.path:
            raise ConfigurationError(f"keys must be another file than the ledger, not {keys!s} too")
        self.capacity = _checked_capacity(capacity)
        self._secrets: SecretRing | None = None
        self._writer: Writer | None = None
        self.after_fork()
        quiet_during_fork(self)

    def before_fork(self) -> None:
        """Let readers end; the writer sees to itself."""
        self._reading.acquire()

    def after_fork_in_parent(self) -> None:
        """Let others read."""
        self._reading.release()

    def after_fork(self) -> None:
        """Nobody reads here."""
        self._reading = threading.RLock()  # reentrant: a signal handler may read meanwhile

    def start(self, secrets: SecretRing) -> None:
        """Open the files once, so that what is wrong with them is told before anything is served.

        Raises LedgerFileError, ConfigurationError in production without a secret, and for a second manager.
        """
        if self._writer is not None:
            raise ConfigurationError("this ledger has a manager already; give each a ledger of its own, on one file")
        self._secrets = secrets
        with self._reading:
            store = _Store(self.path, self.keys, secrets)
            store.close()
        # From now on it must be this one: a ledger that disappears is not silently followed by an empty one.
        self._writer = writer = Writer(partial(_Store, self.path, self.keys, secrets, store.known))
        weakref.finalize(self, writer.stop, STOP_PATIENCE)
        # Imported here and below: the package itself needs nothing of it.
        from multiprocessing.util import register_after_fork

        register_after_fork(writer, _stop_at_exit)

    @property
    def lag(self) -> int:
        """As the port says, in this process."""
        return 0 if self._writer is None else self._writer.lag

    @property
    def problem(self) -> str | None:
        """As the port says."""
        return None if self._writer is None else self._writer.trouble()

    def append(self, row: Row) -> None:
        """As the port says. Raises LedgerUnavailableError when the line is full and cannot be written."""
        writer = self._writer or self._started()
        # First what is never less than the lag, and costs a third of it.
        if writer.waiting() + len(writer.rows) >= self.capacity and row[0] != "closed" and writer.lag >= self.capacity:
            writer.wait_passed(PATIENCE)
        writer.append(row)

    @property
    def has_room(self) -> bool:
        """As the port says: while less than half of the capacity is taken."""
        return self._writer is None or self._writer.lag < self.capacity // 2

    def durable(self) -> Awaitable[None]:
        """As the port says."""
        return self._started().passed()

    def flush(self, timeout: float = PATIENCE) -> None:
        """As the port says."""
        self._started().wait_passed(timeout)

    def trail(self, user_id: str | None) -> Trail | None:
        """As the port says, read from the file: some milliseconds. Raises LedgerUnavailableError, LedgerFileError."""
        self.flush()
        assert self._secrets is not None
        with self._reading, LedgerReader.open(self.path, self.keys, self._secrets) as reader:
            return reader.trail(user_id)

    def knows(self, user_id: str) -> bool:
        """As the port says, and as ``trail``."""
        self.flush()
        assert self._secrets is not None
        with self._reading, LedgerReader.open(self.path, self.keys, self._secrets) as reader:
            return reader.knows(user_id)

    def erase(self, user_id: str, *, reason: str) -> int:
        """Make all that is on record of a user unreadable for good, by destroying their keys; see the docs on erasure.

        Sign the user out first: what still runs for them goes on record anew. Returns how many subjects were erased:
        the user, and the anonymous ones that became this user; 0 for a user never seen. Blocks. Raises
        ConfigurationError without keys, and what ``erase_user`` raises.
        """
        if self.keys is None or self._secrets is None:
            raise ConfigurationError("nobody can be erased from a ledger without keys: begin one with keys=...")
        self.flush()
        with self._reading:
            return erase_user(self.path, self.keys, self._secrets, user_id, reason)

    def close(self) -> None:
        """Write what is in line, and let go of the file. It is opened again for the next record."""
        if self._writer is not None:
            self._writer.stop(STOP_PATIENCE)

    def _started(self) -> Writer:
        if self._writer is None:
            raise LedgerUnavailableError("the ledger has no manager yet: UserContextManager(ledger=...)")
        return self._writer


def _stop_at_exit(writer: Writer) -> None:
    """In a forked child of multiprocessing, which ends without the exit handlers of the interpreter."""
    from multiprocessing.util import Finalize

    Finalize(writer, writer.stop, (STOP_PATIENCE,), exitpriority=0)


def _checked_capacity(capacity: object) -> int:
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 2:
        raise ConfigurationError(f"capacity must be a whole number of at least 2, not {capacity!r}")
    return capacity


@dataclass(slots=True)
class _Known:
    """What a process knows of its ledger, whenever it opens it again."""

    stream: str
    size: int


class _Store:
    """The files, open: what the writer's thread writes to."""

    __slots__ = ("_file", "_vault", "known")

    def __init__(self, path: Path, keys: Path | None, secrets: SecretRing, known: _Known | None = None) -> None:
        self._file = file = LedgerFile.open(
            path, sealed=keys is not None, stream=None if known is None else known.stream
        )
        self.known = _Known(file.stream, file.size) if known is None else known
        try:
            if file.size < self.known.size:
                raise LedgerFileError(
                    str(path),
                    f"has {file.size} records, and {self.known.size} were acknowledged in this process",
                    "put back the file beside it that ends in -wal, or restart to go on without them",
                )
            if keys is None:
                self._vault = None
            elif known is None:
                self._vault = Vault.open(keys, file.stream, secrets, must_exist=file.size > 0)
            else:  # opened again: only a start makes a key file, or puts it under another secret
                self._vault = Vault.open_existing(keys, file.stream, secrets)
        except BaseException:
            file.close()
            raise

    def write(self, rows: Sequence[Row]) -> None:
        self._file.append(self._entries(rows))
        self.known.size = self._file.size

    def _entries(self, rows: Sequence[Row]) -> list[Entry]:
        if self._vault is None:
            return [encode_plain(row) for row in rows]
        subjects = self._vault.of({user_id for row in rows for user_id in users_in(row)})
        if bound := dict(pair for row in rows if row[0] == "bound" for pair in _bound(row)):
            self._vault.bind(bound)
        return [encode_sealed(row, subjects) for row in rows]

    def close(self) -> None:
        if self._vault is not None:
            self._vault.close()
        self._file.close()


def _bound(row: Row) -> Iterator[tuple[str, str]]:
    """The anonymous one and the user that it learned: what is on record of the one is erased with the other."""
    anonymous_id = row[2]
    for name, value in row[11]:
        if name == "user_id" and isinstance(value, UserMention) and anonymous_id is not None:
            yield anonymous_id, value
