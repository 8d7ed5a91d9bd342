"""Ledgers and checkpoints for tests, made straight from docs/reference/ledger-format.md with nothing of the package."""

import sqlite3
from base64 import b64encode
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

STREAM = "stream_" + "0123456789abcdef" * 2
ALICE, BOB, CAROL = (sha256(name).digest()[:16] for name in (b"alice", b"bob", b"carol"))

LEDGER_TABLE = """CREATE TABLE ledger (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    stream TEXT NOT NULL,      -- "stream_" and 32 random hexadecimal digits: names this chain, in checkpoints too
    sealed INTEGER NOT NULL,   -- 1 when personal fields are encrypted, 0 when they are in the clear
    size INTEGER NOT NULL,     -- how many records there are
    head BLOB NOT NULL,        -- 32 bytes: the hash of the last record, or the genesis hash when there is none
    frontier BLOB NOT NULL     -- n * 32 bytes: the roots of the full subtrees of the Merkle tree, the largest first
) STRICT"""
RECORDS_TABLE = """CREATE TABLE records (
    sequence INTEGER PRIMARY KEY,   -- 1, 2, 3, ... without a gap
    subject BLOB NOT NULL,          -- 16 bytes: in whose trail the record stands; 16 zero bytes for nobody's
    body BLOB NOT NULL,             -- the record, JSON
    hash BLOB NOT NULL              -- 32 bytes
) STRICT"""
SUBJECT_INDEX = "CREATE INDEX records_by_subject ON records (sequence >> 10, subject)"

Entry = tuple[bytes, bytes]
"""Subject and body of a record."""


def some_entries(number: int) -> list[Entry]:
    """Records of three users in turn, each different."""
    return [
        ((ALICE, BOB, CAROL)[n % 3], b'{"event":"opened","at":%d,"outcome":"ok"}' % (1_700_000_000 + n))
        for n in range(number)
    ]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a ledger with these entries has in it."""

    entries: tuple[Entry, ...]
    stream: str = STREAM
    sealed: int = 0

    @property
    def genesis(self) -> bytes:
        kind = ["plain", "sealed"][self.sealed]
        return sha256(b"ucm-middleware ledger 1\n" + self.stream.encode() + b"\n" + kind.encode()).digest()

    @property
    def hashes(self) -> list[bytes]:
        found = [self.genesis]
        for subject, body in self.entries:
            found.append(sha256(b"\x00" + found[-1] + subject + body).digest())
        return found[1:]

    @property
    def head(self) -> bytes:
        return [self.genesis, *self.hashes][-1]

    @property
    def frontier(self) -> bytes:
        hashes, found = self.hashes, b""
        while hashes:
            full = 1 << len(hashes).bit_length() - 1
            found += root_of(hashes[:full])
            hashes = hashes[full:]
        return found

    @property
    def root(self) -> bytes:
        return root_of(self.hashes)

    def first(self, number: int) -> "Facts":
        """The same ledger when it had so many records."""
        return replace(self, entries=self.entries[:number])

    def rows(self) -> list[tuple[int, bytes, bytes, bytes]]:
        """The table of records."""
        return [(n, *entry, hashed) for n, (entry, hashed) in enumerate(zip(self.entries, self.hashes, strict=True), 1)]


def root_of(leaf_hashes: Sequence[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, by its recursive definition."""
    if len(leaf_hashes) < 2:
        return leaf_hashes[0] if leaf_hashes else sha256(b"").digest()
    half = 1 << (len(leaf_hashes) - 1).bit_length() - 1
    return sha256(b"\x01" + root_of(leaf_hashes[:half]) + root_of(leaf_hashes[half:])).digest()


def facts(number: int, *, sealed: int = 0) -> Facts:
    """A ledger with so many records."""
    return Facts(tuple(some_entries(number)), sealed=sealed)


def write_ledger(
    path: Path,
    ledger: Facts,
    *,
    page_size: int = 4096,
    tables: tuple[str, str] = (LEDGER_TABLE, RECORDS_TABLE),
    index: str = SUBJECT_INDEX,
) -> Path:
    """Write a ledger's file, with no log beside it."""
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for setting in (f"page_size = {page_size}", "journal_mode = WAL", "synchronous = OFF"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute(f"PRAGMA application_id = {0x55434D4C}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("BEGIN")
        for statement in tables:
            connection.execute(statement)
        connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", ledger.rows())
        if index:
            connection.execute(index)
        claims = (ledger.stream, ledger.sealed, len(ledger.entries), ledger.head, ledger.frontier)
        connection.execute("INSERT INTO ledger VALUES (1, ?, ?, ?, ?, ?)", claims)
        connection.execute("COMMIT")
    return path


def append_entries(connection: sqlite3.Connection, before: Facts, entries: Sequence[Entry]) -> Facts:
    """Add records in one transaction, as a writer does."""
    after = replace(before, entries=(*before.entries, *entries))
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", after.rows()[len(before.entries) :])
    claims = (len(after.entries), after.head, after.frontier)
    connection.execute("UPDATE ledger SET size = ?, head = ?, frontier = ?", claims)
    connection.execute("COMMIT")
    return after


def tamper(path: Path, *statements: str, values: Sequence[Any] = ()) -> None:
    """Change a ledger with SQL, past everything that would refuse it; no log is left. ``values`` go to the last."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements[:-1]:
            connection.execute(statement)
        connection.execute(statements[-1], values)


def disguise(path: Path, name: str, sql: str) -> None:
    """Let the schema say that a table or an index was made by ``sql``, whatever it is."""
    tamper(path, "UPDATE sqlite_schema SET sql = ? WHERE name = ?", values=(sql, name))


def note(ledger: Facts, key: Ed25519PrivateKey) -> bytes:
    """The checkpoint over all of a ledger's records."""
    stream = ledger.stream.encode()
    signed = stream + b"\n%d\n" % len(ledger.entries) + b64encode(ledger.root) + b"\n"
    key_id = sha256(stream + b"\n" + b"\x01" + key.public_key().public_bytes_raw()).digest()[:4]
    return signed + "\n— ".encode() + stream + b" " + b64encode(key_id + key.sign(signed)) + b"\n"


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
