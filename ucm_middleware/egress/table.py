"""The protected values of one application: a keyed digest of each, whose it is and until when. Never the value."""

import threading
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from secrets import token_bytes
from typing import Final, NamedTuple

from ucm_middleware.egress.tokens import LONGEST, Token, pieces, places, runs
from ucm_middleware.egress.tokens import SLICE as PIECE
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import is_anonymous_id

SLICE: Final = 1000
"""How many are forgotten at a time, so that the lock is never held for long."""

_BATCH: Final = 256
"""That part of a full table makes room at once: to find the oldest takes long where many before it are gone."""

_SHARE: Final = 100
_SHARE_OF_ANONYMOUS: Final = 10
_LEAST: Final = 1000
_ANONYMOUS: Final = ""

_DIGEST: Final = 16
_HEAD: Final = _DIGEST + 12

Bucket = bytes | tuple[bytes, ...]
"""A value's row: digest, deadline in milliseconds of the clock, how far it reaches around its run, its owners. Several
where values have the same run. As bytes, since a million objects would hold up each full garbage collection."""


class Place(NamedTuple):
    """A protected value in a text: where its run stands, under which key it is in the table, whose it is."""

    start: int
    end: int
    key: int
    owners: frozenset[str]


class ProtectedValues:
    """Thread-safe: whoever writes holds a lock, and looking up takes none. ``clock`` is monotonic, in seconds.

    Values stand in the order of their deadlines, since all are kept for the same time: the first is the oldest. One
    user has room for a hundredth of them, or a thousand, and all who are anonymous for a tenth: nobody can push out
    what others protect.
    """

    __slots__ = (
        "__weakref__", "_clock", "_held", "_keep", "_key", "_lock", "_most", "_rows", "_share", "_share_of_anonymous",
        "_shortest", "forgotten", "refused",
    )  # fmt: skip

    def __init__(self, most: int, keep_seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._keep = keep_seconds
        self._clock = clock
        self._key = token_bytes(32)
        self._rows: dict[int, Bucket] = {}
        self._shortest = LONGEST  # of the runs by which values are looked up
        self._held: dict[str, int] = {}
        self._share = max(most // _SHARE, _LEAST)
        self._share_of_anonymous = max(most // _SHARE_OF_ANONYMOUS, _LEAST)
        self.forgotten = 0
        """How many made room for newer ones."""
        self.refused = 0
        """How many were not taken, since their user has too many."""
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """A child has the values of its parent, and a lock of its own."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, token: Token, owner: str, *, is_first: bool = False) -> bool:
        """Protect a value for a user, besides those who own it; with ``is_first`` only where it is nobody's yet.

        Returns whether it is that user's now.
        """
        key, digest = hash(token.run), self._digest(token.checked)
        reach = token.before.to_bytes(2) + token.after.to_bytes(2)
        with self._lock:
            now = self._clock()
            others: list[bytes] = []
            before: bytes | None = None
            owners = {owner}
            for row in _rows(self._rows.get(key, ())):
                if not row.startswith(digest):
                    others.append(row)
                    continue
                before = row
                if _deadline(row) > now:
                    owners |= _owners(row)
            is_theirs = before is not None and _deadline(before) > now and owner in _owners(before)
            if is_first and not is_theirs and len(owners) > 1:
                return False
            if not is_theirs and not self._has_room(owner):
                self.refused += 1
                return False
            if before is not None:
                self._count(before, -1)
            if len(others) > 7:
                self.forgotten += 1
                self._count(others.pop(0), -1)
            deadline = int((now + self._keep) * 1000)
            row = digest + deadline.to_bytes(8) + reach + "\0".join(sorted(owners)).encode()
            self._count(row, 1)
            self._shortest = min(self._shortest, len(token.run))
            self._rows.pop(key, None)
            self._rows[key] = (*others, row) if others else row
            if len(self._rows) > self._most:
                self._make_room()
        return True

    def _has_room(self, owner: str) -> bool:
        account = _account(owner)
        return self._held.get(account, 0) < (self._share_of_anonymous if account is _ANONYMOUS else self._share)

    def _count(self, row: bytes, by: int) -> None:
        for owner in _owners(row):
            account = _account(owner)
            held = self._held.get(account, 0) + by
            if held > 0:
                self._held[account] = held
            else:
                self._held.pop(account, None)

    def _make_room(self) -> None:
        for key in list(islice(self._rows, max(1, self._most // _BATCH))):
            self.forgotten += 1
            self._forget(key)

    def _forget(self, key: int) -> None:
        for row in _rows(self._rows.pop(key)):
            self._count(row, -1)

    def move(self, key: int, old_owner: str, new_owner: str) -> None:
        """What an anonymous user protected is the user's that it turned out to be."""
        with self._lock:
            bucket = self._rows.get(key)
            if bucket is not None:
                moved = tuple(_with_owner(row, old_owner, new_owner) for row in _rows(bucket))
                for row, by in (*((row, -1) for row in _rows(bucket)), *((row, 1) for row in moved)):
                    self._count(row, by)
                self._rows[key] = moved if isinstance(bucket, tuple) else moved[0]

    def may_hold(self, data: bytes) -> bool:
        """Whether a text has a run in it by which a value is found: the quick look, at each text that is sent."""
        if not self._rows:
            return False
        return any(map(self._may_hold, pieces(data))) if len(data) > PIECE else self._may_hold(data)

    def _may_hold(self, piece: bytes) -> bool:
        least = self._shortest  # of a large table, a look-up takes much longer than this
        return not self._rows.keys().isdisjoint([hash(run) for run in runs(piece) if len(run) >= least])

    def keys_among(self, keys: dict[int, None]) -> set[int]:
        """Which of these hashes of runs values are found by."""
        rows = self._rows
        return set() if not rows or rows.keys().isdisjoint(keys) else {key for key in keys if key in rows}

    def owners_of(self, key: int) -> frozenset[str]:
        """Whose the values under a key are."""
        return frozenset(owner for row in _rows(self._rows.get(key, ())) for owner in _owners(row))

    def find(self, data: bytes) -> Iterator[Place]:
        """Each protected value in a text."""
        now = self._clock()
        for match in places(data):
            run = match[1]
            for row in _rows(self._rows.get(hash(run), ())):
                start, end = match.span(1)
                before, after = int.from_bytes(row[24:26]), int.from_bytes(row[26:28])
                checked = data[max(0, start - before) : end + after]
                if _deadline(row) > now and self._digest(checked) == row[:_DIGEST]:
                    yield Place(start, end, hash(run), _owners(row))

    def sweep(self) -> None:
        """Forget the values whose time is over, some at a time: others wait for the lock."""
        while True:
            with self._lock:
                now = self._clock()
                due = [key for key, bucket in islice(self._rows.items(), SLICE) if _deadline(_rows(bucket)[-1]) <= now]
                for key in due:
                    self._forget(key)
            if len(due) < SLICE:
                return

    def next_wake(self) -> float | None:
        """When ``sweep`` has something to do. It takes no lock: whoever asks may hold one that others wait for."""
        try:
            oldest = next(iter(self._rows.values()), None)
        except RuntimeError:  # it has just changed: look again soon
            return self._clock() + 1.0
        return None if oldest is None else _deadline(_rows(oldest)[-1]) + 0.001

    def _digest(self, checked: bytes) -> bytes:
        return blake2b(checked, digest_size=_DIGEST, key=self._key).digest()


def _account(owner: str) -> str:
    """Where a user's values are counted: those of all who are anonymous together, who may be one."""
    return _ANONYMOUS if is_anonymous_id(owner) else owner


def _rows(bucket: "Bucket | tuple[()]") -> tuple[bytes, ...]:
    return bucket if isinstance(bucket, tuple) else (bucket,)


def _deadline(row: bytes) -> float:
    return int.from_bytes(row[_DIGEST : _DIGEST + 8]) / 1000


def _owners(row: bytes) -> frozenset[str]:
    return frozenset(row[_HEAD:].decode().split("\0"))


def _with_owner(row: bytes, old_owner: str, new_owner: str) -> bytes:
    owners = _owners(row)
    if old_owner not in owners:
        return row
    return row[:_HEAD] + "\0".join(sorted(owners - {old_owner} | {new_owner})).encode()
