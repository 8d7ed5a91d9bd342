"""Reading a ledger file back into records, while others write to it."""

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from ucm_middleware.audit.database import LEDGER, errors_of, open_database
from ucm_middleware.audit.encoding import NOBODY, Subject, decode, plain_token
from ucm_middleware.audit.file import PART_BITS, read_header
from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.records import TRUSTED_CODE, AuditRecord, iso
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import SecretRing

SHOWN: Final = 1000
"""How many of a user's newest records a trail has."""

_PARTS: Final = f"""WITH RECURSIVE part (number) AS (
    SELECT (SELECT max(sequence) FROM records) >> {PART_BITS}
    UNION ALL SELECT number - 1 FROM part WHERE number > 0
)"""
_OF_SUBJECT: Final = (
    f"FROM part CROSS JOIN records ON records.sequence >> {PART_BITS} = part.number AND records.subject = ?"
)
_COUNT: Final = f"{_PARTS} SELECT count(*) {_OF_SUBJECT}"
_NEWEST_PARTS_FIRST: Final = f"{_PARTS} SELECT part.number, records.body {_OF_SUBJECT}"
"""In order within a part, but the newest part first: to sort them all would take as long as to read them all."""

_OPENED: Final = b'{"event":"opened",'


_ALL: Final = "SELECT sequence, subject, body, hash FROM records ORDER BY sequence"
_AT_ONCE: Final = 1024
"""How many records are read, and have their subjects looked up, together."""


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


class LedgerReader:
    """A ledger file, open to be read: what was durable when it was first asked."""

    __slots__ = ("_connection", "_path", "_vault", "is_sealed", "stream")

    def __init__(
        self, path: Path, connection: sqlite3.Connection, stream: str, is_sealed: bool, vault: Vault | None
    ) -> None:
        self._path = path
        self.is_sealed = is_sealed
        self._connection = connection
        self._vault = vault
        self.stream = stream

    @classmethod
    @contextmanager
    def open(cls, path: Path, keys: Path | None, secrets: SecretRing) -> "Generator[LedgerReader]":
        """``with LedgerReader.open(path, keys, secrets) as reader:``. Raises LedgerFileError.

        Without keys, of a ledger whose personal fields are encrypted, only what stands in the clear can be read.
        """
        with ExitStack() as stack:
            connection = stack.enter_context(closing(open_database(path, LEDGER, read_only=True)))
            stack.enter_context(errors_of(path))
            stream, sealed = read_header(path, connection)
            if keys is not None and not sealed:
                raise LedgerFileError(str(path), "was begun without keys", "read it without")
            vault = None
            if keys is not None:
                vault = stack.enter_context(closing(Vault.open_existing(keys, stream, secrets, read_only=True)))
            connection.execute("BEGIN")  # one state of the ledger, until it is closed
            yield cls(path, connection, stream, sealed, vault)

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
        records: list[AuditRecord] = []
        opening: AuditRecord | None = None
        number = 0
        for bodies in self._parts(token):  # the newest first
            number += len(bodies)
            if len(records) < shown:
                records[:0] = [self._decoded(user_id, subject, body) for body in bodies]
            opened = [body for body in bodies if body.startswith(_OPENED)]
            if opened and opening is None and user_id is not None:
                opening = self._decoded(user_id, subject, opened[-1])
            if len(records) >= shown and (opening is not None or user_id is None):
                [number] = self._connection.execute(_COUNT, (token,)).fetchone()
                break
        if not records and user_id is not None:
            return None
        return Trail(opening, tuple(records[-shown:]), number - len(records[-shown:]))

    def knows(self, user_id: str) -> bool:
        """Whether the ledger has anything of a user."""
        if self._vault is None:
            token = plain_token(user_id)
        elif (subject := self._vault.find(user_id)) is None:
            return False
        else:
            token = subject.token
        return next(self._parts(token), None) is not None

    @property
    def size(self) -> int:
        """How many records there are."""
        [size] = self._connection.execute("SELECT size FROM ledger").fetchone()
        return int(size)

    def records(self) -> Iterator[Stored]:
        """All records in order, few at a time in memory."""
        rows = self._connection.execute(_ALL)
        while chunk := rows.fetchmany(_AT_ONCE):
            tokens = {token for _, token, _, _ in chunk if token != NOBODY}
            behind = {} if self._vault is None else self._vault.behind(tokens)
            for sequence, token, body, digest in chunk:
                user_id, subject = behind.get(token, (None, None))
                record = self._decoded(user_id, subject, body)
                is_open = not self.is_sealed or token == NOBODY or subject is not None
                yield Stored(self.stream, sequence, None if token == NOBODY else token, digest, record, is_open)

    def _parts(self, token: bytes) -> Iterator[list[bytes]]:
        """The bodies of a subject's records, in order within each part, the newest part first."""
        rows = self._connection.execute(_NEWEST_PARTS_FIRST, (token,))
        for _, part in groupby(rows, itemgetter(0)):
            yield [body for _, body in part]

    def _decoded(self, user_id: str | None, subject: Subject | None, body: bytes) -> AuditRecord:
        try:
            return decode(user_id, subject, body, self._name_of)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise LedgerFileError(
                str(self._path),
                f"has a record that cannot be read ({type(error).__name__})",
                "it was damaged or changed: see what `ucm audit verify` says",
            ) from None

    def _name_of(self, token: bytes) -> str | None:
        return None if self._vault is None else self._vault.name_of(token)
