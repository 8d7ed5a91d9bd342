"""What transactions on psycopg's connections have in common, asynchronous and in threads."""

import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, Connection, Error, OperationalError, ProgrammingError
from psycopg import IsolationLevel as PsycopgLevel
from psycopg.errors import InFailedSqlTransaction
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from ucm_middleware import IsolationLevel
from ucm_postgres.blocks import BUSY_MESSAGE, ENDED_MESSAGE, FAILED_MESSAGE, LOST_MESSAGE
from ucm_postgres.mark import Mark

LEVELS: Final[dict[IsolationLevel, PsycopgLevel]] = {
    "READ COMMITTED": PsycopgLevel.READ_COMMITTED,
    "REPEATABLE READ": PsycopgLevel.REPEATABLE_READ,
    "SERIALIZABLE": PsycopgLevel.SERIALIZABLE,
}


def bind_query(settings: Sequence[tuple[str, str]]) -> tuple[bytes, list[str]]:
    """The statement that binds a transaction, and its parameters: nothing of a user's is part of the SQL."""
    calls = ", ".join(["set_config(%s, %s, true)"] * len(settings))
    return f"SELECT {calls}".encode(), [part for setting in settings for part in setting]


def refusal_of(connection: AsyncConnection[Any] | Connection[Any], mark: Mark | None) -> Error | None:
    """Why a COMMIT would not commit, which psycopg does not tell; None when it would."""
    if is_busy(connection):
        return ProgrammingError(BUSY_MESSAGE)
    if has_ended(connection, mark):
        return ProgrammingError(ENDED_MESSAGE)
    match connection.pgconn.transaction_status:
        case TransactionStatus.INERROR:
            return InFailedSqlTransaction(FAILED_MESSAGE)
        case TransactionStatus.UNKNOWN:
            return OperationalError(LOST_MESSAGE)
        case _:
            return None


def has_ended(connection: AsyncConnection[Any] | Connection[Any], mark: Mark | None) -> bool:
    """Whether the transaction with this mark is under way no more, and another may be. One that failed is."""
    match connection.pgconn.transaction_status:
        case TransactionStatus.IDLE:
            return True
        case TransactionStatus.INTRANS:
            return mark is not None and mark.is_gone()
        case _:
            return False


def is_busy(connection: AsyncConnection[Any] | Connection[Any]) -> bool:
    """Whether nothing can be asked on it before something else has ended: a generator of rows keeps the lock for it."""
    pgconn = connection.pgconn
    return (
        connection.lock.locked()
        or pgconn.pipeline_status != PipelineStatus.OFF
        or pgconn.transaction_status == TransactionStatus.ACTIVE
    )


def shut_down(pgconn: PGconn) -> None:
    """Let whatever waits for the server find the line dead, in whichever thread. The connection itself stays whole.

    To close it instead would free it under the feet of the thread that waits.
    """
    try:
        descriptor = os.dup(pgconn.socket)
    except OperationalError:
        return  # it is closed already
    with socket.socket(fileno=descriptor) as line:
        try:
            line.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the server was first
