"""What several ledgers have in common though each is one stream of its own: whole stretches, records, contexts."""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, cast

from ucm_middleware.audit.verification.source import Row, Watch

_AT_ONCE: Final = 1024
_KEY_BYTES: Final = 16
_decode: Final = json.JSONDecoder().decode
_CACHE_KIB: Final = 64 * 1024
_NEVER: Final[tuple[float, float]] = (float("inf"), float("-inf"))
_END_OF_TIME: Final = 253_402_300_800  # the year 10000
_BEGINS_OR_ENDS: Final = frozenset({"opened", "child_opened", "closed"})

_SEEN: Final = """CREATE TABLE seen (
    ledger INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    record BLOB NOT NULL,
    hash BLOB NOT NULL,
    context BLOB,
    event TEXT
) STRICT"""
# SQLite sorts in files where that takes too much memory; to keep an index would cost more than all of the rest.
_SEVERAL: Final = """CREATE TABLE several_{column} AS SELECT {column} AS item FROM seen
    WHERE {column} IS NOT NULL{but} GROUP BY {column} HAVING min(ledger) < max(ledger)"""
_INDEXED: Final = "CREATE UNIQUE INDEX several_{column}_items ON several_{column} (item)"
_BUT_THOSE: Final = " AND record NOT IN (SELECT item FROM several_record)"
_PLACES: Final = """SELECT {column}, ledger, sequence, event FROM seen
    WHERE {column} IN (SELECT item FROM several_{column}) ORDER BY {column}, ledger, sequence"""

Place = tuple[int, int, str | None]


@dataclass(frozen=True, slots=True)
class Meeting:
    """``number`` records or contexts are in the same ledgers. ``places`` are those of the first of them, one for each:
    which ledger, which record, and what event that is where it matters.
    """

    number: int
    places: tuple[Place, ...]


class Overlap:
    """Takes note of the good records of ledgers, which go by number. What it notes is in a temporary file: some hundred
    bytes for each record.
    """

    __slots__ = ("_connection", "_pending", "_times")

    def __init__(self) -> None:
        self._connection = sqlite3.connect("", isolation_level=None)  # a file that SQLite deletes by itself
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._connection.execute(_SEEN)
        self._pending: list[tuple[Any, ...]] = []
        self._times: dict[int, tuple[float, float]] = {}

    def watching(self, ledger: int) -> Callable[[], Watch]:
        """What a verification is given, to tell of a ledger's records."""

        def begin() -> Watch:
            if ledger in self._times:
                self.forget(ledger)  # what an earlier attempt has told
            pending, (first, last) = self._pending, _NEVER
            self._times[ledger] = _NEVER

            def watch(row: Row) -> None:
                nonlocal first, last
                sequence, record, digest, context, event, at = _noted(row)
                pending.append((ledger, sequence, record, digest, context, event))
                if at is not None and not first <= at <= last:
                    self._times[ledger] = first, last = min(first, at), max(last, at)
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
        times = self._times.get(ledger, _NEVER)
        return None if times == _NEVER else times

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
        execute = self._connection.execute
        execute(_SEVERAL.format(column=column, but=but))
        execute(_INDEXED.format(column=column))
        numbers: Counter[frozenset[int]] = Counter()
        firsts: dict[frozenset[int], tuple[Place, ...]] = {}
        for _, found in groupby(execute(_PLACES.format(column=column)), itemgetter(0)):
            by_ledger: dict[int, Place] = {}
            for _, ledger, sequence, event in found:
                by_ledger.setdefault(ledger, (ledger, sequence, event))
            which, places = frozenset(by_ledger), tuple(by_ledger.values())
            numbers[which] += 1
            firsts[which] = min(places, firsts.get(which, places))
        meetings = [Meeting(number, firsts[which]) for which, number in numbers.items()]
        return sorted(meetings, key=lambda meeting: meeting.places)

    def _hashes(self, ledger: int) -> Iterator[bytes]:
        self._write()
        for (digest,) in self._connection.execute("SELECT hash FROM seen WHERE ledger = ? ORDER BY rowid", (ledger,)):
            yield digest

    def _write(self) -> None:
        pending, execute = self._pending, self._connection.executemany
        if pending:
            self._connection.execute("BEGIN")
            execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?)", pending)
            self._connection.execute("COMMIT")
            pending.clear()


def _while_equal(one: Iterator[bytes], other: Iterator[bytes]) -> Iterator[None]:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return
        yield None


def _noted(row: Row) -> tuple[int, bytes, bytes, bytes | None, str | None, float | None]:
    """Sequence, record, hash, context, event and time. What is sealed is known by its bytes: they have a nonce in them,
    so that no other record has the same."""
    sequence, subject, body, digest = row
    try:
        found = _decode(str(body, "utf-8"))
    except (ValueError, RecursionError):
        found = None
    get = cast("dict[str, Any]", found).get if isinstance(found, dict) else _nothing
    record = _core(get("id")) or sha256(subject + body).digest()[:_KEY_BYTES]
    event = get("event")
    if isinstance(event, str) and event in _BEGINS_OR_ENDS:
        return sequence, record, digest, _core(get("context")), event, _time(get("at"))
    return sequence, record, digest, None, None, _time(get("at"))


def _nothing(name: str) -> None:
    """What a body that is no object has by any name."""


def _core(given: object) -> bytes | None:
    if not isinstance(given, str) or not given:
        return None
    return sha256(given.encode(errors="surrogatepass")).digest()[:_KEY_BYTES]


def _time(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    return float(given) if 0 <= given < _END_OF_TIME else None
