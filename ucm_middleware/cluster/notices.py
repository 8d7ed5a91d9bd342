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
from dataclasses import dataclass
from functools import partial
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
    trusted code. ``at`` is a time of the worker that left it, for people: no two clocks are compared.
    """

    kind: Literal["revoked", "cleared"]
    user_id: str
    key: str | tuple[str, str] | None = None
    reason: str = ""
    actor: str | None = None
    at: float = 0.0

    def packed(self) -> bytes:
        """As it is sealed."""
        about = [self.kind, self.user_id, self.key, self.reason, self.actor, self.at]
        return json.dumps(about).encode()

    @staticmethod
    def unpacked(packed: bytes) -> "Notice":
        """Raises ValueError for what is none."""
        kind, user_id, key, reason, actor, at = json.loads(packed)
        if kind not in ("revoked", "cleared"):
            raise ValueError(kind)
        if isinstance(key, list):
            user, request = cast("list[str]", key)
            key = user, request
        return Notice(kind, user_id, key, reason, actor, at)


Apply = Callable[[Notice, str, Sequence[Held]], object]
"""Closes what a notice is meant for, of the contexts of these leases; the text is the notice's position."""


@dataclass(slots=True, eq=False)
class Unsent:
    """A notice that the store must still be told."""

    user: UserKey
    notice: Notice


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
        self._unsent: dict[tuple[UserKey, str, object], Unsent] = {}
        self._young: deque[tuple[float, Unsent]] = deque()
        self._held: dict[UserKey, list[Callable[[], object]]] = {}
        self._reading: dict[UserKey, asyncio.Lock] = {}
        self._again = Again(self._send_unsent)

    # Leaving one, in any thread.

    def leave(self, notice: Notice) -> "Future[Notified]":
        """Leave a notice. The future raises ClusterUnavailableError where the store could not be asked: it is kept
        then, and left once it can.
        """
        return self._errands.ask(partial(self._leave, Unsent(self._worker.key_of(notice.user_id), notice)))

    def leave_now(self, notice: Notice) -> Notified:
        """The same for synchronous code, which it blocks for a round trip. Not on the cluster's thread."""
        return self._errands.wait(self.leave(notice))

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
            if worker.state in ("down", "local"):
                raise ClusterUnavailableError("down")
            notice = unsent.notice
            sealed = self._seals.seal("notice", unsent.user, notice.packed())
            notified = await worker.session.notify(unsent.user, sealed, forget_events=notice.kind == "revoked")
        except BaseException as error:
            if isinstance(error, ClusterUnavailableError):
                worker.doubt(error)
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
            self._unsent[unsent.user, notice.kind, notice.key] = unsent
        self._again.plan()

    def _remember(self, unsent: Unsent) -> None:
        """For the case that the store forgets it before everybody has seen it."""
        now = time.monotonic()
        self._young.append((now, unsent))
        while self._young[0][0] < now - self._worker.policy.lease or len(self._young) > MOST_UNSENT:
            self._young.popleft()

    # What could not be left, and what a new store has never heard of; on the cluster's thread.

    def store_is_new(self, bucket: int | None = None) -> None:
        """Whatever was left in this bucket, or in all, may be lost. Who has not seen it yet, must still."""
        since = time.monotonic() - self._worker.policy.lease
        for at, unsent in self._young:
            if at >= since and bucket in (None, unsent.user.bucket):
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
                await self._leave(unsent)
            except ClusterUnavailableError:
                return  # it is kept again, and planned
        self._again.reset()

    # Reading them, on the cluster's thread.

    async def caught_up(self, user_id: str) -> None:
        """The same as ``catch_up`` on any other loop."""
        await asyncio.wrap_future(self._errands.ask(partial(self.catch_up, self._worker.key_of(user_id))))

    async def catch_up(self, user: UserKey) -> None:
        """Apply what this user's leases here have missed. Raises ClusterUnavailableError: then they may not be used."""
        lock = self._reading.setdefault(user, asyncio.Lock())
        try:
            async with lock:
                await self._let_go(user)
                await self._read(user)
        finally:
            if not lock.locked():
                self._reading.pop(user, None)

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
        leases: dict[str, list[Held]] = {}
        for lease in self._worker.leases_here(user):
            leases.setdefault(lease.position, []).append(lease)
        meant: dict[str, tuple[bytes, list[Held]]] = {}
        newest: dict[str, str] = {}
        for position, missing in leases.items():
            found = await self._worker.session.notices(user, position)
            for at, sealed in found:
                meant.setdefault(at, (sealed, []))[1].extend(missing)
                newest[position] = at
        for at, (sealed, missing) in meant.items():
            await self._apply_one(user, at, sealed, missing)
        for position, at in newest.items():
            for lease in leases[position]:
                lease.position = at

    async def _apply_one(self, user: UserKey, at: str, sealed: bytes, leases: Sequence[Held]) -> None:
        packed = self._seals.unseal("notice", user, sealed)
        if packed is None:
            return
        try:
            notice = Notice.unpacked(packed)
        except (ValueError, TypeError):
            self._seals.refuse()
            return
        await apart(partial(self._apply, notice, at, leases))
