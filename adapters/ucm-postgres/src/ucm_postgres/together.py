"""Statements that are sent together by psycopg, and answered together: one round trip.

psycopg's own pipelines wait for the answer to a BEGIN, and end with a Flush behind their Sync. For one that reaches
PgBouncer outside of a transaction it takes a server connection, which it then does not give back. So this hands them to
libpq, by psycopg's interface to it (``psycopg.pq``), in what ``Connection.wait`` and ``AsyncConnection.wait`` run.
"""

from collections.abc import Generator, Sequence
from struct import pack
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait

Statement = tuple[bytes, Sequence[bytes]]
"""With ``$1`` and so on, and their values: each as text, or an array as ``bytea_array`` makes it."""

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

T = TypeVar("T")
Waiting = Generator[Wait, Ready | int, T]

_FINE: Final = frozenset({ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK})
_BYTEA: Final = 17
"""The type's number."""


class BinaryArray(bytes):
    """An array in the server's binary format."""

    __slots__ = ()


def bytea_array(values: Sequence[bytes]) -> BinaryArray:
    """Values as a ``bytea[]``: of one dimension, which begins at 1, without NULLs."""
    parts = [pack("!iiiii", 1, 0, _BYTEA, len(values), 1)]
    for value in values:
        parts += (pack("!i", len(value)), value)
    return BinaryArray(b"".join(parts))


def together(connection: AnyConnection, statements: Sequence[Statement]) -> Waiting[None]:
    """Run them and nothing else, for the connection's ``wait``: ``connection.wait(together(connection, statements))``.
    psycopg adds no BEGIN. Raises the psycopg.Error of the first that fails; those behind it are not run.
    """
    failed: list[PGresult] = []
    try:
        yield from _run(connection.pgconn, statements, failed)
    except psycopg.OperationalError:
        if not failed:  # else the server has said why it ended the connection
            raise
    if failed:
        raise errors.error_from_result(failed[0], encoding=connection.info.encoding)


def _run(pgconn: PGconn, statements: Sequence[Statement], failed: list[PGresult]) -> Waiting[None]:
    pgconn.enter_pipeline_mode()
    for command, values in statements:
        formats = [Format.BINARY if isinstance(value, BinaryArray) else Format.TEXT for value in values]
        pgconn.send_query_params(command, values, param_formats=formats)
    pgconn.pipeline_sync()
    while pgconn.flush():
        if (yield from _until(Wait.RW)) & Ready.R:
            pgconn.consume_input()
    while (result := (yield from _result(pgconn))) is None or result.status != ExecStatus.PIPELINE_SYNC:
        if result is not None and result.status not in _FINE:
            failed.append(result)
    pgconn.exit_pipeline_mode()


def _result(pgconn: PGconn) -> Waiting[PGresult | None]:
    while pgconn.is_busy():
        yield from _until(Wait.R)
        pgconn.consume_input()
    return pgconn.get_result()


def _until(what: Wait) -> Waiting[Ready | int]:
    while not (ready := (yield what)):  # it also comes back to look for signals
        continue
    return ready
