"""Reading a ledger in PostgreSQL back into records: of all streams, in the order of their times."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg

from ucm_middleware.audit.reading import OPENED, RecordReader, Row
from ucm_middleware.audit.subjects import Vault
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import SecretRing
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.opening import errors_of, in_chunks, open_ledger, reading
from ucm_postgres.ledger.schema import SCHEMA

# No stream knows of another one: what has an order between them are the times in their records. Not read as JSON: there
# is JSON that PostgreSQL cannot read, for a NUL in a string or for a character that the database's encoding lacks.
_BEGINNING: Final = "encode(substring(body FROM 1 FOR 99), 'escape')"
_AT: Final = f"""substring({_BEGINNING} FROM '^[{{]"event":"[a-z_]+","at":([-+.0-9e]+)')::float8"""
_NEWEST_FIRST: Final = f"ORDER BY {_AT} DESC, stream DESC, sequence DESC"
_NEWEST: Final = f"""SELECT body, count(*) OVER () FROM {SCHEMA}.records
    WHERE subject = %s {_NEWEST_FIRST} LIMIT %s""".encode()
_OPENING: Final = f"""SELECT body FROM {SCHEMA}.records
    WHERE subject = %s AND substring(body FROM 1 FOR {len(OPENED)}) = %s {_NEWEST_FIRST} LIMIT 1""".encode()
_HAS: Final = f"SELECT EXISTS (SELECT FROM {SCHEMA}.records WHERE subject = %s)".encode()
_COUNT: Final = f"SELECT count(*) FROM {SCHEMA}.records".encode()
_ALL: Final = f"SELECT stream, sequence, subject, body, hash FROM {SCHEMA}.records ORDER BY stream, sequence".encode()
_LONGEST: Final = f"SELECT max(octet_length(body)) FROM {SCHEMA}.records".encode()


class PostgresReader(RecordReader):
    """A ledger in PostgreSQL, open to be read.

    With the key file of one machine, records that other machines wrote are as if no key were there.
    """

    __slots__ = ("_connection", "_target")

    def __init__(
        self, target: Target, connection: psycopg.Connection[Any], is_sealed: bool, vault: Vault | None
    ) -> None:
        super().__init__(target.name, is_sealed, vault)
        self._target = target
        self._connection = connection

    @property
    def size(self) -> int:
        """How many records there are, of all streams."""
        with errors_of(self._target):
            row = self._connection.execute(_COUNT).fetchone()
        return 0 if row is None else int(row[0])

    def knows(self, user_id: str) -> bool:
        """Whether the ledger has anything of a user. True where another machine's key file would have to say."""
        return self.is_sealed or super().knows(user_id)

    def _chunks(self) -> Iterator[Sequence[Row]]:
        with errors_of(self._target), self._connection.cursor("records", binary=True) as cursor:
            longest = self._connection.execute(_LONGEST).fetchone()
            cursor.execute(_ALL)
            yield from in_chunks(cursor, longest and longest[0])

    def _newest(self, token: bytes, shown: int) -> tuple[Sequence[bytes], bytes | None, int]:
        with errors_of(self._target):
            newest = self._connection.execute(_NEWEST, (token, shown)).fetchall()
            opening = self._connection.execute(_OPENING, (token, OPENED)).fetchone()
        number = newest[0][1] if newest else 0
        return [body for body, _ in reversed(newest)], None if opening is None else opening[0], number

    def _has(self, token: bytes) -> bool:
        with errors_of(self._target):
            row = self._connection.execute(_HAS, (token,)).fetchone()
        return row is not None and bool(row[0])


@contextmanager
def open_reader(target: Target, keys: Path | None, secrets: SecretRing) -> Generator[PostgresReader]:
    """``with open_reader(target, keys, secrets) as reader:``. Raises LedgerFileError."""
    with ExitStack() as stack:
        opened, identity = open_ledger(target)
        connection = stack.enter_context(closing(opened))
        if keys is not None and not identity.sealed:
            raise LedgerFileError(target.name, "was begun without keys", "read it without")
        vault = None
        if keys is not None:
            vault = stack.enter_context(closing(Vault.open_existing(keys, identity.id, secrets, read_only=True)))
        stack.enter_context(reading(target, connection))
        yield PostgresReader(target, connection, identity.sealed, vault)
