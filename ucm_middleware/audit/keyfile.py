"""The key file on disk: making it, and opening the one that belongs to a ledger and to the secret of the application.

The format is that of ``docs/reference/ledger-format.md``.
"""

import sqlite3
from os import urandom
from pathlib import Path
from typing import Final

from ucm_middleware.audit.database import (
    KEY_FILE,
    create_database,
    errors_of,
    exists,
    is_read_only,
    open_database,
    transaction,
)
from ucm_middleware.audit.sealing import cipher_of, seal, unseal
from ucm_middleware.environment import PREVIOUS_SECRETS_VARIABLE, SECRET_VARIABLE
from ucm_middleware.errors import LedgerFileError
from ucm_middleware.secret import Secret, SecretRing

PURPOSE: Final = "audit vault"
"""Of the subkey that the master key is sealed under."""

RESTORE: Final = "restore it from a backup, and erase again whoever was erased since"

_FEATURE: Final = "encrypted audit records"
_MASTER_BYTES: Final = 32

_SCHEMA: Final = (
    """CREATE TABLE vault (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    stream TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    master BLOB NOT NULL
) STRICT""",
    """CREATE TABLE subjects (
    lookup BLOB PRIMARY KEY,
    subject BLOB NOT NULL UNIQUE,
    sealed BLOB NOT NULL,
    bound_to BLOB
) STRICT, WITHOUT ROWID""",
)


def start_key_file(
    path: Path, stream: str, secrets: SecretRing, *, must_exist: bool
) -> tuple[sqlite3.Connection, Secret]:
    """As ``open_key_file``, for a writer that starts: makes it where there is none, and puts it under the current
    secret."""
    secrets.require(_FEATURE)
    if not must_exist and not exists(path):
        _create(path, stream, secrets.all[0])
    connection, fingerprint, secret = _open(path, stream, secrets)
    current = secrets.all[0]
    try:
        if fingerprint != current.fingerprint:
            with errors_of(path):
                _reseal(connection, fingerprint, secret, current)
    except BaseException:
        connection.close()
        raise
    return connection, Secret(secret)


def open_key_file(
    path: Path, stream: str, secrets: SecretRing, *, read_only: bool
) -> tuple[sqlite3.Connection, Secret]:
    """A connection to an existing one, and its master key, whichever of the secrets that is sealed under."""
    secrets.require(_FEATURE)
    connection, _, secret = _open(path, stream, secrets, read_only=read_only)
    return connection, Secret(secret)


def _open(
    path: Path, stream: str, secrets: SecretRing, *, read_only: bool = False
) -> tuple[sqlite3.Connection, str, bytes]:
    if not exists(path):
        raise LedgerFileError(str(path), "does not exist, and the ledger has records that nothing else opens", RESTORE)
    connection = open_database(path, KEY_FILE, read_only=read_only)
    try:
        with errors_of(path):
            return connection, *_master(connection, path, stream, secrets)
    except BaseException:
        connection.close()
        raise


def _create(path: Path, stream: str, current: Secret) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        for statement in _SCHEMA:
            connection.execute(statement)
        row = stream, current.fingerprint, _sealed_master(current, urandom(_MASTER_BYTES))
        connection.execute("INSERT INTO vault VALUES (1, ?, ?, ?)", row)

    create_database(path, KEY_FILE, fill)


def _master(connection: sqlite3.Connection, path: Path, stream: str, secrets: SecretRing) -> tuple[str, bytes]:
    rows = connection.execute("SELECT stream, fingerprint, master FROM vault").fetchall()
    if not rows:
        raise LedgerFileError(str(path), "is damaged: its master key is missing", RESTORE)
    [(of_stream, fingerprint, sealed)] = rows
    if of_stream != stream:
        raise LedgerFileError(
            str(path), f"belongs to the ledger {of_stream}, and not to {stream}", "name the key file of this ledger"
        )
    ours = {secret.fingerprint: secret for secret in secrets.all}
    if fingerprint not in ours:
        raise LedgerFileError(
            str(path),
            f"was made under a secret with the fingerprint {fingerprint}, and here are only {', '.join(ours)}",
            f"give that secret as {SECRET_VARIABLE}, or in {PREVIOUS_SECRETS_VARIABLE} to go over to the current one",
        )
    secret = unseal(cipher_of(ours[fingerprint].subkey(PURPOSE)), sealed, b"")
    if secret is None:
        raise LedgerFileError(str(path), "is damaged: its master key was altered", RESTORE)
    return fingerprint, secret


def _reseal(connection: sqlite3.Connection, fingerprint: str, secret: bytes, current: Secret) -> None:
    row = current.fingerprint, _sealed_master(current, secret), fingerprint
    try:
        with transaction(connection):
            # Where another process was faster, there is nothing left to do.
            connection.execute("UPDATE vault SET fingerprint = ?, master = ? WHERE fingerprint = ?", row)
    except sqlite3.Error as error:
        if not is_read_only(error):
            raise


def _sealed_master(current: Secret, secret: bytes) -> bytes:
    return seal(cipher_of(current.subkey(PURPOSE)), secret, b"")
