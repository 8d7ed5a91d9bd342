"""Ledgers in PostgreSQL for tests: one that is made, and what is in it, read and checked without the product's code."""

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import psycopg

from support.postgres import Database, Login
from ucm_middleware.audit.records import AuditRecord, Event
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing
from ucm_postgres.ledger import PostgresLedger, ledger_sql

SECRET = secrets.token_urlsafe(32)


def ring(secret: str = SECRET) -> SecretRing:
    """The secrets of an application that was given one."""
    return SecretRing.from_settings(secret, None, IsolatedEnvironment(environ={}))


def make_ledger(database: Database, *, sealed: bool = False, readers: Sequence[str] = ()) -> None:
    """The tables, which belong to the owner; `app` may write."""
    database.execute(f"grant create on database {database.name} to {{owner}}", as_=database.superuser)
    database.execute(ledger_sql(database.app.user, sealed=sealed, readers=readers))


def started(dsn: str, **options: Any) -> PostgresLedger:
    """A ledger as a manager starts it, in the clear unless told otherwise."""
    ledger = PostgresLedger(dsn, **{"keys": None, **options})
    ledger.start(ring())
    return ledger


def row(user_id: str | None = "alice", number: int = 1, event: Event = "opened", **more: Any) -> AuditRecord:
    """A record with a context of its own."""
    return AuditRecord(event, 1000.0 + number, user_id, context=number, request=number, record_id=number, **more)


def streams(login: Login, *, sealed: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The bodies of all records, by stream, each chain checked by docs/reference/ledger-format.md alone."""
    with psycopg.connect(login.dsn) as connection:
        rows = connection.execute(
            "select stream, sequence, subject, body, hash from ucm_ledger.records order by stream, sequence"
        ).fetchall()
        begun = {stream for (stream,) in connection.execute("select stream from ucm_ledger.streams").fetchall()}
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    kind, head = "sealed" if sealed else "plain", b""
    for stream, sequence, subject, body, digest in rows:
        if sequence == 1:
            head = hashlib.sha256(f"ucm-middleware ledger 1\n{stream}\n{kind}".encode()).digest()
        head = hashlib.sha256(b"\x00" + head + subject + body).digest()
        assert (sequence, digest) == (len(found[stream]) + 1, head), f"record {sequence} of {stream}"
        found[stream].append(json.loads(body))
    assert begun == found.keys()
    return dict(found)


def numbers(login: Login) -> list[int]:
    """The numbers of all records of all streams, which are their ids."""
    return sorted(int(record["id"], 16) for records in streams(login).values() for record in records)
