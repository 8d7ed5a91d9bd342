"""What several ledgers have in common though each is one stream of its own: whole stretches, records, contexts."""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, cast

from ucm_middleware.audit.verification.source import Row, Watch

_AT_ONCE: Final = 1024
_KEY_BYTES: Final = 16
_END_OF_TIME: Final = 253_402_300_800  # the year 10000
_BEGINS_OR_ENDS: Final = frozenset({"opened", "child_opened", "closed"})

_SEEN: Final = """CREATE TABLE seen (
    ledger INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    record BLOB NOT NULL,
    hash BLOB NOT NULL,
    at REAL,
    context BLOB,
    event TEXT
) STRICT"""
# SQLite sorts in files where that takes too much memory; to keep an index would cost more than all of the rest.
_IN_SEVERAL: Final = """CREATE TABLE {table} AS
    SELECT {column} AS item, group_concat(DISTINCT ledger) AS ledgers, min(rowid) AS first FROM seen
    WHERE {column} IS NOT NULL{but} GROUP BY {column} HAVING min(ledger) < max(ledger)"""
_BUT_THOSE: Final = " AND record NOT IN (SELECT item FROM several_record)"
_GROUPS: Final = "SELECT ledgers, count(*), min(first) FROM {table} GROUP BY ledgers ORDER BY min(first)"
_EXAMPLE: Final = """SELECT ledger, sequence, event FROM seen
    WHERE {column} = (SELECT {column} FROM seen WHERE rowid = ?) ORDER BY ledger, sequence"""


@dataclass(frozen=True, slots=True)
class Meeting:
    """``number`` records or contexts are in several ledgers. ``places`` are those of the first of them: which ledger,
    which record, and what event that is where it matters.
    """

    number: int
    places: tuple[tuple[int, int, str | None], ...]


class Overlap:
    """Takes note of the good records of ledgers, which go by number. What it notes is in a temporary file: some hundred
    bytes for each record.
    """

    __slots__ = ("_connection", "_pending")

    def __init__(self) -> None:
        self._connection = sqlite3.connect("", isolation_level=None)  # a file that SQLite deletes by itself
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute(_SEEN)
        self._pending: list[tuple[Any, ...]] = []

    def watching(self, ledger: int) -> Callable[[], Watch]:
        """What a verification is given, to tell of a ledger's records."""

        def begin() -> Watch:
            self.forget(ledger)  # what an earlier attempt has told
            pending = self._pending

            def watch(row: Row) -> None:
                pending.append((ledger, *_noted(row)))
                if len(pending) >= _AT_ONCE:
                    self._write()

            return watch

        return begin

    def forget(self, ledger: int) -> None:
        """Let go of what was told of a ledger."""
        self._write()
        self._connection.execute("DELETE FROM seen WHERE ledger = ?", (ledger,))

    def common_start(self, one: int, other: int) -> int:
        """How many records two ledgers have in common, from the first on."""
        return sum(1 for _ in _while_equal(self._hashes(one), self._hashes(other)))

    def times(self, ledger: int) -> tuple[float, float] | None:
        """The earliest and the latest time of a ledger's records, in seconds since 1970."""
        self._write()
        first, last = self._connection.execute(
            "SELECT min(at), max(at) FROM seen WHERE ledger = ?", (ledger,)
        ).fetchone()
        return None if first is None else (first, last)

    def in_several(self) -> tuple[list[Meeting], list[Meeting]]:
        """Records that are in more than one ledger; and contexts that began in one and ended in another, but for those
        whose very record is in several. Those that are in the same ledgers are told together.
        """
        self._write()
        return self._in_several("record"), self._in_several("context", _BUT_THOSE)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _in_several(self, column: str, but: str = "") -> list[Meeting]:
        execute, table = self._connection.execute, f"several_{column}"
        execute(_IN_SEVERAL.format(table=table, column=column, but=but))
        by_ledgers: dict[frozenset[str], tuple[int, int]] = {}
        for ledgers, number, first in execute(_GROUPS.format(table=table)).fetchall():
            which = frozenset(ledgers.split(","))  # SQLite names them in any order
            before, earliest = by_ledgers.get(which, (0, first))
            by_ledgers[which] = before + number, min(first, earliest)
        example = _EXAMPLE.format(column=column)
        return [Meeting(number, tuple(execute(example, (first,)).fetchall())) for number, first in by_ledgers.values()]

    def _hashes(self, ledger: int) -> Iterator[bytes]:
        self._write()
        for (digest,) in self._connection.execute("SELECT hash FROM seen WHERE ledger = ? ORDER BY rowid", (ledger,)):
            yield digest

    def _write(self) -> None:
        pending, execute = self._pending, self._connection.executemany
        if pending:
            self._connection.execute("BEGIN")
            execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?, ?)", pending)
            self._connection.execute("COMMIT")
            pending.clear()


def _while_equal(one: Iterator[bytes], other: Iterator[bytes]) -> Iterator[None]:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return
        yield None


def _noted(row: Row) -> Sequence[object]:
    """Sequence, record, hash, time, context and event. What is sealed is known by its bytes: they have a nonce in them,
    so that no other record has the same."""
    sequence, subject, body, digest = row
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    members = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    given, context, event, at = (members.get(name) for name in ("id", "context", "event", "at"))
    record = _core(given) or sha256(subject + body).digest()[:_KEY_BYTES]
    if not isinstance(event, str) or event not in _BEGINS_OR_ENDS:
        context = event = None
    return sequence, record, digest, _time(at), _core(context), event


def _core(given: object) -> bytes | None:
    if not isinstance(given, str) or not given:
        return None
    return sha256(given.encode(errors="surrogatepass")).digest()[:_KEY_BYTES]


def _time(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    return float(given) if 0 <= given < _END_OF_TIME else None
