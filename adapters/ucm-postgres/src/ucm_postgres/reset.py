"""What brings a connection back to a clean state, for its next borrower."""

from typing import Final

RESET: Final[tuple[str, ...]] = (
    "CLOSE ALL",
    "SET SESSION AUTHORIZATION DEFAULT",  # this resets the role too, which RESET ALL leaves as it is
    "RESET ALL",
    "UNLISTEN *",
    "SELECT pg_advisory_unlock_all()",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
)
"""The statements, for a connection whose transaction has been rolled back or has ended.

They are those of ``DISCARD ALL`` but for ``DEALLOCATE ALL`` and ``DISCARD PLANS``: drivers remember which statements
they have prepared, and SQLAlchemy on asyncpg breaks when these are gone. Unlike ``DISCARD ALL`` they may be sent
together, as one query, and inside of a transaction.
"""

RESET_QUERY: Final = "; ".join(RESET)
"""All of them as one simple query: one round trip."""
