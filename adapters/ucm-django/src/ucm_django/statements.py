"""What kind of statement it is, as far as that decides how it is tied."""

import re
from typing import Any, Final

import psycopg

# Nothing may be asked before it in a transaction, not even a setting, and it asks nothing itself.
_SET_TRANSACTION: Final = re.compile(r"\s*set\s+transaction\s[^;]*;?\s*", re.IGNORECASE)
_COMMIT: Final = re.compile(r"(^|;)\s*(commit|end)\b", re.IGNORECASE)
_ROLLBACK: Final = re.compile(r"\s*(rollback|abort)\b", re.IGNORECASE)


def is_set_transaction(sql: Any) -> bool:
    """Whether it says how the transaction is to be, and must come first."""
    return isinstance(sql, str) and _SET_TRANSACTION.fullmatch(sql) is not None


def is_commit(sql: Any) -> bool:
    """Whether it ends a transaction, to keep what was done, perhaps among other statements."""
    return isinstance(sql, str) and _COMMIT.search(sql) is not None


def is_rollback(sql: Any) -> bool:
    """Whether it ends a transaction without keeping anything."""
    return isinstance(sql, str) and _ROLLBACK.match(sql) is not None


def is_single(sql: Any, cursor: Any) -> bool:
    """Whether it is one statement, that a pipeline can send, and whose result does not stay on the server."""
    return (
        psycopg.Pipeline.is_supported()
        and isinstance(sql, str)
        and ";" not in sql.rstrip("; \t\r\n")
        and not isinstance(cursor, psycopg.ServerCursor)
    )
