"""This worker as a member of the cluster: it asks for leases, and gives them back."""

import asyncio
import logging
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from typing import Any, Final, TypeVar

from ucm_middleware.cluster.book import Attempt, Book, SlotLimits
from ucm_middleware.cluster.leases import Lease, boot_clock
from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.state import Figures, MemberState, tell
from ucm_middleware.cluster.store import (
    BUCKETS,
    Gone,
    Granted,
    Late,
    Place,
    Recovering,
    Refused,
    Session,
    Slot,
    Store,
    UserKey,
)
from ucm_middleware.cluster.thread import ClusterThread
from ucm_middleware.cluster.upkeep import Upkeep
from ucm_middleware.cluster.users import Users
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError, ContextLimitError
from ucm_middleware.forking import leave_to_parent, renewed_after_fork

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS: Final = 4
"""How often an order is made anew: a tenancy may be gone, a number too low, and room be made for it."""

FIRST_LOOK: Final = 3
"""For how many timeouts a context waits that is opened before the store was looked at."""


TELLING: Final = 3
"""For how many timeouts a context waits that is opened while older ones of its user have missed a notice."""


class Member:
    """Every method may be called from any thread. The other members are in other processes.

    What it is told with stands in the attributes ``on_...``, and is called on the cluster's thread: it must not wait
    there. ``close_expired`` closes the contexts of a user whose deadline has come, when the user is at the limit.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        store: Store,
        users: Users,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.policy = policy
        self.store = store
        self.users = users
        self.clock = boot_clock() if clock is None else clock
        self.book = Book(policy.lease, self.clock)
        self.close_expired: Callable[[str], None] = _nothing
        self.on_state: Callable[[MemberState, str | None], None] = _nothing
        self.on_lost: Callable[[Sequence[Lease]], None] = _nothing
        self.on_noticed: Callable[[UserKey], Coroutine[Any, Any, None]] = _nothing_soon
        self.on_reconnected: Callable[[bool], Coroutine[Any, Any, None]] = _nothing_soon
        self.on_event: Callable[[UserKey, Place, bytes], None] = _nothing
        self.on_deaf: Callable[[], None] = _nothing
        self.limits: SlotLimits | None = None  # those that were asked for last
        self._begin_anew()
        renewed_after_fork(self)

    def _begin_anew(self) -> None:
        self.state: MemberState = "starting"
        self.reason: str | None = None
        """Why the store cannot be asked, in a word."""
        self.fault: ConfigurationError | None = None
        """What is wrong with the store for good."""
        self.problem = ""
        """The reason with what is to be done about it, for the log."""
        self._told: set[str] = set()
        self.is_reachable = self.is_full = False
        self.recovers_at = [0.0] * BUCKETS  # when each bucket has recovered, on this worker's clock
        self.answered_at: float | None = None
        self.lost = self.refused = self.renewals = 0
        self.looked: Future[None] = Future()
        self._sessions: dict[AbstractEventLoop, Session] = {}
        self._thread: ClusterThread | None = None
        self._starting = threading.RLock()
        self.upkeep = Upkeep(self)

    def after_fork(self) -> None:
        """Be another worker: what is held, and every connection, is the parent's."""
        for thing in (*self._sessions.values(), *self._sessions, self._thread, self.upkeep):
            leave_to_parent(thing)
        self.book.start_empty()
        self._begin_anew()

    @property
    def is_local(self) -> bool:
        """Whether it carries on by itself while the store cannot be asked."""
        return self.policy.when_unavailable == "local"

    # The thread.

    @property
    def thread(self) -> ClusterThread:
        """The cluster's thread, which is started when it is asked for."""
        thread = self._thread
        if thread is None or thread.is_ending:
            with self._starting:
                thread = self._thread
                if thread is None or thread.is_ending:
                    thread = ClusterThread(self.upkeep.run)
                    thread.start()
                    self._thread = thread
        return thread

    def call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run something on the cluster's thread."""
        return self.thread.call(work)

    @property
    def session(self) -> Session:
        """The session of the cluster's thread, for what runs there."""
        return self.session_here()

    def session_here(self) -> Session:
        """The session of the running loop."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            for other in list(self._sessions):
                if other.is_closed():
                    self._sessions.pop(other, None)
            session = self._sessions[loop] = self.store.session()
        return session

    async def ready(self) -> None:
        """Wait until the store was looked at, and while it recovers. Raises ConfigurationError for what can never work;
        one that cannot be reached is in the log, and the policy holds.
        """
        await asyncio.wrap_future(self.call(self.upkeep.settled()))
        if self.fault is not None:
            raise self.fault

    async def stop(self) -> None:
        """Give back what is held, end the thread, and close every connection."""
        with self._starting:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.end()
            await asyncio.wait((asyncio.wrap_future(thread.ended),))
        here = asyncio.get_running_loop()
        for loop, session in list(self._sessions.items()):
            del self._sessions[loop]
            if loop is here:
                await session.aclose()
            elif loop.is_running():
                with suppress(RuntimeError):  # it was closed in this very moment
                    Context().run(asyncio.run_coroutine_threadsafe, session.aclose(), loop)
        self.state, self.is_reachable, self.looked = "starting", False, Future()

    def end_soon(self) -> None:
        """The same for an owner that is gone, without waiting."""
        if self._thread is not None:
            self._thread.end()

    # Leases.

    async def acquire(self, user_id: str, *, is_connection: bool, limits: SlotLimits) -> Lease:
        """A lease for a context that is about to be opened: one round trip, by the running loop's own session.

        Raises ContextLimitError when the user has too many, ClusterUnavailableError where the store cannot be asked.
        """
        self.limits = limits
        try:
            await self.first_look()
            return await self._acquire(user_id, is_connection, limits)
        except ClusterUnavailableError:
            self.refused += 1
            raise

    def acquire_now(self, user_id: str, *, is_connection: bool, limits: SlotLimits) -> Lease:
        """The same for synchronous code, in any thread, which it blocks for a round trip through the cluster's thread.

        Raises as ``acquire`` does.
        """
        thread = self.thread
        if thread.is_here:
            raise ConfigurationError("no context is opened on the cluster's own thread; use another one")
        future = thread.call(self.acquire(user_id, is_connection=is_connection, limits=limits))
        try:
            return future.result((FIRST_LOOK + 2 * ATTEMPTS) * self.policy.timeout)
        except TimeoutError:
            future.add_done_callback(self._give_back)
            raise ClusterUnavailableError("timeout", is_unknown=True) from None
        except BaseException:
            future.add_done_callback(self._give_back)
            raise

    def _give_back(self, future: "Future[Lease]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.release(future.result())

    def lives(self, lease: Lease) -> None:
        """Something has come to live under a lease. What was noticed while the grant was on its way, and found nobody
        here, is meant for it too.
        """
        noticed = lease.tenancy.noticed
        if noticed and noticed.get(lease.key.digest, lease.position) != lease.position:
            self.thread.soon(self.upkeep.catch_up_soon, lease.tenancy, lease.key)

    def release(self, lease: Lease) -> None:
        """A lease is over. Never waits, and may be said twice."""
        if self.book.release(lease) and self._thread is not None:
            self._thread.wake_soon()

    def leases_of(self, user_id: str) -> list[Lease]:
        """A user's leases on this worker."""
        return self.book.leases_of(user_id)

    def leases_at(self, key: UserKey) -> list[Lease]:
        """The same by where the user stands in the store."""
        return self.book.leases_at(key)

    def key_of(self, user_id: str) -> UserKey:
        """Where a user stands in the store."""
        return self.users.key_of(user_id)

    async def first_look(self) -> None:
        """Wait until the store was looked at for the first time, for a while at most."""
        if self.state != "starting":
            return
        looked = self.looked
        _ = self.thread  # it looks first of all
        await asyncio.wait((asyncio.wrap_future(looked),), timeout=FIRST_LOOK * self.policy.timeout)

    async def _acquire(self, user_id: str, is_connection: bool, limits: SlotLimits) -> Lease:
        key = self.users.key_of(user_id)
        has_made_room = False
        for _ in range(ATTEMPTS):
            if (lease := self._without_store(user_id, key, is_connection)) is not None:
                return lease
            attempt = self.book.attempt(user_id, key, is_connection, limits)
            try:
                found = await self.try_for(attempt)
            except ClusterUnavailableError as error:
                self.doubt(error)
                if self.is_local:
                    return self.book.without_store(user_id, key, is_connection)
                raise
            if isinstance(found, Lease):
                await self._tell_older(found)
                return found
            if isinstance(found, Refused):
                if has_made_room or not await self._make_room(user_id, key):
                    raise _limit_reached(found.scope, limits)
                has_made_room = True
        raise ClusterUnavailableError("refused")

    async def try_for(self, attempt: Attempt, lease: Lease | None = None) -> Lease | Refused | Recovering | None:
        """Ask the store. None when it must be asked anew. ``lease`` is one that is to have its place by it.

        However it ends, nothing stays taken that nobody knows of.
        """
        try:
            answer = await self.session_here().acquire(attempt.order)
        except BaseException as error:
            if isinstance(error, ClusterUnavailableError) and not error.is_unknown:
                self.book.not_granted(attempt)
            else:
                self.book.unanswered(attempt)
                self.thread_wakes()
            raise
        self.answered_at = self.clock()
        bucket = attempt.tenancy.bucket
        if isinstance(answer, Granted):
            self.recovers_at[bucket] = 0.0
            found = self.book.granted(attempt, answer, lease)
            if found is None:
                self.thread_wakes()
            return found
        self.book.not_granted(attempt)
        if isinstance(answer, Recovering):
            self.upkeep.note_recovering(bucket, answer.seconds)
        elif isinstance(answer, Gone):
            self.upkeep.lose_soon(attempt.tenancy)
        return None if isinstance(answer, Gone | Late) else answer

    async def _tell_older(self, lease: Lease) -> None:
        """What older leases of the same user have missed reaches them before there is a newer one."""
        behind = [
            (one, one.position)
            for one in self.book.leases_of(lease.user_id)
            if one.position != lease.position and not one.is_awaited  # what comes to live there looks for itself
        ]
        if not behind:
            return
        telling = self.on_noticed(lease.key)
        try:
            async with asyncio.timeout(TELLING * self.policy.timeout):
                if self._thread is None or self._thread.is_here:
                    await telling
                else:
                    await asyncio.wrap_future(self.call(telling))
        except BaseException as error:
            self.release(lease)
            if isinstance(error, TimeoutError):
                raise ClusterUnavailableError("timeout") from None
            raise
        for one, position in behind:
            if one.position == position:  # there was nothing, or it was kept for long enough
                one.position = lease.position

    def _without_store(self, user_id: str, key: UserKey, is_connection: bool) -> Lease | None:
        """What there is to say without asking: a lease of this worker's own, or that there is none. None to ask."""
        if self.is_reachable:
            left = self.recovers_at[key.bucket] - self.clock()
            if left <= 0:
                return None
            reason = "recovering"
        else:
            reason, left = self.reason or "down", self.upkeep.seconds_to_probe()
        if self.is_local:
            return self.book.without_store(user_id, key, is_connection)
        raise ClusterUnavailableError(reason, retry_after=max(1.0, left))

    async def _make_room(self, user_id: str, key: UserKey) -> bool:
        """Give back what the user has here and uses no more. False when there was nothing."""
        self.close_expired(user_id)
        over = self.book.unreleased_of(key)
        if not over:
            return False
        await self.session_here().release(over)
        self.book.was_told(over)
        return True

    def doubt(self, error: ClusterUnavailableError) -> None:
        """Somebody could not ask the store: see for oneself."""
        logger.debug("the cluster's store was asked in vain: %s", error)
        self.upkeep.doubt(error)
        self.thread_wakes()

    def thread_wakes(self) -> None:
        """There is something to do."""
        if self._thread is not None:
            self._thread.wake()

    def become(self, state: MemberState) -> None:
        """It stands so with the store from now on."""
        is_news = state != self.state
        if is_news or self.problem not in self._told:  # also another trouble of a store that is down is said, once
            self._told = {self.problem} if is_news else {*self._told, self.problem}
            self.state = state
            tell(state, self.problem, len(self.book), self.policy.lease, is_local=self.is_local)
        if is_news:
            self.on_state(state, self.reason)
        if not self.looked.done():
            self.looked.set_result(None)

    async def leave_loop(self) -> None:
        """Close the running loop's session."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.aclose()

    # Views.

    def figures(self) -> Figures:
        """What is measured."""
        silent = None if self.answered_at is None else max(0.0, self.clock() - self.answered_at)
        return Figures(self.state, len(self.book), self.lost, self.refused, self.renewals, silent)

    async def slots_of(self, user_id: str) -> list[Slot]:
        """A user's live leases, on all workers."""
        return await self.session_here().leases_of(self.users.key_of(user_id))

    def close_lost(self, leases: Sequence[Lease]) -> None:
        """Close what lived under leases that are over, in a thread of its own: it may take long."""
        self.lost += len(leases)
        self.on_lost(leases)
        contexts = [context for lease in leases if (context := lease.context) is not None]
        if not contexts:
            return

        def close() -> None:
            for context in contexts:
                try:
                    context.close("lost")
                except Exception:
                    logger.exception("%r has lost its lease, and its closing failed", context)

        try:
            threading.Thread(target=close, name="ucm-middleware lost leases", daemon=True).start()
        except RuntimeError:  # there can be no more threads
            close()


def _limit_reached(scope: str, limits: SlotLimits) -> ContextLimitError:
    if scope == "connections":
        return ContextLimitError(scope, limits.connections, "close one of this user's connections first")
    return ContextLimitError("user", limits.per_user, "finish or close one of this user's contexts first")


def _nothing(*_: object) -> None:
    """Nobody wants to be told."""


async def _nothing_soon(*_: object) -> None:
    """Nobody wants to be told."""
