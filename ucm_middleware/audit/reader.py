"""Reading a ledger file back into records, while others write to it."""

import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from ucm_middleware.audit.database import LEDGER, errors_of, open_database
from ucm_middleware.audit.encoding import NOBODY
from ucm_middleware.audit.file import PART_BITS, read_header
from ucm_middleware.audit.reading import OPENED, RecordReader, Row
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import SecretRing

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


_ALL: Final = "SELECT sequence, subject, body, hash FROM records ORDER BY sequence"
_AT_ONCE: Final = 1024
"""How many records are read, and have their subjects looked up, together."""


class LedgerReader(RecordReader):
    """A ledger file, open to be read."""

    __slots__ = ("_connection", "stream")

    def __init__(
        self, path: Path, connection: sqlite3.Connection, stream: str, is_sealed: bool, vault: Vault | None
    ) -> None:
        super().__init__(str(path), is_sealed, vault)
        self._connection = connection
        self.stream = stream

    @classmethod
    @contextmanager
    def open(cls, path: Path, keys: Path | None, secrets: SecretRing) -> "Generator[LedgerReader]":
        """``with LedgerReader.open(path, keys, secrets) as reader:``. Raises LedgerFileError."""
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

    @property
    def size(self) -> int:
        """How many records there are."""
        [size] = self._connection.execute("SELECT size FROM ledger").fetchone()
        return int(size)

    def _chunks(self) -> Iterator[Sequence[Row]]:
        rows = self._connection.execute(_ALL)
        while chunk := rows.fetchmany(_AT_ONCE):
            yield [(self.stream, *row) for row in chunk]

    def _newest(self, token: bytes, shown: int) -> tuple[Sequence[bytes], bytes | None, int]:
        newest: list[bytes] = []
        opening: bytes | None = None
        number = 0
        for bodies in self._parts(token):  # the newest first
            number += len(bodies)
            if len(newest) < shown:
                newest[:0] = bodies
            if opening is None:
                opening = next((body for body in reversed(bodies) if body.startswith(OPENED)), None)
            if len(newest) >= shown and (opening is not None or token == NOBODY):
                [number] = self._connection.execute(_COUNT, (token,)).fetchone()
                break
        return newest[-shown:], opening, number

    def _has(self, token: bytes) -> bool:
        return next(self._parts(token), None) is not None

    def _parts(self, token: bytes) -> Iterator[list[bytes]]:
        """The bodies of a subject's records, in order within each part, the newest part first."""
        rows = self._connection.execute(_NEWEST_PARTS_FIRST, (token,))
        for _, part in groupby(rows, itemgetter(0)):
            yield [body for _, body in part]
