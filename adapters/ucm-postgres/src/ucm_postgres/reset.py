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
    # By SQL alone, PREPARE under the name that a driver has for a statement would answer for it to the next borrower.
    (
        "DO $$ DECLARE prepared text; BEGIN FOR prepared IN SELECT name FROM pg_catalog.pg_prepared_statements "
        "WHERE from_sql LOOP EXECUTE 'DEALLOCATE ' || pg_catalog.quote_ident(prepared); END LOOP; END $$"
    ),
)
"""The statements, for a connection whose transaction has been rolled back or has ended.

They do what ``DISCARD ALL`` does, but forget only those prepared statements that SQL has made, and no plans: drivers
remember which statements they have prepared, and SQLAlchemy on asyncpg breaks when these are gone. Unlike
``DISCARD ALL`` they may be sent together, as one query, and inside of a transaction.
"""

RESET_QUERY: Final = "; ".join(RESET)
"""All of them as one simple query: one round trip."""
