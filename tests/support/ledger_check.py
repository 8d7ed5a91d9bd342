"""Reads a ledger and checks its chain by docs/reference/ledger-format.md alone: no code of the product's is used."""

import hashlib
import json
import sqlite3
from base64 import b64decode
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Record = dict[str, Any]
"""The members of a record's body, opened where it was sealed, with ``user`` in either case."""


@dataclass(slots=True)
class LedgerCheck:
    """Goes on where it stopped: what was checked before must still be what the next record is chained to.

    ``secret`` opens what is sealed under the key file ``keys``.
    """

    path: Path
    keys: Path | None = None
    secret: str = ""
    size: int = 0
    _head: bytes = b""
    _frontier: list[bytes] = field(default_factory=list[bytes])

    def read(self) -> list[Record]:
        """The records that came since, checked: sequence, hashes, size, head and frontier. AssertionError if not."""
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("BEGIN")
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            [(stream, sealed, size, head, frontier)] = connection.execute(
                "SELECT stream, sealed, size, head, frontier FROM ledger"
            ).fetchall()
            rows = connection.execute(
                "SELECT sequence, subject, body, hash FROM records WHERE sequence > ? ORDER BY sequence", (self.size,)
            ).fetchall()
        assert bool(sealed) == (self.keys is not None)
        if not self.size:
            kind = "sealed" if sealed else "plain"
            self._head = hashlib.sha256(f"ucm-middleware ledger 1\n{stream}\n{kind}".encode()).digest()
        for sequence, subject, body, digest in rows:
            self._add(sequence, subject, body, digest)
        assert (size, head, frontier) == (self.size, self._head, b"".join(self._frontier))
        subjects = {} if self.keys is None else self._subjects(stream, self.keys)
        return [_opened(subject, body, subjects) for _, subject, body, _ in rows]

    def _add(self, sequence: int, subject: bytes, body: bytes, digest: bytes) -> None:
        assert sequence == self.size + 1, f"record {sequence} follows record {self.size}"
        node = hashlib.sha256(b"\x00" + self._head + subject + body).digest()
        assert node == digest, f"record {sequence} is not chained to the one before"
        self._head = node
        self.size += 1
        size = sequence
        while size % 2 == 0:
            node = hashlib.sha256(b"\x01" + self._frontier.pop() + node).digest()
            size //= 2
        self._frontier.append(node)

    def _subjects(self, stream: str, keys: Path) -> dict[bytes, tuple[AESGCM, str]]:
        with closing(sqlite3.connect(keys)) as connection:
            [(of_stream, sealed_master)] = connection.execute("SELECT stream, master FROM vault").fetchall()
            rows = connection.execute("SELECT subject, sealed FROM subjects").fetchall()
        assert of_stream == stream
        master = _unsealed(AESGCM(_derived(self.secret.encode(), "audit vault")), sealed_master, b"")
        cipher = AESGCM(_derived(master, "subjects"))
        found: dict[bytes, tuple[AESGCM, str]] = {}
        for subject, sealed in rows:
            plain = _unsealed(cipher, sealed, subject)
            found[subject] = AESGCM(plain[:32]), plain[32:].decode()
        assert len({user for _, user in found.values()}) == len(found), "a user has two subjects"
        return found


def each_once(records: list[Record]) -> set[str]:
    """The ids of the records, of which no two are the same."""
    counted = Counter(record["id"] for record in records)
    assert [record_id for record_id, count in counted.items() if count > 1] == []
    return set(counted)


def _opened(subject: bytes, body: bytes, subjects: dict[bytes, tuple[AESGCM, str]]) -> Record:
    record: Record = json.loads(body)
    sealed = record.pop("sealed", None)
    if sealed is not None:
        cipher, record["user"] = subjects[subject]
        record |= json.loads(_unsealed(cipher, b64decode(sealed), subject))
    if "request" not in record and "context" in record:
        record["request"] = record["context"].replace("context_", "request_", 1)
    return record


def _unsealed(cipher: AESGCM, sealed: bytes, associated: bytes) -> bytes:
    return cipher.decrypt(sealed[:12], sealed[12:], associated)


def _derived(secret: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), 32, None, f"ucm-middleware 1 {purpose}".encode()).derive(secret)
