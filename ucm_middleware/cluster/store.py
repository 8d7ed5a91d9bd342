"""The port to a shared store, and what is said over it.

Users are keyed hashes here, payloads are sealed bytes: the store learns neither who somebody is nor what was said.

A **bucket** is one of ``BUCKETS`` parts of all users. What a store keeps for one bucket stands in one place, so that
one script sees it whole. A **tenancy** is a worker's claim on one bucket, held under a lease that is renewed; the
**leases** of single contexts stand under it, and are void with it. Thus a worker renews ``BUCKETS`` claims at most,
however many contexts it has. Times in the store are the store's own; a worker compares only its own monotonic clock
with itself.

An **incarnation** is one run of a store's server. Where a server is new to a bucket (it was restarted, failed over, or
is new altogether), leases may have been lost: the bucket is *recovering* for the length of one lease. Meanwhile workers
restore what they hold, and nobody is granted anything new: after that, whoever has not restored has lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

BUCKETS: Final = 64
"""Parts of all users. Fewer means fewer renewals; no more servers than this can share the load."""


@dataclass(frozen=True, slots=True)
class UserKey:
    """Where a user stands in the store: ``bucket`` of 0 to 63, and 32 hexadecimal digits, a keyed hash."""

    bucket: int
    digest: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One lease of a worker: whose, under which tenancy, and its number there, which rises."""

    user: UserKey
    tenancy: str
    number: int
    is_connection: bool


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for with an acquire. ``begins`` is whether the tenancy may begin with it; else it must be there.
    ``per_user`` and ``connections`` are the limits of the user's leases, and of those that are connections.
    """

    slot: Slot
    begins: bool
    per_user: int
    connections: int
    lease: float


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a user's events."""

    epoch: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Granted:
    """``position`` is that of the user's newest notice, "" for none: later ones are meant for this lease."""

    position: str
    events: Place | None


@dataclass(frozen=True, slots=True)
class Refused:
    """``scope`` is "user" or "connections"."""

    scope: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The tenancy is not there, and its bucket is not recovering: what was held under it is lost."""


@dataclass(frozen=True, slots=True)
class Late:
    """The order's number is below the tenancy's fence: it came after it was given up. Nothing was done."""


@dataclass(frozen=True, slots=True)
class Recovering:
    """The bucket recovers for so many seconds more; what is held there must be restored meanwhile."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Alive:
    """The tenancy is there, for a whole lease more. ``noticed`` names the users' digests, each with the position of
    the newest notice, that the tenancy was told of since it last said that it has them.
    """

    noticed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Release:
    """Give up a lease. With ``fence``, orders of the tenancy up to this number that are still on their way do nothing:
    for one whose answer never came.
    """

    slot: Slot
    fence: bool = False


@dataclass(frozen=True, slots=True)
class Renewal:
    """Renew a tenancy. ``told`` are notices that need not be told again; ``touch`` are users with a lease there that
    is old: what the store keeps of them would expire otherwise, after ``KEEP_USER`` seconds.
    """

    bucket: int
    tenancy: str
    lease: float
    told: tuple[tuple[str, str], ...] = ()
    touch: tuple[UserKey, ...] = ()


KEEP_USER: Final = 3600.0
"""Seconds that a user's leases stand in the store untouched. They are void as soon as their tenancy is."""


@dataclass(frozen=True, slots=True)
class Keep:
    """How many of a user's events are kept, of how many bytes together, and for how many seconds after the newest."""

    events: int
    size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Published:
    """The event's place, how many workers were listening, and how many live connections the user has."""

    place: Place
    workers: int
    connections: int


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of a user's events after a sequence, each with its own, and the newest place; None when there never
    was an event, or it is forgotten.
    """

    newest: Place | None
    events: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Notified:
    """The notice's position, and the live leases of the user at that moment."""

    position: str
    leases: int


class Hearer(Protocol):
    """Is told what the store sends by itself, on the loop of the session."""

    def event(self, user: UserKey, place: Place, payload: bytes) -> None:
        """An event of a user that this session is subscribed to."""
        ...

    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None:
        """These tenancies of the bucket have notices: renew to see them."""
        ...

    def deaf(self) -> None:
        """The session heard nothing for a while, and does again: what was said meanwhile must be looked up."""
        ...


class Session(Protocol):
    """The store, for one event loop. Every method may raise ClusterUnavailableError; ``is_unknown`` is true on it when
    what was asked for may have been done.
    """

    async def inspect(self) -> int:
        """Which of the application's seals stands in the store: its index, newest first. Leaves the first where there
        is none.

        Raises ConfigurationError for a server that cannot serve: too old, scripts off, keys may be evicted, not
        allowed in, or the prefix is another application's.
        """
        ...

    async def enroll(self, lease: float) -> float:
        """See each bucket, and keep the seal for a day more; the seconds until no bucket recovers, 0 for all well."""
        ...

    async def is_full(self) -> bool:
        """Whether a server has no memory left: then it takes no orders, while it renews what is held."""
        ...

    async def acquire(self, order: Order) -> Granted | Refused | Gone | Late | Recovering:
        """Check and take a slot, atomically."""
        ...

    async def release(self, releases: Sequence[Release]) -> None:
        """Give up leases; those that are not there any more are passed over."""
        ...

    async def renew(self, renewals: Sequence[Renewal]) -> list[Alive | Gone | Recovering | None]:
        """Renew tenancies, answered in order. One command for all that stand on one server together. None for those
        whose server gave no answer, where another did: raises only when none did.
        """
        ...

    async def restore(self, bucket: int, tenancy: str, lease: float, slots: Sequence[Slot]) -> bool:
        """Put back what is held, while the bucket recovers. False once that is over: it is lost then."""
        ...

    async def publish(self, user: UserKey, payload: bytes, keep: Keep) -> Published:
        """Give an event its place, keep it, and tell it to the sessions that are subscribed to the user."""
        ...

    async def history(self, user: UserKey, after: int) -> History:
        """The kept events after a sequence, and the newest place."""
        ...

    async def notify(self, user: UserKey, notice: bytes, *, forget_events: bool) -> Notified:
        """Leave a notice to every worker that has a lease of the user, and nudge them. It is kept for a day. One that
        forgets events stands for all older ones, and is not pushed out by newer ones.
        """
        ...

    async def notices(self, user: UserKey, after: str) -> list[tuple[str, bytes]]:
        """The user's notices after a position, each with its own."""
        ...

    async def leases_of(self, user: UserKey) -> list[Slot]:
        """A user's live leases, on all workers."""
        ...

    async def count(self) -> tuple[int, int]:
        """How many leases are live, and of how many users. It walks all keys of the application: not for often."""
        ...

    async def listen(self, hearer: Hearer) -> None:
        """Hear from now on: nudges of all buckets, and events of the users subscribed to. Connects again by itself."""
        ...

    async def subscribe(self, user: UserKey) -> None:
        """Hear a user's events; when it returns, the store has confirmed it."""
        ...

    async def unsubscribe(self, user: UserKey) -> None:
        """Hear them no longer."""
        ...

    async def aclose(self) -> None:
        """Give up the connections."""
        ...


class Store(Protocol):
    """What an adapter's entry point of the group ``ucm_middleware.cluster`` makes from a URL; safe in any thread."""

    def session(self) -> Session:
        """A session for the running loop."""
        ...


class OpensStore(Protocol):
    """The entry point's object; its name is the URL's scheme."""

    def __call__(self, url: str, *, prefix: str, seals: Sequence[str], timeout: float) -> Store:
        """A store, which connects to nothing yet.

        ``prefix`` is what every key begins with. ``seals`` are keyed hashes of the application's secrets, newest first,
        which tell it from another on the same prefix. ``timeout`` bounds each answer, in seconds.

        Raises ConfigurationError for a URL it cannot take, in whose message there is no password.
        """
        ...
