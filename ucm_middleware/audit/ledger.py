"""Where records go: the port, and what more a ledger can do that keeps them for good."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ucm_middleware.audit.records import AuditRecord, Row
from ucm_middleware.secret import SecretRing


@dataclass(frozen=True, slots=True)
class Trail:
    """What a ledger knows of one user: the newest opening, and the records in the order they were written."""

    opening: AuditRecord | None
    records: tuple[AuditRecord, ...]
    dropped: int


@runtime_checkable
class Ledger(Protocol):
    """Keeps records. Called from any thread, on the request's path."""

    def append(self, row: Row) -> None:
        """Keep a record, which comes as its row."""
        ...

    def trail(self, user_id: str | None) -> Trail | None:
        """The trail of one user, None for a user never seen; of ``None``, the records that stand in no user's trail."""
        ...

    def knows(self, user_id: str) -> bool:
        """Whether there is a trail of this user. True where that cannot be told."""
        ...


class NoLedger:
    """Keeps nothing: the trail is switched off."""

    __slots__ = ()

    def append(self, row: Row) -> None:
        """Forget it."""

    def trail(self, user_id: str | None) -> Trail | None:
        """Nobody was ever seen."""
        return None

    def knows(self, user_id: str) -> bool:
        """Nobody can tell, so nobody is said to be unknown."""
        return True


@runtime_checkable
class DurableLedger(Ledger, Protocol):
    """Keeps records where they survive a crash, some moments after they were appended.

    What has been appended and is not durable yet waits in line. ``append`` never refuses a record while the line has
    room, and never drops one.
    """

    @property
    def lag(self) -> int:
        """How many records wait in line."""
        ...

    @property
    def problem(self) -> str | None:
        """Why records cannot be made durable at the moment, and what to do; None while they can."""
        ...

    def start(self, secrets: SecretRing) -> None:
        """Be ready to write. Called once, by the manager; the secrets are for what is hashed or encrypted.

        Raises LedgerFileError for a file that cannot be used, before anything is served.
        """
        ...

    @property
    def has_room(self) -> bool:
        """Whether the line has room for what a new context will append; if not, ``durable`` makes some."""
        ...

    def durable(self) -> Awaitable[None]:
        """What to await until all that was appended before the call is durable. Raises LedgerUnavailableError."""
        ...

    def flush(self, timeout: float) -> None:
        """The same from synchronous code, for so many seconds at most."""
        ...
