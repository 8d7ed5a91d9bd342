"""The beginning of a transaction and what binds it, sent by psycopg together: one round trip for both.

psycopg's own pipeline mode waits for the answer to the BEGIN that it sends by itself. So this hands both to libpq, by
psycopg's interface to it (``psycopg.pq``), in what ``Connection.wait`` runs.
"""

from collections.abc import Generator, Sequence
from typing import Any, Final

from psycopg import IsolationLevel
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn
from psycopg.waiting import Ready, Wait

Waiting = Generator[Wait, Ready, bool]

_FINE: Final = frozenset({ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK})


def begin_command(connection: Any) -> bytes:
    """What begins a transaction with the connection's settings: SQLAlchemy puts isolation levels there."""
    words = ["BEGIN"]
    level: IsolationLevel | None = connection.isolation_level
    if level is not None:
        words.append(f"ISOLATION LEVEL {level.name.replace('_', ' ')}")
    if connection.read_only is not None:
        words.append("READ ONLY" if connection.read_only else "READ WRITE")
    if connection.deferrable is not None:
        words.append("DEFERRABLE" if connection.deferrable else "NOT DEFERRABLE")
    return " ".join(words).encode()


def begin_at_once(pgconn: PGconn, commands: Sequence[bytes], bind: bytes, parameters: Sequence[bytes]) -> Waiting:
    """Send the commands and the binding, and wait for all of their answers. False when one of them is an error."""
    pgconn.enter_pipeline_mode()
    for command in commands:
        pgconn.send_query_params(command, None)
    pgconn.send_query_params(bind, parameters)
    pgconn.pipeline_sync()
    while pgconn.flush():
        if (yield from _until(Wait.RW)) & Ready.R:
            pgconn.consume_input()
    is_fine = True
    while (result := (yield from _result(pgconn))) is None or result.status != ExecStatus.PIPELINE_SYNC:
        is_fine = is_fine and (result is None or result.status in _FINE)
    pgconn.exit_pipeline_mode()
    return is_fine


def _result(pgconn: PGconn) -> Generator[Wait, Ready, Any]:
    while pgconn.is_busy():
        yield from _until(Wait.R)
        pgconn.consume_input()
    return pgconn.get_result()


def _until(what: Wait) -> Generator[Wait, Ready, Ready]:
    while not (ready := (yield what)):  # it also comes back to look for signals
        continue
    return ready
