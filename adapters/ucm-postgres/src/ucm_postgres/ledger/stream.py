"""The stream of one process: its chain, and what became of a batch whose commit was never answered."""

import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.pq import ConnStatus

from ucm_middleware.audit.chain import Chain, genesis
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.forking import renewed_after_fork
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.opening import errors_of
from ucm_postgres.ledger.schema import SCHEMA
from ucm_postgres.together import Statement, bytea_array, together

Entry = tuple[bytes, bytes]
"""Subject and body of a record."""

_MOST_BYTES: Final = 16 * 1024 * 1024
"""Of bodies in one statement; one body may have half of it."""

PATIENCE = 10.0
"""Seconds that one statement may take."""

# A server may be set to answer before a record is on its disk. Stronger settings than "on" stay as they are.
_SETTINGS: Final = b"""SELECT set_config('statement_timeout', $1, true), set_config('synchronous_commit',
    CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END,
    true)"""
_BEGIN_STREAM: Final = f"INSERT INTO {SCHEMA}.streams (stream) VALUES ($1)".encode()
_ADD: Final = f"""INSERT INTO {SCHEMA}.records
    SELECT $1, $2::bigint + number, subject, body, hash
    FROM unnest($3::bytea[], $4::bytea[], $5::bytea[]) WITH ORDINALITY AS new (subject, body, hash, number)""".encode()
_LAST: Final = f"""SELECT sequence, hash FROM {SCHEMA}.records
    WHERE stream = %s ORDER BY sequence DESC LIMIT 1""".encode()


@dataclass(frozen=True, slots=True)
class _Batch:
    """What was sent, and not answered yet: from how many records, and the chain as it is behind them."""

    rows: int
    chain: Chain


class Stream:
    """The chain of this process, whenever it connects anew; a forked child has one of its own.

    Nobody else writes to it, so that processes wait for nothing of each other, and where it ends is known here.
    """

    def __init__(self, *, sealed: bool) -> None:
        self._sealed = sealed
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin another one."""
        self.name = f"stream_{secrets.token_hex(16)}"
        self._chain = Chain(0, genesis(self.name, sealed=self._sealed), b"")
        self._unanswered: list[_Batch] = []
        """Of the same place in the stream, so that at most one of them is ever there."""
        self.done = 0
        """Of how many records, that are about to be written again, an attempt was a success: until all are, as whoever
        writes them says.
        """

    def settle(self, target: Target, connection: psycopg.Connection[Any]) -> None:
        """Find out, on a new connection, where the stream ends. Raises LedgerFileError where it ends otherwise than it
        was written.
        """
        with errors_of(target):
            row = connection.execute(_LAST, (self.name,)).fetchone()
        size, head = (0, genesis(self.name, sealed=self._sealed)) if row is None else row
        if (size, head) == (self._chain.size, self._chain.head):
            return  # a server that is still busy with a commit may be through with it later
        for batch in self._unanswered:
            if (size, head) == (batch.chain.size, batch.chain.head):
                self._chain, self._unanswered = batch.chain, []
                self.done += batch.rows
                return
        raise LedgerFileError(
            target.name,
            f"has {size} records of {self.name}, and the {self._chain.size} that were acknowledged in this process are "
            "not all there, or there are others",
            "see whether a standby took over without them; restart to go on with another stream",
        )

    def append(self, target: Target, connection: psycopg.Connection[Any], entries: Sequence[Entry], rows: int) -> None:
        """Add records, all or none, which were made of so many rows, behind those that are ``done``; they are durable
        when this returns. Raises LedgerFileError: whether they are there then, ``settle`` finds out.
        """
        start, chain = self._chain, self._chain.copy()
        hashes = [chain.append(subject, body) for subject, body in entries]
        self._unanswered.append(_Batch(rows, chain))
        # All is sent at once, and answered at once; after an error nothing is done, the commit included, and this
        # connection is not used again.
        name = self.name.encode()
        statements: list[Statement] = [(b"BEGIN", ()), (_SETTINGS, (b"%dms" % round(PATIENCE * 1000),))]
        if not start.size:
            statements.append((_BEGIN_STREAM, (name,)))
        for first, last in _parts(entries):
            columns = [bytea_array(each) for each in (*zip(*entries[first:last], strict=True), hashes[first:last])]
            statements.append((_ADD, (name, b"%d" % (start.size + first), *columns)))
        statements.append((b"COMMIT", ()))
        with errors_of(target), self._answered(connection):
            connection.wait(together(connection, statements))
        self._chain, self._unanswered = chain, []

    @contextmanager
    def _answered(self, connection: psycopg.Connection[Any]) -> Generator[None]:
        """Let go of what was sent last where the server has refused it, so that only what may yet be there is kept."""
        try:
            yield
        except psycopg.Error:
            if connection.info.status == ConnStatus.OK:
                self._unanswered.pop()
            raise


def _parts(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """The entries in parts that a statement may have."""
    parts: list[tuple[int, int]] = []
    first = length = 0
    for number, (_, body) in enumerate(entries):
        if length and length + len(body) > _MOST_BYTES:
            parts.append((first, number))
            first, length = number, 0
        length += len(body)
    return [*parts, (first, len(entries))]
