"""Records back from a durable ledger, wherever it is kept."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ucm_middleware.audit.encoding import NOBODY, Subject, decode, plain_token
from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.records import TRUSTED_CODE, AuditRecord, iso
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.errors import LedgerFileError

SHOWN: Final = 1000
"""How many of a user's newest records a trail has."""

OPENED: Final = b'{"event":"opened",'
"""How the body of an opening begins."""

Row = tuple[str, int, bytes, bytes, bytes]
"""Stream, sequence, subject, body and hash."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it stands in a ledger. ``is_open`` is False when what it says is sealed and nothing here opens it."""

    stream: str
    sequence: int
    subject: bytes | None
    digest: bytes
    record: AuditRecord
    is_open: bool

    def to_dict(self) -> dict[str, object]:
        """All of it as plain values, for a program or an auditor; fields that say nothing are left out."""
        record = self.record
        shown: dict[str, object | None] = {
            "stream": self.stream,
            "sequence": self.sequence,
            "at": iso(record.at),
            "event": record.event,
            "outcome": record.outcome,
            "user": record.user_id,
            "subject": None if self.subject is None else self.subject.hex(),
            "actor": record.actor_id or None,
            "trusted_code": True if record.actor_id == TRUSTED_CODE else None,
            "id": f"{record.record_id:032x}" if record.record_id else None,
            "context": record.context_id,
            "request": record.request_id,
            "thread": record.thread_id,
            "run": record.run_id,
            "trace": f"{record.trace_id:032x}" if record.trace_id else None,
            "span": f"{record.span_id:016x}" if record.span_id else None,
            "reason": record.reason,
            "seconds": record.seconds,
            "data": dict(record.data) or None,
            "sealed": None if self.is_open else True,
            "hash": self.digest.hex(),
        }
        return {name: value for name, value in shown.items() if value is not None}


class RecordReader(ABC):
    """A ledger, open to be read: what was durable when it was first asked.

    Without a vault, of a ledger whose personal fields are encrypted, only what stands in the clear can be read.
    """

    __slots__ = ("_vault", "is_sealed", "name")

    def __init__(self, name: str, is_sealed: bool, vault: Vault | None) -> None:
        self.name = name
        self._vault = vault
        self.is_sealed = is_sealed

    @property
    @abstractmethod
    def size(self) -> int:
        """How many records there are."""

    @abstractmethod
    def _chunks(self) -> Iterator[Sequence[Row]]:
        """All records in order, few at a time."""

    @abstractmethod
    def _newest(self, token: bytes, shown: int) -> tuple[Sequence[bytes], bytes | None, int]:
        """Of a subject: the bodies of the newest records, in order; that of the newest opening; how many there are."""

    @abstractmethod
    def _has(self, token: bytes) -> bool:
        """Whether there is a record of a subject."""

    def trail(self, user_id: str | None, shown: int = SHOWN) -> Trail | None:
        """One user's newest records; None for a user that the ledger has nothing of. Of None, what is nobody's."""
        subject = None
        if user_id is None:
            token = NOBODY
        elif self._vault is None:
            token = plain_token(user_id)
        elif (subject := self._vault.find(user_id)) is None:
            return None
        else:
            token = subject.token
        bodies, opened, number = self._newest(token, shown)
        if not bodies and user_id is not None:
            return None
        opening = None if opened is None or user_id is None else self._decoded(user_id, subject, opened)
        records = tuple(self._decoded(user_id, subject, body) for body in bodies)
        return Trail(opening, records, number - len(records))

    def knows(self, user_id: str) -> bool:
        """Whether the ledger has anything of a user."""
        if self._vault is None:
            return self._has(plain_token(user_id))
        subject = self._vault.find(user_id)
        return subject is not None and self._has(subject.token)

    def records(self) -> Iterator[Stored]:
        """All records in order, few at a time in memory."""
        for chunk in self._chunks():
            tokens = {token for _, _, token, _, _ in chunk if token != NOBODY}
            behind = {} if self._vault is None else self._vault.behind(tokens)
            for stream, sequence, token, body, digest in chunk:
                user_id, subject = behind.get(token, (None, None))
                record = self._decoded(user_id, subject, body)
                is_open = not self.is_sealed or token == NOBODY or subject is not None
                yield Stored(stream, sequence, None if token == NOBODY else token, digest, record, is_open)

    def _decoded(self, user_id: str | None, subject: Subject | None, body: bytes) -> AuditRecord:
        try:
            return decode(user_id, subject, body, self._name_of)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise LedgerFileError(
                self.name,
                f"has a record that cannot be read ({type(error).__name__})",
                "it was damaged or changed: see what `ucm audit verify` says",
            ) from None

    def _name_of(self, token: bytes) -> str | None:
        return None if self._vault is None else self._vault.name_of(token)
