"""Connections to a ledger in PostgreSQL, found to be one; and errors for people."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from ucm_middleware.errors import LedgerFileError
from ucm_postgres.connecting import Target
from ucm_postgres.ledger.schema import FORMAT, SCHEMA

_MAKE: Final = "run what ucm_postgres.ledger.ledger_sql(...) returns, once, as the tables' owner"
_GRANT: Final = "run what ucm_postgres.ledger.grants_sql(...) returns, as the tables' owner"

_AT_ONCE: Final = 1024
_AT_ONCE_BYTES: Final = 16 * 1024 * 1024

# A server that does not answer any more is noticed, and not waited for until TCP gives up.
_OPTIONS: Final[dict[str, Any]] = {
    "application_name": "ucm ledger",
    "autocommit": True,
    "client_encoding": "UTF8",  # else psycopg gives bytes for text where the database's encoding is SQL_ASCII
    "prepare_threshold": None,  # a pooler may give the next transaction another server connection
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,  # milliseconds
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a ledger says of itself: its name, which its key files have too, and whether it is sealed."""

    id: str
    sealed: bool


def open_ledger(target: Target) -> tuple[psycopg.Connection[Any], Identity]:
    """A connection in autocommit mode, to a ledger. Raises LedgerFileError."""
    with errors_of(target):
        connection = target.connect(**_OPTIONS)
        try:
            rows = connection.execute(f"SELECT id, format, sealed FROM {SCHEMA}.ledger".encode()).fetchall()
            if len(rows) != 1:
                raise LedgerFileError(target.name, f"its ledger says {len(rows)} times what it is", "restore it")
            [(name, version, sealed)] = rows
            if version != FORMAT:
                raise LedgerFileError(
                    target.name,
                    f"has a ledger of format {version}, and this version of ucm-postgres knows format {FORMAT}",
                    "use the version that made it",
                )
        except BaseException:
            connection.close()
            raise
    return connection, Identity(name, sealed)


@contextmanager
def reading(target: Target, connection: psycopg.Connection[Any]) -> Generator[None]:
    """One state of the ledger, in which nothing can be written, and in which no policy hides a row."""
    with errors_of(target):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute("SET LOCAL row_security = off")
        try:
            yield
        finally:
            if connection.info.transaction_status in {TransactionStatus.INTRANS, TransactionStatus.INERROR}:
                connection.execute("ROLLBACK")


def in_chunks(cursor: psycopg.ServerCursor[Any], longest: int | None) -> Generator[list[tuple[Any, ...]]]:
    """All rows of a cursor, whose longest body has so many bytes, as many at once as memory is for. A login that may
    add records may add long ones.
    """
    number = max(1, min(_AT_ONCE, _AT_ONCE_BYTES // max(1, longest or 1)))
    while rows := cursor.fetchmany(number):
        yield rows


@contextmanager
def errors_of(target: Target) -> Generator[None]:
    """What psycopg raises within, as LedgerFileError. What it says of values is left out: they are records."""
    try:
        yield
    except psycopg.Error as error:
        raise LedgerFileError(target.name, *_explained(error, target.reason_of(error))) from None


def _explained(error: psycopg.Error, reason: str) -> tuple[str, str]:
    match error:
        case errors.UndefinedTable() | errors.InvalidSchemaName() | errors.UndefinedColumn():
            return f"has no ledger as this version knows it ({reason})", _MAKE
        case errors.InsufficientPrivilege():
            return f"the login may not do this ({reason})", _GRANT
        case errors.UniqueViolation():
            return (
                "something else has written records to this process's stream",
                "see what `ucm audit verify` says; a process that is started anew begins another stream",
            )
        case errors.ReadOnlySqlTransaction():
            return f"cannot be written to ({reason})", "see that this is the primary server, and no standby"
        case errors.QueryCanceled():
            return f"took too long ({reason})", "see what holds it up; writing goes on by itself"
        case psycopg.DataError():
            return (
                f"has a record that cannot be read ({reason})",
                "it was damaged or changed: see what `ucm audit verify` says",
            )
        case psycopg.OperationalError():
            return (
                f"cannot be reached ({reason})",
                "see that the server runs, and lets this login in from here; writing goes on by itself",
            )
        case _:
            return f"PostgreSQL says: {reason}", "see what its log says"
