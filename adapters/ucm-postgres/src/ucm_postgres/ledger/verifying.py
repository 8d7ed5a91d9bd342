"""Hands the streams of a ledger in PostgreSQL to the verifier. Imports nothing of what writes them."""

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import psycopg

from ucm_middleware.audit.verification import Claims, Row
from ucm_middleware.errors import LedgerFileError
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.opening import errors_of, in_chunks, open_ledger, reading
from ucm_postgres.ledger.schema import SCHEMA

_STREAM: Final = re.compile("stream_[0-9a-f]{32}")
_MOST_BYTES: Final = 16 * 1024 * 1024

# From one stream to the next by the index, since there may be millions of records of each.
_STREAMS: Final = f"""WITH RECURSIVE found AS (
    (SELECT stream FROM {SCHEMA}.records ORDER BY stream LIMIT 1)
    UNION ALL
    SELECT (SELECT stream FROM {SCHEMA}.records WHERE stream > found.stream ORDER BY stream LIMIT 1)
    FROM found WHERE found.stream IS NOT NULL
)
SELECT coalesce(found.stream, streams.stream), found.stream IS NOT NULL, streams.stream IS NOT NULL
FROM (SELECT stream FROM found WHERE stream IS NOT NULL) AS found FULL JOIN {SCHEMA}.streams USING (stream)
ORDER BY streams.begun NULLS LAST, 1""".encode()
# What is too long to be a record is not fetched.
_ROW: Final = f"""SELECT sequence, subject, CASE WHEN octet_length(body) <= {_MOST_BYTES} THEN body END, hash
    FROM {SCHEMA}.records WHERE stream = %s"""
_ROWS: Final = f"{_ROW} ORDER BY sequence".encode()
_LONGEST: Final = f"""SELECT max(octet_length(body)) FROM {SCHEMA}.records
    WHERE stream = %s AND octet_length(body) <= {_MOST_BYTES}""".encode()
_ONE_ROW: Final = f"{_ROW} AND sequence = %s".encode()


class StreamSource:
    """One stream, in the transaction that it was found in: ``ucm_middleware.audit.verification.Source``."""

    __slots__ = ("_connection", "_has_records", "_is_listed", "_sealed", "_stream", "_target")

    def __init__(
        self,
        target: Target,
        connection: psycopg.Connection[Any],
        stream: str,
        *,
        sealed: bool,
        has_records: bool,
        is_listed: bool,
    ) -> None:
        self._target = target
        self._connection = connection
        self._stream = stream
        self._sealed = sealed
        self._has_records = has_records
        self._is_listed = is_listed

    def claims(self) -> Claims | str:
        """As the port says."""
        if not _STREAM.fullmatch(self._stream):
            return "the stream's name is not the name of one"
        if not self._has_records:
            return "the stream began, with a first record, and has none: they were deleted"
        if not self._is_listed:
            return "there are records of the stream, and it is not among those that began"
        return Claims(self._stream, int(self._sealed), None)

    def rows(self) -> Iterator[Row]:
        """As the port says."""
        with errors_of(self._target), self._connection.cursor("verified", binary=True) as cursor:
            longest = self._connection.execute(_LONGEST, (self._stream,)).fetchone()
            cursor.execute(_ROWS, (self._stream,))
            for rows in in_chunks(cursor, longest and longest[0]):
                yield from rows

    def row(self, sequence: int) -> Row | None:
        """As the port says."""
        with errors_of(self._target):
            return self._connection.execute(_ONE_ROW, (self._stream, sequence), binary=True).fetchone()

    def damage(self, tick: Callable[[], None]) -> str | None:
        """PostgreSQL looks after its own structures: nothing."""
        tick()
        return None


@contextmanager
def open_sources(target: Target) -> Generator[list[tuple[str, StreamSource]]]:
    """All streams of a ledger, each with what a person calls it, in the order in which they began.

    Raises LedgerFileError where there is no ledger, or none that has begun.
    """
    opened, identity = open_ledger(target)
    with closing(opened) as connection, reading(target, connection):
        found = connection.execute(_STREAMS).fetchall()
        if not found:
            raise LedgerFileError(target.name, "has no records yet", "come back when an application has written to it")
        yield [
            (
                f"{target.name}#{stream if _STREAM.fullmatch(stream) else ascii(stream)}",
                StreamSource(
                    target,
                    connection,
                    stream,
                    sealed=identity.sealed,
                    has_records=has_records,
                    is_listed=is_listed,
                ),
            )
            for stream, has_records, is_listed in found
        ]
