"""Ledgers for tests: rows that say little, and what a file holds, read without the product's own code."""

import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from ucm_middleware.audit.records import AuditRecord, Event
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.secret import SecretRing

SECRET = secrets.token_urlsafe(32)


def ring(secret: str = SECRET) -> SecretRing:
    """The secrets of an application that was given one."""
    return SecretRing.from_settings(secret, None, IsolatedEnvironment(environ={}))


def row(user_id: str | None = "alice", number: int = 1, event: Event = "opened", **more: Any) -> AuditRecord:
    """A record with a context of its own."""
    return AuditRecord(event, 1000.0 + number, user_id, context=number, request=number, record_id=number, **more)


def query(path: Path, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What SQLite answers, asked apart."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(statement, parameters).fetchall()
        connection.commit()
        return rows


def bodies(path: Path) -> list[str]:
    """The bodies of all records, in order."""
    return [body.decode() for (body,) in query(path, "SELECT body FROM records ORDER BY sequence")]


def bytes_of(folder: Path) -> bytes:
    """All that is in the files of a folder, but for the -shm files, in which SQLite notes who reads."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.endswith("-shm"))
    return b"".join(file.read_bytes() for file in files)
