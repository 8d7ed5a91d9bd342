"""What brings one of Django's connections back to a clean state, and to what Django had set on it."""

from collections.abc import Callable
from typing import Any

from ucm_postgres.reset import RESET_QUERY


def reset_connection(connection: Any, configure: Callable[[Any], object]) -> None:
    """Reset psycopg's connection, which is in no transaction: one round trip.

    ``configure`` is Django's: it sets again what RESET takes away, the time zone and the role of ``assume_role``. It
    costs a round trip for each that differs from what the login has by itself.
    """
    was_autocommit = connection.autocommit
    connection.autocommit = True  # or the reset would be undone with the transaction that follows
    connection.execute(RESET_QUERY)
    configure(connection)
    connection.autocommit = was_autocommit
