"""What this worker holds: tenancies of buckets, and under them a lease for each context of a named user."""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import ref

from ucm_middleware.cluster.store import Place, Slot, UserKey

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext

MARGIN: Final = 0.9
"""What part of a lease a worker counts on: clocks may differ in speed by a tenth."""

LOST: Final = -math.inf
CARRIED: Final = math.inf


def boot_clock() -> Callable[[], float]:
    """Seconds that go on while the machine sleeps, where there is such a clock: the store's do too."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    if boot is None:
        return time.monotonic
    return partial(time.clock_gettime, boot)


def new_worker() -> str:
    """A name for a worker that no other has, nor had."""
    return os.urandom(8).hex()


class Tenancy:
    """A claim on one bucket. ``granted_until`` is how long the store holds it at least, on this worker's clock;
    ``valid_until`` how long what stands under it may be used: longer only while the worker carries on by itself.
    """

    __slots__ = (
        "bucket",
        "clock",
        "first_sent",
        "granted_until",
        "has_begun",
        "heir",
        "id",
        "leases",
        "noticed",
        "pending",
        "told",
        "unread",
        "used_at",
        "valid_until",
    )

    def __init__(self, name: str, bucket: int, clock: Callable[[], float]) -> None:
        self.id = name
        self.bucket = bucket
        self.clock = clock
        self.first_sent = LOST  # when what may begin it was first sent; it cannot have begun before
        self.granted_until = self.valid_until = LOST
        self.has_begun = False
        self.heir: Tenancy | None = None  # takes its place while the bucket recovers
        self.leases: dict[Lease, None] = {}
        self.pending = 0  # orders without an answer yet
        self.told: dict[str, str] = {}
        self.unread: dict[UserKey, None] = {}  # whose notices it may have missed: it is not told of those by itself
        self.noticed: dict[str, str] = {}  # of whom there were notices, while something was on its way to live here
        self.used_at = clock()

    @property
    def is_carried(self) -> bool:
        """Whether it holds although the store may not know of it any more."""
        return self.valid_until == CARRIED

    def extend(self, sent: float, lease: float) -> None:
        """The store has said that it holds, to what was sent at that time."""
        self.has_begun = True
        self.granted_until = self.valid_until = sent + lease * MARGIN


class Lease:
    """The right of one context to live. ``position`` is that of the newest notice that does not concern it any more,
    and ``is_restored`` whether the store may have lost that one; ``events`` is the place in its user's events at which
    it began.
    """

    __slots__ = (
        "_context",
        "events",
        "is_connection",
        "is_over",
        "is_restored",
        "key",
        "number",
        "position",
        "tenancy",
        "touched_at",
        "user_id",
    )

    def __init__(self, user_id: str, key: UserKey, tenancy: Tenancy, number: int, is_connection: bool) -> None:
        self.user_id = user_id
        self.key = key
        self.tenancy = tenancy
        self.number = number
        self.is_connection = is_connection
        self.is_over = False
        self.position = ""
        self.is_restored = False
        self.events: Place | None = None
        self.touched_at = tenancy.clock()
        self._context: ref[UserExecutionContext] | None = None

    @property
    def is_held(self) -> bool:
        """Whether what lives under it may be used now."""
        tenancy = self.tenancy
        return tenancy.clock() < tenancy.valid_until

    @property
    def context(self) -> "UserExecutionContext | None":
        """What lives under it; None before that, and when it is gone."""
        return None if self._context is None else self._context()

    @context.setter
    def context(self, context: "UserExecutionContext | None") -> None:
        self._context = None if context is None else ref(context)

    @property
    def is_awaited(self) -> bool:
        """Whether nothing has come to live under it yet."""
        return self._context is None

    @property
    def is_abandoned(self) -> bool:
        """Whether what lived under it is gone, and nobody has said so."""
        return self._context is not None and self._context() is None

    def slot(self, tenancy: Tenancy | None = None) -> Slot:
        """As the store has it, under its tenancy or another one."""
        return Slot(self.key, (tenancy or self.tenancy).id, self.number, self.is_connection)

    def __repr__(self) -> str:
        return f"<Lease {self.tenancy.id}.{self.number}>"
