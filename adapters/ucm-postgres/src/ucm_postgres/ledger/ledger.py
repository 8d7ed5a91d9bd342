"""PostgresLedger: a durable ledger for all processes of all machines, in one database, each in a stream of its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

from ucm_middleware import ConfigurationError
from ucm_middleware.audit.entries import entries_of
from ucm_middleware.audit.erasure import checked_reason, erase_from
from ucm_middleware.audit.queued import CAPACITY, QueuedLedger
from ucm_middleware.audit.reading import RecordReader
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.audit.writer import Store
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.ids import validate_id
from ucm_middleware.secret import SecretRing
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.opening import Identity, open_ledger
from ucm_postgres.ledger.reading import open_reader
from ucm_postgres.ledger.stream import Entry, Stream


class PostgresLedger(QueuedLedger):
    """Records in PostgreSQL, hash-chained, a stream for each process, written by one thread of it.

    ``dsn`` is a URL or whatever else libpq takes, with a login that may add and read records: ``ledger_sql`` makes the
    tables and grants that. ``keys`` is a key file on this machine, for all of its processes: personal fields are then
    encrypted under keys of their users, which are kept there, so that a user can be erased; UCM_SECRET must be set for
    it in production. With ``keys=None`` everything stands in the clear, and nobody can be erased. It must be as
    ``ledger_sql(sealed=...)`` said.

    ``capacity`` is as for SQLiteLedger. Raises ConfigurationError.
    """

    def __init__(self, dsn: str, *, keys: str | Path | None, capacity: int = CAPACITY) -> None:
        self._target = Target(dsn)
        self.keys = None if keys is None else Path(keys).resolve()
        super().__init__(capacity)

    @property
    def name(self) -> str:
        """The database, without the password."""
        return self._target.name

    def erase(self, user_id: str, *, reason: str) -> int:
        """As ``SQLiteLedger.erase``, of the subjects that are in this machine's key file. Blocks."""
        if self.keys is None or self._secrets is None:
            raise ConfigurationError("nobody can be erased from a ledger without keys: begin one with keys=...")
        self.flush()
        with self._reading:
            return erase_at(self._target, self.keys, self._secrets, user_id, reason)

    def _try(self, secrets: SecretRing) -> Callable[[], Store]:
        connection, identity = open_ledger(self._target)
        connection.close()
        sealed = self.keys is not None
        if identity.sealed != sealed:
            made = "sealed" if identity.sealed else "in the clear"
            remedy = "give keys=..." if identity.sealed else "give keys=None"
            raise LedgerFileError(self.name, f"was made to be {made}, which cannot change", remedy)
        if self.keys is not None:
            # Made where there is none: which records there are that it does not open, cannot be told here. Other
            # machines have key files of their own.
            Vault.open(self.keys, identity.id, secrets).close()
        return partial(_Store, self._target, self.keys, secrets, identity, Stream(sealed=sealed))

    def _reader(self, secrets: SecretRing) -> AbstractContextManager[RecordReader]:
        return open_reader(self._target, self.keys, secrets)


def erase_at(target: Target, keys: Path, secrets: SecretRing, user_id: str, reason: str) -> int:
    """As ``ucm_middleware.audit.erasure.erase_user``; the record of it is in a stream of its own."""
    user_id, reason = validate_id(user_id, "user_id"), checked_reason(reason)
    connection, identity = open_ledger(target)
    with closing(connection), closing(Vault.open_existing(keys, identity.id, secrets)) as vault:
        stream = Stream(sealed=True)

        def append(entries: Sequence[Entry]) -> None:
            stream.append(target, connection, entries, len(entries))

        return erase_from(vault, append, user_id, reason)


class _Store:
    """A connection and the key file, open: what the writer's thread writes to."""

    __slots__ = ("_connection", "_stream", "_target", "_vault")

    def __init__(
        self, target: Target, keys: Path | None, secrets: SecretRing, identity: Identity, stream: Stream
    ) -> None:
        self._target = target
        self._stream = stream
        self._vault: Vault | None = None
        self._connection, found = open_ledger(target)
        try:
            if found != identity:
                raise LedgerFileError(
                    target.name, f"has the ledger {found.id}, and {identity.id} was here before", "put that one back"
                )
            stream.settle(target, self._connection)
            if keys is not None:
                self._vault = Vault.open_existing(keys, identity.id, secrets)
        except BaseException:
            self._connection.close()
            raise

    def write(self, rows: Sequence[Row]) -> None:
        # After an error, the same rows come again, and perhaps more: some may be there by now.
        left = rows[self._stream.done :]
        if left:
            self._stream.append(self._target, self._connection, entries_of(left, self._vault), len(left))
        self._stream.done = 0

    def close(self) -> None:
        if self._vault is not None:
            self._vault.close()
        self._connection.close()
