"""Cutting a connection of libpq off from its server."""

import os
import socket

from psycopg import OperationalError
from psycopg.pq.abc import PGconn


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
