"""What durable ledgers have in common, wherever they write: the line of what waits, and when it is full."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Final

from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.reading import RecordReader
from ucm_middleware.audit.records import Row
from ucm_middleware.audit.writer import Store, Writer
from ucm_middleware.errors import ConfigurationError, LedgerUnavailableError
from ucm_middleware.forking import quiet_during_fork
from ucm_middleware.secret import SecretRing

CAPACITY: Final = 65_536
"""How many records may wait in line."""

PATIENCE: Final = 30.0
"""Seconds that synchronous code waits for room, or until what is in line is written."""

STOP_PATIENCE = 5.0
"""Seconds that a stop, and so the end of the process, tries to write the last records while that fails."""


class QueuedLedger(ABC):
    """A durable ledger but for where it writes: one thread writes what waits in line, many records at once.

    Up to ``capacity`` records wait in line. From half of that on, new contexts wait until there is room; at all of it,
    whatever appends waits, or is refused when nothing can be written. What has happened already, the end of a context,
    is kept in any case.

    Raises ConfigurationError.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = _checked_capacity(capacity)
        self._secrets: SecretRing | None = None
        self._writer: Writer | None = None
        self.after_fork()
        quiet_during_fork(self)

    @abstractmethod
    def _try(self, secrets: SecretRing) -> Callable[[], Store]:
        """Open once what is written to, and close it, so that what is wrong is told. Returns what opens it again."""

    @abstractmethod
    def _reader(self, secrets: SecretRing) -> AbstractContextManager[RecordReader]:
        """Open it to be read."""

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
        """Open it once, so that what is wrong is told before anything is served.

        Raises LedgerFileError, ConfigurationError in production without a secret, and for a second manager.
        """
        if self._writer is not None:
            raise ConfigurationError("this ledger has a manager already; give each a ledger of its own, at one place")
        self._secrets = secrets
        with self._reading:
            open_store = self._try(secrets)
        self._writer = writer = Writer(open_store)
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
        """As the port says, read from where it is kept: some milliseconds. Raises LedgerUnavailableError,
        LedgerFileError.
        """
        self.flush()
        assert self._secrets is not None
        with self._reading, self._reader(self._secrets) as reader:
            return reader.trail(user_id)

    def knows(self, user_id: str) -> bool:
        """As the port says, and as ``trail``."""
        self.flush()
        assert self._secrets is not None
        with self._reading, self._reader(self._secrets) as reader:
            return reader.knows(user_id)

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
