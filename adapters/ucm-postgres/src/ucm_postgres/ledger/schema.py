"""The tables of a ledger in PostgreSQL, made once by their owner; nothing here is run by an application."""

import secrets
from collections.abc import Sequence
from textwrap import dedent
from typing import Final

from ucm_middleware import ConfigurationError
from ucm_postgres.policies import quoted

SCHEMA: Final = "ucm_ledger"
FORMAT: Final = 1


def ledger_sql(*writers: str, sealed: bool, readers: Sequence[str] = ()) -> str:
    """The statements that make the tables of a new ledger, in the schema ``ucm_ledger``: for a migration, run once.

    Run them as an owner who is not the application's login. ``writers`` are the logins of applications, which may add
    records and read them, and neither change nor delete any; ``readers`` may read them, to verify. ``sealed`` is
    whether personal fields will be encrypted (``PostgresLedger(keys=...)``), which cannot change afterwards.

    Raises ConfigurationError for what cannot be a name, and without a writer.
    """
    # COLLATE "C": streams are walked in their order, and no locale's rules are needed for that.
    tables = f"""\
        CREATE SCHEMA {SCHEMA};
        REVOKE ALL ON SCHEMA {SCHEMA} FROM PUBLIC;
        CREATE TABLE {SCHEMA}.ledger (
            one integer PRIMARY KEY CHECK (one = 1),
            id text NOT NULL,
            format integer NOT NULL,
            sealed boolean NOT NULL
        );
        CREATE TABLE {SCHEMA}.streams (
            stream text COLLATE "C" PRIMARY KEY CHECK (stream ~ '^stream_[0-9a-f]{{32}}$'),
            begun timestamptz NOT NULL DEFAULT now(),
            login name NOT NULL DEFAULT session_user,
            client inet DEFAULT inet_client_addr()
        );
        CREATE TABLE {SCHEMA}.records (
            stream text COLLATE "C" NOT NULL,
            sequence bigint NOT NULL CHECK (sequence > 0),
            subject bytea NOT NULL CHECK (octet_length(subject) = 16),
            body bytea NOT NULL,
            hash bytea NOT NULL CHECK (octet_length(hash) = 32),
            PRIMARY KEY (stream, sequence)
        );
        CREATE INDEX records_by_subject ON {SCHEMA}.records (subject);
        INSERT INTO {SCHEMA}.ledger VALUES (1, 'ledger_{secrets.token_hex(16)}', {FORMAT}, {str(sealed).lower()});
        """
    return dedent(tables) + grants_sql(*writers, readers=readers)


def grants_sql(*writers: str, readers: Sequence[str] = ()) -> str:
    """The statements that let more logins write to a ledger that is there, or read it. Raises as ``ledger_sql``."""
    if "public" in (*writers, *readers):  # which is everybody, also in quotes
        raise ConfigurationError("writers and readers are logins, and 'public' is all of them; name each")
    if not writers and not readers:
        raise ConfigurationError("writers is empty; name the logins of the applications that write records")
    statements: list[str] = []
    if everybody := ", ".join(quoted(role, "writers") for role in (*writers, *readers)):
        statements += [
            f"GRANT USAGE ON SCHEMA {SCHEMA} TO {everybody};",
            f"GRANT SELECT ON {SCHEMA}.ledger, {SCHEMA}.streams, {SCHEMA}.records TO {everybody};",
        ]
    if who := ", ".join(quoted(role, "writers") for role in writers):
        statements += [
            f"GRANT INSERT (stream) ON {SCHEMA}.streams TO {who};",
            f"GRANT INSERT ON {SCHEMA}.records TO {who};",
        ]
    return "\n".join((*statements, ""))
