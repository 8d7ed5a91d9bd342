"""A durable ledger in PostgreSQL, for all processes of all machines. Needs psycopg."""

from ucm_postgres.ledger.ledger import PostgresLedger
from ucm_postgres.ledger.schema import grants_sql, ledger_sql

__all__ = ["PostgresLedger", "grants_sql", "ledger_sql"]
