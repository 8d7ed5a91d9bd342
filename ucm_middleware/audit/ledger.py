"""Where records go: the port, and the bounded ledger in memory that serves unless another is given."""

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final, Protocol

from ucm_middleware.audit.records import AuditRecord, Event
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import RESERVED_PREFIX

BATCH: Final = 256
"""How many records may wait in line."""


@dataclass(frozen=True, slots=True)
class Trail:
    """What a ledger knows of one user: the newest opening, and the records in the order they were written."""

    opening: AuditRecord | None
    records: tuple[AuditRecord, ...]
    dropped: int


class Ledger(Protocol):
    """Keeps records. Called from any thread, on the request's path: it must not block."""

    def append(self, record: AuditRecord) -> None:
        """Keep a record."""
        ...

    def trail(self, user_id: str | None) -> Trail | None:
        """The trail of one user, None for a user never seen; of ``None``, the records that stand in no user's trail."""
        ...


class _Kept:
    __slots__ = ("dropped", "opening", "records")

    def __init__(self) -> None:
        self.opening: AuditRecord | None = None
        self.records: list[AuditRecord] = []  # short: most users have a few records, and a deque begins with 64 places
        self.dropped = 0


class MemoryLedger:
    """The newest records of the users seen last, each user bounded apart, so that no user's flood drops another's
    records.

    Anonymous users, of whom there may be any number, share one bound of their own and cannot push out the named ones.
    """

    def __init__(self, *, records_per_user: int = 128, users: int = 4096, anonymous_users: int = 256) -> None:
        self.records_per_user = records_per_user
        self.users = users
        self.anonymous_users = anonymous_users
        self._named: OrderedDict[str | None, _Kept] = OrderedDict()
        self._anonymous: OrderedDict[str | None, _Kept] = OrderedDict()
        self._system = _Kept()
        self._refused = _Kept()  # apart: strangers must not push out what trusted code did
        self._incoming: deque[AuditRecord] = deque()
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """A new lock: a thread of the parent may have held the old one."""
        self._is_sorting = False
        self._lock = threading.RLock()  # reentrant: a finalizer or a signal handler may close a context meanwhile

    def append(self, record: AuditRecord) -> None:
        """Keep a record, dropping that user's oldest when there are too many.

        Records wait in line until there are some, or a trail is read: sorting many at once costs a fraction.
        """
        incoming = self._incoming
        incoming.append(record)
        if len(incoming) >= BATCH:
            self._sort_in()

    def trail(self, user_id: str | None) -> Trail | None:
        """As the port says, a copy; None too for a user seen so long ago that others took the place."""
        with self._lock:
            self._sort_in()
            if user_id is None:
                records = sorted((*self._system.records, *self._refused.records), key=lambda record: record.at)
                return Trail(None, tuple(records), self._system.dropped + self._refused.dropped)
            users = self._anonymous if user_id.startswith(RESERVED_PREFIX) else self._named
            kept = users.get(user_id)
            return None if kept is None else Trail(kept.opening, tuple(kept.records), kept.dropped)

    def _sort_in(self) -> None:
        """Put what waits in line where it belongs, in the order in which it came."""
        incoming, named, most = self._incoming, self._named, self.records_per_user
        with self._lock:
            if self._is_sorting:  # what interrupts it leaves its records to it, or two would take from one line
                return
            self._is_sorting = True
            try:
                while incoming:
                    record = incoming.popleft()
                    kept = named.get(record.user_id)
                    if kept is None:
                        kept = self._kept_of(record.user_id, record.event)
                    else:
                        named.move_to_end(record.user_id)  # the users seen last stay longest
                    if record.event == "opened":
                        kept.opening = record
                    records = kept.records
                    if len(records) >= most:
                        del records[0]
                        kept.dropped += 1
                    records.append(record)
            finally:
                self._is_sorting = False

    def _kept_of(self, user_id: str | None, event: Event) -> _Kept:
        """Where the records of an anonymous user belong, or of one not known yet, or of none."""
        if user_id is None:
            return self._refused if event == "refused" else self._system
        if user_id.startswith(RESERVED_PREFIX):
            users, most = self._anonymous, self.anonymous_users
        else:
            users, most = self._named, self.users
        kept = users.get(user_id)
        if kept is None:
            if len(users) >= most:
                users.popitem(last=False)
            kept = users[user_id] = _Kept()
        else:
            users.move_to_end(user_id)
        return kept
