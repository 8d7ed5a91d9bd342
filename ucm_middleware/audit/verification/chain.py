"""Walks the records of a ledger in their order, and computes anew what they should hash to."""

import sqlite3
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from typing import Final

from ucm_middleware.audit.verification.source import Row, Source, Watch
from ucm_middleware.audit.verification.tree import MerkleTree

HASH_BYTES: Final = 32
SUBJECT_BYTES: Final = 16
MAX_RECORD_BYTES: Final = 16 * 1024 * 1024
"""No row may be longer: only one is held at a time, and this bounds it."""

UNREADABLE: Final = (sqlite3.Error, UnicodeDecodeError, MemoryError)
"""What reading a damaged database raises: the second when SQLite's message has a name in it that is not text, the third
when a record claims to be longer than there is memory.
"""

_STEP: Final = 1024
_LEAF: Final = b"\x00"


def genesis(stream: str, sealed: int) -> bytes:
    """The hash that the first record builds on."""
    return sha256(f"ucm-middleware ledger 1\n{stream}\n{'sealed' if sealed else 'plain'}".encode()).digest()


class Chain:
    """The records verified so far. ``fault`` is what is wrong with the next one, None as long as nothing is."""

    __slots__ = ("_rows", "_source", "_watch", "count", "fault", "head", "tree")

    def __init__(self, source: Source, start: bytes, watch: Watch | None = None) -> None:
        self._source = source
        self._watch = watch
        self._rows: Iterator[Row] | None = None
        self.count = 0
        self.head = start
        self.fault: str | None = None
        self.tree = MerkleTree()

    def walk(self, limit: int) -> bool:
        """Verify records until ``limit`` of them are, or some have been. False: there are no more, or one is bad."""
        before = self.count
        wanted = min(limit - before, _STEP)
        try:
            if self._rows is None:
                self._rows = self._source.rows()
            self._verify(islice(self._rows, wanted))
        except UNREADABLE as error:
            self._verify_singly(error)
        return self.fault is None and self.count - before == wanted

    def _verify(self, rows: Iterator[Row]) -> None:
        # Once for each record of millions: no call that is not needed, and what is wrong is found out afterwards.
        head, expected = self.head, self.count
        row: Row = ()
        leaves: list[bytes] = []
        join, append = b"".join, leaves.append
        if self._watch is not None:
            rows = _watched(rows, self._watch)
        try:
            for row in rows:
                sequence, subject, body, stored = row
                expected += 1
                hashed = sha256(join((_LEAF, head, subject, body))).digest()
                if hashed != stored or sequence != expected or len(subject) != SUBJECT_BYTES:
                    self.fault = _fault_of(row, expected, hashed)
                    break
                head = hashed
                append(hashed)
        except TypeError:  # from the join: a column is not a blob
            self.fault = _fault_of(row, expected, b"")
        finally:
            self.count += len(leaves)
            self.head = head
            self.tree.extend(leaves)

    def _verify_singly(self, error: Exception) -> None:
        """Find the record that ``error`` is about: sqlite3 reads ahead, and drops the row before the error."""
        try:
            while self.fault is None:
                row = self._source.row(self.count + 1)
                if row is None:
                    self.fault = f"it cannot be read: {reason_of(error)}"
                else:
                    self._verify(iter((row,)))
        except UNREADABLE as its_own:
            self.fault = f"it cannot be read: {reason_of(its_own)}"


def _watched(rows: Iterator[Row], watch: Watch) -> Iterator[Row]:
    for row in rows:
        yield row
        watch(row)  # whoever goes on has found it good


def reason_of(error: Exception) -> str:
    """What SQLite said, without whatever in it would command a terminal."""
    text = str(error) or "it claims to be longer than there is memory"
    return "".join(character if character.isprintable() else "?" for character in text)


def _fault_of(row: Row, expected: int, hashed: bytes) -> str:
    sequence, subject, body, stored = row
    if sequence > expected:
        return f"it is missing, and the next record there is is {sequence}"
    if sequence < expected:
        return f"there is a record with the number {sequence}, and numbers begin with 1"
    for name, value in (("subject", subject), ("body", body), ("hash", stored)):
        if not isinstance(value, bytes):
            return f"its {name} is no blob of bytes"
    if len(subject) != SUBJECT_BYTES:
        return f"its subject has {len(subject)} bytes, and should have {SUBJECT_BYTES}"
    if len(stored) != HASH_BYTES:
        return f"its hash has {len(stored)} bytes, and should have {HASH_BYTES}"
    return (
        f"its hash is not that of its content after record {expected - 1} "
        f"(stored {stored.hex()}, computed {hashed.hex()}): it was changed, moved or put in, or the record before was"
    )
