"""The bounded ledger in memory, which serves unless another is given. It ends with the process."""

import threading
from itertools import islice
from operator import length_hint
from typing import Final

from ucm_middleware.audit.ledger import Trail
from ucm_middleware.audit.records import AuditRecord, Row
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import RESERVED_PREFIX

BATCH: Final = 256
"""How many rows may wait in line."""

Key = str | tuple[str]
"""Whose rows: a user's, or nobody's."""

_SYSTEM: Final = ("system",)
_REFUSED: Final = ("refused",)  # apart: strangers must not push out what trusted code did


class MemoryLedger:
    """The newest records of the users seen last, each user bounded apart, so that no user's flood drops another's
    records.

    Anonymous users, of whom there may be any number, share one bound of their own and cannot push out the named ones.
    """

    def __init__(self, *, records_per_user: int = 128, users: int = 4096, anonymous_users: int = 256) -> None:
        self.records_per_user = records_per_user
        self.users = users
        self.anonymous_users = anonymous_users
        # The user seen last is the last. Of each, a quarter more than is shown: dropping many at once costs a fraction.
        self._named: dict[str, list[Row]] = {}
        self._anonymous: dict[str, list[Row]] = {}
        self._nobodys: dict[Key, list[Row]] = {_SYSTEM: [], _REFUSED: []}
        self._dropped: dict[Key, tuple[int, Row | None]] = {}  # how many, and the newest opening among them
        self._has_forgotten = False  # named users
        self._incoming: list[Row] = []
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """A new lock: a thread of the parent may have held the old one."""
        self._is_sorting = False
        self._lock = threading.RLock()  # reentrant: a finalizer or a signal handler may close a context meanwhile

    def append(self, row: Row) -> None:
        """Keep a record, dropping that user's oldest when there are too many.

        Rows wait in line until there are some, or a trail is read: sorting many at once costs a fraction.
        """
        incoming = self._incoming
        incoming.append(row)
        if len(incoming) >= BATCH:
            self._sort_in()

    def trail(self, user_id: str | None) -> Trail | None:
        """As the port says, a copy; None too for a user seen so long ago that others took the place."""
        with self._lock:
            self._sort_in()
            if user_id is not None:
                rows = self._users_like(user_id).get(user_id)
                return None if rows is None else self._trail(user_id, rows)
            system, refused = (self._trail(key, rows) for key, rows in self._nobodys.items())
        records = sorted((*system.records, *refused.records), key=lambda record: record.at)
        return Trail(None, tuple(records), system.dropped + refused.dropped)

    def knows(self, user_id: str) -> bool:
        """Whether there is a trail of this user. True of any, once there were too many users to keep all of them."""
        with self._lock:
            self._sort_in()
            return self._has_forgotten or user_id in self._users_like(user_id)

    def _trail(self, key: Key, rows: list[Row]) -> Trail:
        dropped, opening = self._dropped.get(key, (0, None))
        opening = _newest_opening(rows) or opening
        shown = rows[-self.records_per_user :]
        return Trail(
            None if opening is None else AuditRecord(*opening),
            tuple(AuditRecord(*row) for row in shown),
            dropped + len(rows) - len(shown),
        )

    def _users_like(self, user_id: str) -> dict[str, list[Row]]:
        return self._anonymous if user_id.startswith(RESERVED_PREFIX) else self._named

    def _sort_in(self) -> None:
        """Put what waits in line where it belongs, in the order in which it came."""
        with self._lock:
            if self._is_sorting:  # what interrupts it leaves its rows to it, or two would take from one line
                return
            self._is_sorting = True
            try:
                while self._incoming:
                    self._sort_batch()
            finally:
                self._is_sorting = False

    def _sort_batch(self) -> None:
        named, most = self._named, self.records_per_user + self.records_per_user // 4
        batch = self._incoming[:]
        number = len(batch)
        rest = iter(batch)
        key: Key = ""
        rows: list[Row] = []
        in_hand = 0
        try:
            for row in rest:
                user_id = row[2]
                if user_id is not key:  # most often it is: a request is one user's
                    in_hand = 1
                    if len(rows) > most:
                        self._drop_rows(key, rows)
                    if user_id in named:
                        key, rows = user_id, named[user_id]
                        # Between these two is no call: what interrupts comes in at a call, and finds each user.
                        del named[user_id]
                        named[user_id] = rows
                    else:
                        key, rows = self._rows_for(row)
                    in_hand = 0
                rows.append(row)
        finally:  # also when a signal handler raises: what has no place yet stays in line
            del self._incoming[: number - length_hint(rest) - in_hand]
        if len(rows) > most:
            self._drop_rows(key, rows)
        self._drop_users(named, self.users)
        self._drop_users(self._anonymous, self.anonymous_users)

    def _rows_for(self, row: Row) -> tuple[Key, list[Row]]:
        """Where a row of an anonymous user belongs, or of one not known yet, or of nobody."""
        user_id = row[2]
        if user_id is None:
            key = _REFUSED if row[0] == "refused" else _SYSTEM
            return key, self._nobodys[key]
        users = self._users_like(user_id)
        rows = users.get(user_id)
        if rows is None:
            rows = []
        else:
            del users[user_id]
        users[user_id] = rows  # the last now
        return user_id, rows

    def _drop_rows(self, key: Key, rows: list[Row]) -> None:
        excess = len(rows) - self.records_per_user
        before, opening = self._dropped.get(key, (0, None))
        dropped = before + excess, _newest_opening(rows[:excess]) or opening
        # Between these two is no call either.
        self._dropped[key] = dropped
        del rows[:excess]

    def _drop_users(self, users: dict[str, list[Row]], most: int) -> None:
        dropped = self._dropped
        excess = max(0, len(users) - most)
        if excess and users is self._named:
            self._has_forgotten = True
        for user_id in [*islice(users, excess)]:
            if user_id in dropped:
                del dropped[user_id]
            del users[user_id]


def _newest_opening(rows: list[Row]) -> Row | None:
    return next((row for row in reversed(rows) if row[0] == "opened"), None)
