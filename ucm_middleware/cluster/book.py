"""The book of what this worker holds, has asked for and has not given back yet. It asks the store nothing."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol

from ucm_middleware.cluster.leases import CARRIED, LOST, Lease, Tenancy, new_worker
from ucm_middleware.cluster.store import Granted, Order, Release, Slot, UserKey


class SlotLimits(Protocol):
    """How many contexts a user may have, and how many of those may be connections."""

    per_user: int
    connections: int


UNKNOWN: Final = "?"
"""Stands for the position of notices of which it is not known whether there are any."""


@dataclass(slots=True)
class Attempt:
    """An order that is on its way."""

    order: Order
    tenancy: Tenancy
    user_id: str


class Book:
    """Thread-safe. The lock is reentrant: a finalizer may release a lease in the middle of anything."""

    def __init__(self, lease: float, clock: Callable[[], float]) -> None:
        self._lease = lease
        self._clock = clock
        self.start_empty()

    def start_empty(self) -> None:
        """Be another worker, which holds nothing: at first, and in a forked child."""
        self.worker = new_worker()
        self._lock = threading.RLock()
        self._names = count(1)
        self._numbers = count(1)
        self.tenancies: dict[int, Tenancy] = {}
        self.retired: list[Tenancy] = []  # over by this worker's clock; what lives under them must be closed
        self.unplaced: dict[Lease, None] = {}  # given without the store
        self._unreleased: dict[tuple[str, int], Release] = {}
        self._by_user: dict[str, dict[Lease, None]] = {}
        self._nowhere = Tenancy("", -1, self._clock)
        self._nowhere.valid_until = CARRIED
        self._lost = Tenancy("", -1, self._clock)

    def begin(self, bucket: int) -> Tenancy:
        """A tenancy that never was."""
        return Tenancy(f"{self.worker}-{next(self._names)}", bucket, self._clock)

    # Asking.

    def attempt(self, user_id: str, key: UserKey, is_connection: bool, limits: SlotLimits) -> Attempt:
        """What to ask the store for. Whoever asks says how it was answered, in any case."""
        with self._lock:
            now = self._clock()
            tenancy = self.tenancies.get(key.bucket)
            if tenancy is not None and tenancy.has_begun and tenancy.valid_until <= now:
                self.retire(tenancy)
                tenancy = None
            if tenancy is None:
                tenancy = self.tenancies[key.bucket] = self.begin(key.bucket)
                tenancy.first_sent = now
            tenancy.pending += 1
            tenancy.used_at = now
            slot = Slot(key, tenancy.id, next(self._numbers), is_connection)
            order = Order(slot, not tenancy.has_begun, limits.per_user, limits.connections, self._lease)
            return Attempt(order, tenancy, user_id)

    def granted(self, attempt: Attempt, answer: Granted, lease: Lease | None = None) -> Lease | None:
        """The lease that was granted, a new one or that which is placed by it. None when it came too late to be of use:
        it is given back then.
        """
        slot, tenancy = attempt.order.slot, attempt.tenancy
        with self._lock:
            tenancy.pending -= 1
            if not tenancy.has_begun and self.tenancies.get(tenancy.bucket) is tenancy:
                tenancy.extend(tenancy.first_sent, self._lease)
            is_over = lease is not None and lease.is_over
            if is_over or self.tenancies.get(tenancy.bucket) is not tenancy or tenancy.valid_until <= self._clock():
                self._give_back(Release(slot))
                return None
            if lease is None:
                lease = Lease(attempt.user_id, slot.user, tenancy, slot.number, slot.is_connection)
                lease.position = answer.position
                self._by_user.setdefault(attempt.user_id, {})[lease] = None
            else:
                self.unplaced.pop(lease, None)
                lease.key, lease.tenancy, lease.number = slot.user, tenancy, slot.number
                _look_later(lease)
            lease.events = answer.events
            tenancy.leases[lease] = None
            return lease

    def not_granted(self, attempt: Attempt) -> None:
        """Nothing was taken."""
        with self._lock:
            attempt.tenancy.pending -= 1
            self._drop_if_unbegun(attempt.tenancy)

    def unanswered(self, attempt: Attempt) -> None:
        """It may have been taken, or be yet."""
        with self._lock:
            self._give_back(Release(attempt.order.slot, fence=True))
            self.not_granted(attempt)

    def without_store(self, user_id: str, key: UserKey, is_connection: bool) -> Lease:
        """A lease that the store knows nothing of."""
        with self._lock:
            lease = Lease(user_id, key, self._nowhere, 0, is_connection)
            self.unplaced[lease] = None
            self._by_user.setdefault(user_id, {})[lease] = None
            return lease

    def _drop_if_unbegun(self, tenancy: Tenancy) -> None:
        if not tenancy.has_begun and not tenancy.pending and self.tenancies.get(tenancy.bucket) is tenancy:
            del self.tenancies[tenancy.bucket]  # the next one shall not count on when this one was first sent

    def forget_noticed(self, tenancy: Tenancy) -> None:
        """Whoever is granted something from now on learns of the notices that there were by that."""
        with self._lock:
            if tenancy.noticed and not tenancy.pending and not any(one.is_awaited for one in tenancy.leases):
                tenancy.noticed.clear()

    # Giving back.

    def release(self, lease: Lease) -> bool:
        """A lease is over. True when the store must be told."""
        with self._lock:
            if lease.is_over:
                return False
            self._end(lease)
            tenancy = lease.tenancy
            tenancy.leases.pop(lease, None)
            if self.unplaced.pop(lease, self) is None or tenancy.valid_until == LOST:
                return False
            self._give_back(Release(lease.slot()))
            if tenancy.heir is not None:
                self._give_back(Release(lease.slot(tenancy.heir)))
            return True

    def _end(self, lease: Lease) -> None:
        lease.is_over = True
        mine = self._by_user.get(lease.user_id)
        if mine is not None:
            mine.pop(lease, None)
            if not mine:
                del self._by_user[lease.user_id]

    def _give_back(self, release: Release) -> None:
        self._unreleased[release.slot.tenancy, release.slot.number] = release

    @property
    def unreleased(self) -> list[Release]:
        """What the store must still be told of."""
        with self._lock:
            return list(self._unreleased.values())

    def unreleased_of(self, key: UserKey) -> list[Release]:
        """The same of one user."""
        return [one for one in self.unreleased if one.slot.user == key]

    def was_told(self, releases: Iterable[Release]) -> None:
        """The store knows of these now."""
        with self._lock:
            for one in releases:
                self._unreleased.pop((one.slot.tenancy, one.slot.number), None)

    # Losing.

    def lose(self, tenancy: Tenancy) -> list[Lease]:
        """A tenancy is over, and what was held under it. Returns that."""
        with self._lock:
            leases = list(tenancy.leases)
            self._strike(tenancy)
            for lease in leases:
                self._end(lease)
            return leases

    def lose_one(self, lease: Lease) -> bool:
        """A lease that stands nowhere is over. False when it was already."""
        with self._lock:
            if lease.is_over:
                return False
            self.unplaced.pop(lease, None)
            lease.tenancy = self._lost
            self._end(lease)
            return True

    def retire(self, tenancy: Tenancy, *, is_gone: bool = False) -> None:
        """A tenancy is over: nothing more is asked for under it, and what is held there must be closed. Where the store
        has said that it is gone, nothing there may be used before that.
        """
        with self._lock:
            if is_gone and not tenancy.is_carried:
                tenancy.valid_until = tenancy.granted_until = LOST
            if self.tenancies.get(tenancy.bucket) is tenancy:
                del self.tenancies[tenancy.bucket]
                self.retired.append(tenancy)

    def extend(self, tenancy: Tenancy, sent: float) -> bool:
        """The store has said that it holds. False when it was over by this worker's clock before that was heard, or
        given up.
        """
        with self._lock:
            if self.tenancies.get(tenancy.bucket) is not tenancy or tenancy.granted_until <= self._clock():
                return False
            tenancy.extend(sent, self._lease)
            return True

    def give_all_back(self, tenancy: Tenancy) -> None:
        """The store shall not count what stands under a tenancy that is over here."""
        with self._lock:
            for lease in list(tenancy.leases):
                self._give_back(Release(lease.slot()))

    def set_aside(self, tenancy: Tenancy) -> None:
        """A tenancy is over, and what was held under it carries on until it has a new place."""
        with self._lock:
            for lease in list(tenancy.leases):
                lease.tenancy = self._nowhere
                self.unplaced[lease] = None
            self._strike(tenancy)

    def _strike(self, tenancy: Tenancy) -> None:
        tenancy.valid_until = tenancy.granted_until = LOST
        tenancy.leases.clear()
        if self.tenancies.get(tenancy.bucket) is tenancy:
            del self.tenancies[tenancy.bucket]

    def forget_idle(self, tenancy: Tenancy) -> bool:
        """Give up a tenancy that nobody needs any more. False when something stands under it, or did lately."""
        with self._lock:
            if tenancy.leases or tenancy.pending or self._clock() < tenancy.used_at + self._lease:
                return False
            if self.tenancies.get(tenancy.bucket) is tenancy:
                del self.tenancies[tenancy.bucket]
            return True

    # Another server.

    def heir_of(self, tenancy: Tenancy) -> tuple[Tenancy, list[Lease]]:
        """What takes a tenancy's place in a bucket that recovers, and what shall stand under it. Under the old name
        there may be leases that a failover forgot the end of.
        """
        with self._lock:
            if tenancy.heir is None:
                tenancy.heir = self.begin(tenancy.bucket)
            return tenancy.heir, list(tenancy.leases)

    def disown(self, tenancy: Tenancy, heir: Tenancy, leases: Iterable[Lease]) -> None:
        """Whether an heir has come to be is not known, or it may be yet, with what ends meanwhile: it is never renewed,
        and the next one has another name.
        """
        with self._lock:
            tenancy.heir = None
            for lease in leases:
                self._give_back(Release(lease.slot(heir)))

    def inherited(self, tenancy: Tenancy, heir: Tenancy, leases: Iterable[Lease], sent: float) -> list[Lease]:
        """The store has the leases under the heir now. Returns those that came meanwhile, and are lost."""
        with self._lock:
            heir.extend(sent, self._lease)
            heir.used_at = tenancy.used_at
            for lease in leases:
                if lease.is_over:
                    self._give_back(Release(lease.slot(heir)))
                else:
                    lease.tenancy = heir
                    lease.is_restored = True
                    heir.leases[lease] = heir.unread[lease.key] = None
                    _look_later(lease)
                    tenancy.leases.pop(lease, None)
            late = self.lose(tenancy)
            self.tenancies[tenancy.bucket] = heir
            return late

    # Views.

    def leases_of(self, user_id: str) -> list[Lease]:
        """A user's leases here."""
        with self._lock:
            return list(self._by_user.get(user_id, ()))

    def leases_at(self, key: UserKey) -> list[Lease]:
        """The same by where the user stands."""
        with self._lock:
            tenancy = self.tenancies.get(key.bucket)
            here = [] if tenancy is None else list(tenancy.leases)
            return [lease for lease in (*here, *self.unplaced) if lease.key == key]

    def all_tenancies(self) -> list[Tenancy]:
        """A snapshot."""
        with self._lock:
            return list(self.tenancies.values())

    def take_retired(self) -> list[Tenancy]:
        """Those that are over by this worker's clock, once."""
        with self._lock:
            retired, self.retired = self.retired, []
            return retired

    def __len__(self) -> int:
        """How many leases there are."""
        with self._lock:
            return sum(len(tenancy.leases) for tenancy in self.tenancies.values()) + len(self.unplaced)


def _look_later(lease: Lease) -> None:
    """What there was of notices found nobody under this lease yet: whatever comes to live there looks for itself."""
    if lease.is_awaited:
        lease.tenancy.noticed[lease.key.digest] = UNKNOWN
