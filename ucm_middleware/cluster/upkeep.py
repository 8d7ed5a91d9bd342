"""What the cluster's thread does: renew, give back, look whether the store can be asked, and come back to it."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ucm_middleware.cluster.leases import CARRIED, Lease, Tenancy
from ucm_middleware.cluster.state import MemberState
from ucm_middleware.cluster.store import (
    KEEP_USER,
    Alive,
    Gone,
    Place,
    Recovering,
    Refused,
    Release,
    Renewal,
    UserKey,
)
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError

if TYPE_CHECKING:
    from ucm_middleware.cluster.member import Member
    from ucm_middleware.cluster.thread import ClusterThread

logger = logging.getLogger(__name__)

FIRST_PROBE: Final = 0.25
LONGEST_PROBE: Final = 5.0
"""Seconds between two looks at a store that cannot be asked: at first, and at most."""

SLICE: Final = 8
"""How many leases are placed at a time."""

ENROLL: Final = 3600.0
"""Seconds until the seal is kept for a day more."""


class Upkeep:
    """One ``turn`` does all that is due, and says when the next one is. ``clock`` decides, and nothing sleeps in it."""

    def __init__(self, member: "Member") -> None:
        self._member = member
        self._renew_at = self._probe_at = self._place_at = self._enroll_at = self._looked_at = 0.0
        self._failures = 0
        self._must_look = self._may_be_full = False
        self._hears = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._telling: set[tuple[UserKey, str]] = set()
        self._reading: set[Tenancy] = set()
        self._placing: asyncio.Task[None] | None = None

    async def run(self, thread: "ClusterThread") -> None:
        """Take turns until the thread is to end, and give back what is left."""
        member = self._member
        self._hears = False
        self._placing = None
        self._reading.clear()
        self._probe_at = 0.0
        while not thread.is_ending:
            thread.woken.clear()
            delay = await self.turn()
            try:
                async with asyncio.timeout(delay):
                    await thread.woken.wait()
            except TimeoutError:
                pass
        try:
            await self._give_all_back()
        except ClusterUnavailableError:
            logger.warning("leases could not be given back: they end by themselves")
        await member.leave_loop()

    async def turn(self) -> float:
        """Do what is due. Returns in how many seconds something is again."""
        member = self._member
        try:
            self._end_overdue()
            now = member.clock()
            if not member.is_reachable or self._must_enroll(now):
                if now >= self._probe_at:
                    await self._probe_or_renew()
            elif self._must_look or now >= self._renew_at:
                await self._renew()
                await self._look_for_memory()
            if member.is_reachable:
                await self._give_back()
                self._place_some()
        except ClusterUnavailableError as error:
            self._failed(error)
        except Exception:
            # A fault in one turn must not cost all leases, nor be taken for a store that answers.
            logger.exception("the cluster's upkeep failed; it is tried again as if the store could not be asked")
            self._failed(ClusterUnavailableError("down"))
        self._settle()
        return self._delay()

    def _delay(self) -> float:
        member = self._member
        now = member.clock()
        if not member.is_reachable:
            ends = [one.valid_until for one in member.book.all_tenancies() if one.has_begun]
            return max(0.0, min([self._probe_at, *ends]) - now)
        if self._must_look:
            return 0.0
        wakes = [self._renew_at, self._enroll_at, *(at for at in member.recovers_at if at > now)]
        if member.book.unplaced and self._placing is None and not member.is_full:
            wakes.append(max(self._place_at, self._all_recovered(now)))
        return max(0.0, min(wakes) - now)

    # Asked by the member.

    def look_soon(self) -> None:
        """See at the next turn whether the store can be asked, and what has become of what is held."""
        self._must_look = True

    def doubt(self, error: ClusterUnavailableError) -> None:
        """Somebody asked in vain. What can be renewed all the same does not show it where the store is full, or the
        login has lost a right.
        """
        if error.reason == "memory":
            if self._member.is_full:
                return  # it is known
            self._may_be_full = True
        elif error.reason == "refused":
            self._enroll_at = min(self._enroll_at, max(self._member.clock(), self._looked_at + LONGEST_PROBE))
        self.look_soon()

    def lose_soon(self, tenancy: Tenancy) -> None:
        """The store has said that it is gone: nothing is held there from now on."""
        self._member.book.retire(tenancy, is_gone=True)
        self._member.thread_wakes()

    def note_recovering(self, bucket: int | None, seconds: float) -> None:
        """The store has said that a bucket recovers, or, without one, that all may."""
        member = self._member
        now = member.clock()
        if seconds <= 0:
            return
        known = max(member.recovers_at) if bucket is None else member.recovers_at[bucket]
        if known <= now:
            self._enroll_at = now  # it is news: see to it that the new server sees every bucket
            member.thread_wakes()
        if bucket is not None:
            member.recovers_at[bucket] = now + seconds

    def seconds_to_probe(self) -> float:
        """In how many seconds the store is looked at again."""
        return max(0.0, self._probe_at - self._member.clock())

    async def settled(self) -> None:
        """Wait until the store was looked at, and has recovered."""
        member = self._member
        await asyncio.wait((asyncio.wrap_future(member.looked),))  # who gives up waiting must not cancel it
        if member.is_reachable and (left := max(member.recovers_at) - member.clock()) > 0:
            await asyncio.sleep(left)

    # Looking.

    def _must_enroll(self, now: float) -> bool:
        return now >= self._enroll_at

    async def _probe_or_renew(self) -> None:
        """Look at the store. Where one of its servers cannot be asked, what the others have is kept all the same."""
        try:
            await self._probe()
        except ClusterUnavailableError:
            with suppress(ClusterUnavailableError):
                await self._renew(is_probing=True)
            raise

    async def _probe(self) -> None:
        """Look at the store as if for the first time."""
        member = self._member
        session = member.session
        was_reachable, sent = member.is_reachable, member.clock()
        try:
            seal = await session.inspect()
            seconds = await session.enroll(member.policy.lease)
            if not self._hears:
                await session.listen(_Ears(self, member))
                self._hears = True
        except ConfigurationError as error:
            member.fault = error
            raise ClusterUnavailableError("refused", detail=str(error).removeprefix("cluster: ")) from None
        member.is_full = await session.is_full()
        now = member.clock()
        member.fault, member.answered_at = None, now
        self._looked_at, self._enroll_at = sent, sent + ENROLL
        member.recovers_at = [now + seconds if seconds > 0 else 0.0] * len(member.recovers_at)
        if seal != member.users.seal:
            self._go_by(seal)
        await self._renew(is_probing=True)
        self._failures = 0
        member.is_reachable = True
        self._place_at = now + random.uniform(0, member.policy.lease / 3)
        if not was_reachable or seconds > 0:
            self._begin_task(member.on_reconnected(seconds > 0))

    def _go_by(self, seal: int) -> None:
        """Another secret's seal stands there: what is held stands under keys that hold no more."""
        member = self._member
        for tenancy in member.book.all_tenancies():
            self._lose(tenancy)
        member.users.seal = seal

    def _failed(self, error: ClusterUnavailableError) -> None:
        member = self._member
        self._failures += 1
        pause = min(FIRST_PROBE * 2 ** min(self._failures, 16), LONGEST_PROBE, member.policy.lease / 3)
        self._probe_at = member.clock() + pause * random.uniform(0.5, 1.0)
        member.is_reachable, member.reason = False, error.reason
        member.problem = f"{error.reason}: {error.detail}" if error.detail else error.reason
        if member.is_local:
            self._carry_on()

    def _settle(self) -> None:
        """Say how it stands, where that has changed."""
        member = self._member
        now = member.clock()
        state: MemberState
        if not member.is_reachable:
            state = "local" if member.is_local else "down"
        elif self._all_recovered(now) > now:
            state = "local" if member.is_local else "recovering"
            member.reason = member.problem = "recovering"
        elif member.is_full:
            state, member.reason, member.problem = "full", "memory", "memory"
        else:
            state, member.reason, member.problem = "up", None, ""
        member.become(state)

    def _all_recovered(self, now: float) -> float:
        return max(now, *self._member.recovers_at)

    async def _look_for_memory(self) -> None:
        """See whether a store that refused somebody for want of memory still has none."""
        member = self._member
        if member.is_full or self._may_be_full:
            self._may_be_full = False
            member.is_full = await member.session.is_full()
        if member.is_full:
            self._renew_at = min(self._renew_at, member.clock() + LONGEST_PROBE)

    # Renewing.

    async def _renew(self, *, is_probing: bool = False) -> None:
        member = self._member
        book, lease = member.book, member.policy.lease
        self._must_look = False
        now = member.clock()
        self._renew_at = now + lease / 3 * random.uniform(0.85, 1.0)
        tenancies = [one for one in book.all_tenancies() if one.has_begun and not book.forget_idle(one)]
        if not tenancies:  # ask all the same, or nobody would see that it cannot be
            if not is_probing:
                self.note_recovering(None, await member.session.enroll(lease))
                member.answered_at = member.clock()
            return
        touched = [self._to_touch(one, now) for one in tenancies]
        told = [tuple(one.told.items()) for one in tenancies]
        renewals = [
            Renewal(one.bucket, one.id, lease, told_there, tuple({each.key: None for each in touch}))
            for one, told_there, touch in zip(tenancies, told, touched, strict=True)
        ]
        sent = member.clock()
        answers = await member.session.renew(renewals)
        member.answered_at = member.clock()
        member.renewals += len(renewals)
        for tenancy, told_there, touch, answer in zip(tenancies, told, touched, answers, strict=True):
            if answer is None:
                continue
            if isinstance(answer, Alive):
                self._alive(tenancy, answer, sent, told_there, touch)
            elif isinstance(answer, Gone):
                self._lose(tenancy)
            else:
                await self._restore(tenancy, answer)
        if None in answers:
            raise ClusterUnavailableError("down")

    def _to_touch(self, tenancy: Tenancy, now: float) -> list[Lease]:
        leases = list(tenancy.leases)
        for lease in leases:
            if lease.is_abandoned:
                self._member.book.release(lease)
        return [one for one in leases if now >= one.touched_at + KEEP_USER / 2 and not one.is_over]

    def _alive(
        self,
        tenancy: Tenancy,
        answer: Alive,
        sent: float,
        told: Sequence[tuple[str, str]],
        touched: Sequence[Lease],
    ) -> None:
        member = self._member
        if not member.book.extend(tenancy, sent):
            # It was over here meanwhile, and whether it always stood there cannot be known.
            member.book.give_all_back(tenancy)
            self._lose(tenancy)
            return
        member.book.forget_noticed(tenancy)
        for lease in touched:
            lease.touched_at = sent
        for digest, position in told:
            if tenancy.told.get(digest) == position:
                del tenancy.told[digest]
        for digest, position in answer.noticed:
            if tenancy.told.get(digest) != position:
                self._begin_task(self._tell_noticed(tenancy, UserKey(tenancy.bucket, digest), position))
        self._read_missed_soon(tenancy)

    async def _tell_noticed(self, tenancy: Tenancy, key: UserKey, position: str) -> None:
        """Have a notice applied. Only then the store need not tell of it again."""
        if (key, position) in self._telling:
            return
        self._telling.add((key, position))
        tenancy.noticed[key.digest] = position  # first: what comes to live from now on looks for itself
        try:
            await self._member.on_noticed(key)
            tenancy.told[key.digest] = position
        finally:
            self._telling.discard((key, position))

    def catch_up_soon(self, tenancy: Tenancy, key: UserKey) -> None:
        """Have a user's notices read, again and again until they can be: the store tells of them no more."""
        tenancy.unread[key] = None
        self._read_missed_soon(tenancy)

    def _read_missed_soon(self, tenancy: Tenancy) -> None:
        if tenancy.unread and tenancy not in self._reading:
            self._reading.add(tenancy)
            self._begin_task(self._read_missed(tenancy))

    async def _read_missed(self, tenancy: Tenancy) -> None:
        """Have the notices read that a tenancy is not told of by itself, of one user after another."""
        try:
            while tenancy.unread:
                key = next(iter(tenancy.unread))
                await self._member.on_noticed(key)
                tenancy.unread.pop(key, None)
        finally:
            self._reading.discard(tenancy)

    # Another server.

    async def _restore(self, tenancy: Tenancy, answer: Recovering) -> None:
        """Put back what is held, or give it up where that is over."""
        member = self._member
        book, lease = member.book, member.policy.lease
        self.note_recovering(tenancy.bucket, answer.seconds)
        heir, leases = book.heir_of(tenancy)
        if not leases or tenancy.granted_until <= member.clock():
            self._lose(tenancy)
            return
        slots = [one.slot(heir) for one in leases]
        # Under the old name first, where the store still has them: what is there twice would count twice.
        await member.session.release([Release(one.slot(tenancy)) for one in leases])
        sent = member.clock()
        try:
            is_back = await member.session.restore(tenancy.bucket, heir.id, lease, slots)
        except ClusterUnavailableError:
            book.disown(tenancy, heir, leases)
            raise
        if is_back:
            member.close_lost(book.inherited(tenancy, heir, leases, sent))
            self._read_missed_soon(heir)
        else:
            self._lose(tenancy)

    def _lose(self, tenancy: Tenancy) -> None:
        """What was held there is over; or, where the worker carried on with it, it needs a new place."""
        member = self._member
        if tenancy.is_carried:
            member.book.set_aside(tenancy)
        else:
            member.close_lost(member.book.lose(tenancy))

    def _carry_on(self) -> None:
        """Under the policy "local": what is held now is held until the store says otherwise."""
        now = self._member.clock()
        for tenancy in self._member.book.all_tenancies():
            if tenancy.has_begun and now < tenancy.valid_until:
                tenancy.valid_until = CARRIED

    def _end_overdue(self) -> None:
        member = self._member
        for tenancy in member.book.take_retired():
            self._lose(tenancy)
        # Also where the store can be asked: an order that came late may have begun the tenancy anew, without them.
        now = member.clock()
        for tenancy in member.book.all_tenancies():
            if tenancy.has_begun and tenancy.valid_until <= now:
                member.close_lost(member.book.lose(tenancy))

    # Giving back, and finding a place.

    async def _give_back(self) -> None:
        book = self._member.book
        releases = book.unreleased
        if releases:
            await self._member.session.release(releases)
            book.was_told(releases)
            self._member.answered_at = self._member.clock()

    async def _give_all_back(self) -> None:
        member = self._member
        for tenancy in member.book.all_tenancies():
            member.book.give_all_back(tenancy)
            member.close_lost(member.book.lose(tenancy))  # another worker may have their places from now on
        member.close_lost([lease for lease in list(member.book.unplaced) if member.book.lose_one(lease)])
        if member.is_reachable:
            await self._give_back()

    def _place_some(self) -> None:
        """Ask for a place for some of what was given without the store, a few at a time. Apart from the turn, since
        the notices of a user may last: no renewal waits for them.
        """
        member = self._member
        book = member.book
        now = member.clock()
        if self._placing is not None or not book.unplaced or member.is_full:
            return
        if now < self._place_at or self._all_recovered(now) > now:
            return
        pause = member.policy.lease * SLICE / len(book.unplaced)
        self._place_at = now + min(pause, member.policy.lease / 3) * random.uniform(0.5, 1.0)
        self._placing = self._begin_task(self._place_each(list(book.unplaced)[:SLICE]))
        self._placing.add_done_callback(self._placed)

    def _placed(self, _: asyncio.Task[None]) -> None:
        self._placing = None
        self._member.thread_wakes()

    async def _place_each(self, leases: Sequence[Lease]) -> None:
        try:
            for lease in leases:
                await self._place(lease)
        except ClusterUnavailableError as error:
            self._member.doubt(error)

    async def _place(self, lease: Lease) -> None:
        member = self._member
        lease.key = member.users.key_of(lease.user_id)
        await member.on_noticed(lease.key)  # first: whoever was signed out has no place to get
        if lease.is_over or member.limits is None:
            return
        attempt = member.book.attempt(lease.user_id, lease.key, lease.is_connection, member.limits)
        found = await member.try_for(attempt, lease)
        if isinstance(found, Refused):
            if member.book.lose_one(lease):
                member.close_lost([lease])
        elif found is lease:
            await member.on_noticed(lease.key)  # and what was left meanwhile

    def _begin_task(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Have something done apart, so that no renewal waits for it."""
        task = asyncio.ensure_future(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None:
        """Some tenancies have notices."""
        tenancy = self._member.book.tenancies.get(bucket)
        if tenancy is not None and tenancy.id in tenancies:
            self.look_soon()
            self._member.thread_wakes()


class _Ears:
    """What the store says by itself, passed on."""

    __slots__ = ("_member", "_upkeep")

    def __init__(self, upkeep: Upkeep, member: "Member") -> None:
        self._upkeep = upkeep
        self._member = member

    def event(self, user: UserKey, place: Place, payload: bytes) -> None:
        self._member.on_event(user, place, payload)

    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None:
        self._upkeep.nudged(bucket, tenancies)

    def deaf(self) -> None:
        self._upkeep.look_soon()
        self._member.thread_wakes()
        self._member.on_deaf()


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except ClusterUnavailableError as error:
        logger.info("the cluster's store could not be asked (%s); it is tried again", error.reason)
    except Exception:
        logger.exception("what was told by the cluster's store could not be done")
