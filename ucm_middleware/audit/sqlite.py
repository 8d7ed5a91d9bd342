"""SQLiteLedger: the embedded ledger that keeps records for good, in one file for all processes of an application."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ucm_middleware.audit.entries import entries_of
from ucm_middleware.audit.erasure import erase_user
from ucm_middleware.audit.file import LedgerFile
from ucm_middleware.audit.queued import CAPACITY, QueuedLedger
from ucm_middleware.audit.reader import LedgerReader
from ucm_middleware.audit.reading import RecordReader
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.audit.writer import Store
from ucm_middleware.errors import ConfigurationError, LedgerFileError
from ucm_middleware.secret import SecretRing


class SQLiteLedger(QueuedLedger):
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
        super().__init__(capacity)

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

    def _try(self, secrets: SecretRing) -> Callable[[], Store]:
        store = _Store(self.path, self.keys, secrets)
        store.close()
        # From now on it must be this one: a ledger that disappears is not silently followed by an empty one.
        return partial(_Store, self.path, self.keys, secrets, store.known)

    def _reader(self, secrets: SecretRing) -> AbstractContextManager[RecordReader]:
        return LedgerReader.open(self.path, self.keys, secrets)


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
        self._file.append(entries_of(rows, self._vault))
        self.known.size = self._file.size

    def close(self) -> None:
        if self._vault is not None:
            self._vault.close()
        self._file.close()
