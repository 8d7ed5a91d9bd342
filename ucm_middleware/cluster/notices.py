"""Notices: what every worker must be told of a user, also one that is away: a revocation, and a clear."""

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Final, Literal, cast

from ucm_middleware.cluster.errands import Again, Errands, apart
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Notified, UserKey
from ucm_middleware.cluster.worker import Held, Worker
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.forking import renewed_after_fork

logger = logging.getLogger(__name__)

MOST_UNSENT: Final = 10_000
"""Notices that wait for the store. Who revokes is told of each that it could not be left yet."""


@dataclass(frozen=True, slots=True)
class Notice:
    """``key`` is the one that was cleared: a text, or a user id and a request id. ``actor`` is who did it: None for
    trusted code. ``at`` is a time of the worker that left it, for people: no two clocks are compared. ``id`` tells it
    from others that say the same.
    """

    kind: Literal["revoked", "cleared"]
    user_id: str
    key: str | tuple[str, str] | None = None
    reason: str = ""
    actor: str | None = None
    at: float = 0.0
    id: str = field(default_factory=partial(token_hex, 8))

    def packed(self) -> bytes:
        """As it is sealed."""
        about = [self.kind, self.user_id, self.key, self.reason, self.actor, self.at, self.id]
        return json.dumps(about).encode()

    @staticmethod
    def unpacked(packed: bytes) -> "Notice":
        """Raises ValueError for what is none."""
        kind, user_id, key, reason, actor, at, name = json.loads(packed)
        if kind not in ("revoked", "cleared"):
            raise ValueError(kind)
        if isinstance(key, list):
            user, request = cast("list[str]", key)
            key = user, request
        return Notice(kind, user_id, key, reason, actor, at, name)


Apply = Callable[[Notice, str, Sequence[Held]], object]
"""Closes what a notice is meant for, of the contexts of these leases; the text is the notice's position."""


@dataclass(slots=True, eq=False)
class Unsent:
    """A notice that the store must still be told. ``may_stand`` is whether it may have it already."""

    notice: Notice
    may_stand: bool = False


@dataclass(slots=True, eq=False)
class Reading:
    """Who reads a user's notices does so alone; how many read, or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    number: int = 0


class Notices:
    """Thread-safe. ``apply`` is called in a thread that may wait, never on the cluster's own.

    A notice is meant for every lease that was granted before it: those whose position is older.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_apply",
        "_errands",
        "_held",
        "_lock",
        "_reading",
        "_seals",
        "_unsent",
        "_worker",
        "_young",
    )

    def __init__(self, worker: Worker, errands: Errands, seals: Seals, apply: Apply) -> None:
        self._worker = worker
        self._errands = errands
        self._seals = seals
        self._apply = apply
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: what could not be sent is the parent's to send."""
        self._lock = threading.RLock()
        self._unsent: dict[tuple[str, str, object], Unsent] = {}
        self._young: deque[tuple[float, Unsent]] = deque()
        self._held: dict[UserKey, list[Callable[[], object]]] = {}
        self._reading: dict[UserKey, Reading] = {}
        self._again = Again(self._send_unsent)

    # Leaving one, in any thread.

    def leave(self, notice: Notice) -> "Future[Notified]":
        """Leave a notice. The future raises ClusterUnavailableError where the store could not be asked: it is kept
        then, and left once it can.
        """
        return self._errands.ask(partial(self._leave, Unsent(notice)))

    def leave_now(self, notice: Notice) -> Notified | None:
        """The same for synchronous code, which it blocks for a round trip. On the cluster's own thread, where a hook of
        a plugin may come to be called, nothing is waited for, and it is None.
        """
        future = self.leave(notice)
        return None if self._worker.is_here else self._errands.wait(future)

    @contextmanager
    def holding(self, user_id: str) -> Generator[None]:
        """No notice is applied to this user's contexts in the block: whoever revokes closes its own as it must."""
        user = self._worker.key_of(user_id)
        with self._lock:
            is_first = user not in self._held
            self._held.setdefault(user, [])
        try:
            yield
        finally:
            if is_first:
                with self._lock:
                    told = self._held.pop(user, [])
                for tell in told:
                    tell()

    async def _leave(self, unsent: Unsent) -> Notified:
        worker = self._worker
        try:
            await worker.looked()
            if worker.state in ("down", "local"):
                raise ClusterUnavailableError("down")
            notice = unsent.notice
            user = worker.key_of(notice.user_id)
            sealed = self._seals.seal("notice", user, notice.packed())
            notified = await worker.session.notify(user, sealed, forget_events=notice.kind == "revoked")
        except BaseException as error:
            if isinstance(error, ClusterUnavailableError):
                worker.doubt(error)
            unsent.may_stand |= not isinstance(error, ClusterUnavailableError) or error.is_unknown
            self._keep(unsent)
            raise
        self._remember(unsent)
        return notified

    def _keep(self, unsent: Unsent) -> None:
        notice = unsent.notice
        with self._lock:
            if len(self._unsent) >= MOST_UNSENT:
                logger.critical("a notice to other workers (%s) is given up: too many could not be left", notice.kind)
                return
            self._unsent[notice.user_id, notice.kind, notice.key] = unsent
        self._again.plan()

    def _remember(self, unsent: Unsent) -> None:
        """For the case that the store forgets it before everybody has seen it."""
        now = time.monotonic()
        self._young.append((now, unsent))
        while self._young[0][0] < now - self._worker.policy.lease or len(self._young) > MOST_UNSENT:
            self._young.popleft()

    # What could not be left, and what a new store has never heard of; on the cluster's thread.

    def store_is_new(self) -> None:
        """Whatever was left lately may be lost. Who has not seen it yet, must still."""
        since = time.monotonic() - self._worker.policy.lease
        for at, unsent in self._young:
            if at >= since:
                unsent.may_stand = True
                self._keep(unsent)
        self.store_is_back()

    def store_is_back(self) -> None:
        """Leave what could not be left, at once."""
        if self._unsent:
            self._again.now()

    def is_told_elsewhere(self, user_id: str, notified: Notified) -> bool:
        """Whether other workers had leases of the user when this notice was left."""
        return notified.leases > self._worker.taken_here(self._worker.key_of(user_id))

    @property
    def unsent(self) -> int:
        """How many notices the store must still be told."""
        return len(self._unsent)

    def _send_unsent(self) -> None:
        if self._worker.state in ("down", "local"):
            self._again.plan()
        else:
            self._errands.start(self._send_all)

    async def _send_all(self) -> None:
        while self._unsent:
            with self._lock:
                at = next(iter(self._unsent))
                unsent = self._unsent.pop(at)
            try:
                if not unsent.may_stand or not await self._stands(unsent):
                    await self._leave(unsent)
            except ClusterUnavailableError:
                return  # it is kept again, and planned
        self._again.reset()

    async def _stands(self, unsent: Unsent) -> bool:
        """Whether a notice is there: left twice, it would be meant for whoever has come back since."""
        user = self._worker.key_of(unsent.notice.user_id)
        try:
            found = await self._worker.session.notices(user, "")
        except BaseException:
            self._keep(unsent)
            raise
        notices = [self._opened(user, sealed) for _, sealed in found]
        return any(one is not None and one.id == unsent.notice.id for one in notices)

    # Reading them, on the cluster's thread.

    async def catch_up(self, user: UserKey) -> None:
        """Apply what this user's leases here have missed. Raises ClusterUnavailableError: then they may not be used."""
        reading = self._reading.setdefault(user, Reading())
        reading.number += 1
        try:
            async with reading.lock:
                await self._let_go(user)
                await self._read(user)
        finally:
            reading.number -= 1
            if not reading.number:
                del self._reading[user]

    async def _let_go(self, user: UserKey) -> None:
        """Wait while somebody here revokes this user."""
        free = asyncio.Event()
        with self._lock:
            told = self._held.get(user)
            if told is None:
                return
            told.append(partial(self._worker.call, free.set))
        await free.wait()

    async def _read(self, user: UserKey) -> None:
        leases: dict[tuple[str, bool], list[Held]] = {}
        for lease in self._worker.leases_here(user):
            if not lease.is_awaited:
                leases.setdefault((lease.position, lease.is_restored), []).append(lease)
        meant: dict[str, tuple[bytes, list[Held]]] = {}
        newest: dict[tuple[str, bool], str] = {}
        for about, missing in leases.items():
            position, is_restored = about
            found = await self._worker.session.notices(user, "" if is_restored else position)
            places = [at for at, _ in found]
            # Where the store still has it, what stands before is older.
            first = places.index(position) + 1 if is_restored and position in places else 0
            for at, sealed in found[first:]:
                meant.setdefault(at, (sealed, []))[1].extend(missing)
            if places:
                newest[about] = places[-1]
        for at, (sealed, missing) in meant.items():
            await self._apply_one(user, at, sealed, missing)
        for about, at in newest.items():
            for lease in leases[about]:
                if lease.is_restored == about[1]:  # else it was put back meanwhile
                    lease.position, lease.is_restored = at, False

    async def _apply_one(self, user: UserKey, at: str, sealed: bytes, leases: Sequence[Held]) -> None:
        notice = self._opened(user, sealed)
        if notice is not None:
            await apart(partial(self._apply, notice, at, leases))

    def _opened(self, user: UserKey, sealed: bytes) -> Notice | None:
        packed = self._seals.unseal("notice", user, sealed)
        if packed is None:
            return None
        try:
            return Notice.unpacked(packed)
        except (ValueError, TypeError):
            self._seals.refuse()
            return None
