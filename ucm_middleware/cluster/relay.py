"""Events between workers: from the store to the connections here, in the store's order, without loss or doubling."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from ucm_middleware.audit.records import Data
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.audience import Asked, Audience, Heard
from ucm_middleware.cluster.errands import Again, Errands
from ucm_middleware.cluster.outgoing import Outgoing, Publication
from ucm_middleware.cluster.places import MOST, Cursor, is_place
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import History, Place, Published, Session, UserKey
from ucm_middleware.cluster.tally import Tally
from ucm_middleware.cluster.worker import Worker
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.channel import Channel, Connection, LastEvent
from ucm_middleware.events.delivery import Delivery, Dropped
from ucm_middleware.events.envelope import Draft, Event
from ucm_middleware.events.hub import Hub, Sent, missed
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.lifetime import CloseReason

logger = logging.getLogger(__name__)

AT_ONCE: Final = 32
"""Users whose events are looked up at the same time, when there are many who must be."""

EVERYBODY: Final = ""
"""Stands for the connections of a user, wherever they are, where an event is for none of them."""


@dataclass(frozen=True, slots=True)
class Given:
    """A posted event: its place is not known yet. ``connections`` are those of the user to this worker."""

    connections: int
    dropped: Sequence[Dropped] = ()

    @property
    def placed(self) -> Data:
        is_lost = any(one.why == "cluster" for one in self.dropped)
        return (("lost", "cluster"),) if is_lost else ()

    @property
    def full(self) -> Sequence[UserExecutionContext]:
        return ()

    def delivery(self) -> Delivery:
        return Delivery("", 0, 0, 0 if self.dropped else self.connections, tuple(self.dropped), False)


@dataclass(frozen=True, slots=True)
class Taken:
    """An event that has its place in the store."""

    published: Published
    kept: bool

    @property
    def placed(self) -> Data:
        return ("sequence", self.published.place.sequence), ("connections", self.published.connections)

    @property
    def dropped(self) -> Sequence[Dropped]:
        return ()

    @property
    def full(self) -> Sequence[UserExecutionContext]:
        return ()

    def delivery(self) -> Delivery:
        place = self.published.place
        return Delivery(place.epoch, place.sequence, 0, self.published.connections, (), self.kept)


@dataclass(slots=True)
class Effects:
    """Into whose lines something was put, whose line has no room, and what is lost by it."""

    put: dict[Connection, None] = field(default_factory=dict[Connection, None])
    full: list[UserExecutionContext] = field(default_factory=list[UserExecutionContext])
    lost: list[int] = field(default_factory=list[int])


class Relay:
    """Thread-safe. What comes from the store, and what is asked of it, is on the cluster's thread.

    ``close`` closes a context from there, without doing its releases there. ``catch_up_notices`` applies what was
    noticed of a user. A revocation ends the epoch; so where that has changed, it is seen to before anything more is
    delivered, and nothing that was sent after a revocation comes to who was revoked.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_audiences",
        "_catch_up_notices",
        "_close",
        "_due",
        "_errands",
        "_halted",
        "_hub",
        "_lookers",
        "_lost",
        "_outgoing",
        "_overdue",
        "_seals",
        "_trail",
        "_worker",
    )

    def __init__(
        self,
        hub: Hub,
        worker: Worker,
        errands: Errands,
        seals: Seals,
        trail: AuditTrail,
        close: Callable[[UserExecutionContext, CloseReason], object],
        catch_up_notices: Callable[[UserKey], Awaitable[None]],
    ) -> None:
        self._hub = hub
        self._worker = worker
        self._errands = errands
        self._seals = seals
        self._trail = trail
        self._close = close
        self._catch_up_notices = catch_up_notices
        self._outgoing = Outgoing(worker, errands, hub, seals, self._lose, self._lined_up)
        self._lost = Tally(_tell_lost)
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the connections are the parent's."""
        self._outgoing.after_fork()
        self._audiences: dict[UserKey, Audience] = {}
        self._due: dict[Audience, None] = {}
        self._halted: dict[Audience, None] = {}
        self._lookers = 0
        self._overdue: dict[Connection, asyncio.TimerHandle] = {}
        self._again = Again(self._attend_halted)

    # What is sent, in any thread.

    def post(self, user_id: str, draft: Draft) -> "Given":
        """Have an event sent, behind those of the same user that were posted here before. Never waits.

        What cannot be sent is in its ``dropped``, or in the log and on record when that turns out later.
        """
        watch = self._hub.watch
        if watch is not None and watch.holds_back(user_id, draft.data_text):
            return self._held_back(user_id, draft)
        here = sum(connection.gets(draft.narrowing) for connection in self._hub.connections_of(user_id))
        if self._worker.state == "down" or not self._outgoing.put(user_id, draft):
            self._worker.call(self._lost.count)
            return Given(here, (Dropped(EVERYBODY, 0, "cluster"),))
        if watch is not None:
            watch.look_at(user_id, draft.data_text)
        return Given(here)

    async def publish(self, user_id: str, draft: Draft) -> "Sent | Taken | Given":
        """The same, and wait for its place. Raises ClusterUnavailableError under the policy "closed"."""
        watch = self._hub.watch
        if watch is not None and watch.holds_back(user_id, draft.data_text):
            return self._held_back(user_id, draft)
        waiter: Future[Publication] = Future()
        if not self._outgoing.put(user_id, draft, waiter):
            raise ClusterUnavailableError("down")
        publication = await asyncio.wrap_future(waiter)
        if watch is not None:
            watch.look_at(user_id, draft.data_text)
        if isinstance(publication, Sent):
            return publication
        policy = self._hub.policy
        return Taken(publication, policy.keep_events > 0 and draft.size <= policy.keep_bytes)

    async def knows_soon(self, user_id: str) -> bool:
        """Whether a user is live on any worker, or has events that are kept. Raises ClusterUnavailableError."""
        return await asyncio.wrap_future(self._asked_for(user_id))

    def knows(self, user_id: str) -> bool:
        """The same, in a thread, which waits."""
        return self._errands.wait(self._asked_for(user_id))

    def _asked_for(self, user_id: str) -> "Future[bool]":
        async def is_known() -> bool:
            worker = self._worker
            if worker.state == "local":
                return False
            user = worker.key_of(user_id)
            try:
                if (await worker.session.history(user, MOST)).newest is not None:
                    return True
                return bool(await worker.session.leases_of(user))
            except ClusterUnavailableError:
                if worker.policy.when_unavailable == "local":
                    return False
                raise

        return self._errands.ask(is_known)

    def _held_back(self, user_id: str, draft: Draft) -> Given:
        """An event that nobody gets: it takes no place in the order, where clients would miss it."""
        here = [one.id for one in self._hub.connections_of(user_id) if one.gets(draft.narrowing)]
        return Given(len(here), tuple(Dropped(one, 0, "guarded") for one in here or (EVERYBODY,)))

    def _lose(self, user_id: str, draft: Draft) -> None:
        """A posted event could not be sent, and nobody waits for its answer."""
        self._lost.count()
        self._recorded(partial(self._trail.event_lost, user_id, draft.type, "cluster"))

    def _lined_up(self, sent: Sent) -> None:
        """An event was put in line here alone."""
        for connection, _ in sent.waiting:
            self._mind_room(connection)
        self._close_slow(sent.full)

    # Connections. The hub's lock is held.

    def joined(self, connection: Connection, user_id: str, channel: Channel) -> None:
        """A connection is there, and is owed what came after its place. Never waits."""
        key = self._worker.key_of(user_id)
        audience = self._audiences.get(key)
        if audience is None:
            audience = self._audiences[key] = Audience(user_id, key)
        audience.cursors[connection] = self._cursor_of(connection, user_id, channel)
        audience.is_behind = True
        self._worker.call(self._attend, audience)

    def left(self, connection: Connection, user_id: str) -> None:
        """It is not there any more. Never waits."""
        audience = self._audiences.get(self._worker.key_of(user_id))
        if audience is not None and audience.cursors.pop(connection, None) is not None and not audience.cursors:
            self._worker.call(self._attend, audience)

    def _cursor_of(self, connection: Connection, user_id: str, channel: Channel) -> Cursor:
        after = connection.after
        if after is not None:
            if after.epoch != channel.epoch:
                connection.after = None
                return Cursor(after.epoch, after.sequence, is_claim=True)
            self._hub.replay(connection, channel, user_id)  # it was numbered here, while the store could not be asked
        lease = self._worker.lease_of(connection.context)
        if after is not None or lease is None:
            return Cursor(None, None)
        return Cursor(None, 0) if lease.events is None else Cursor(lease.events.epoch, lease.events.sequence)

    # What the store says by itself, on the cluster's thread.

    def heard(self, user: UserKey, place: Place, payload: bytes) -> None:
        """An event of a user."""
        audience = self._audiences.get(user)
        if audience is None:
            return
        if not is_place(place):
            self._seals.refuse()
            return
        heard = self._opened(audience, place, payload)
        effects = Effects()
        with self._hub.lock:
            for connection in audience.hear(heard, self._hub.policy):
                _put(connection, heard, effects)
        self._see_to(audience, effects)
        if audience.is_behind:
            self._attend(audience)

    def was_deaf(self) -> None:
        """Nothing was heard for a while: what was said meanwhile must be looked up."""
        with self._hub.lock:
            audiences = [*self._audiences.values()]
            for audience in audiences:
                audience.is_behind = True
        for audience in audiences:
            self._attend(audience)

    def store_is_back(self) -> None:
        """The store can be asked again: what was numbered here alone is over."""
        self._hub.purge_numbered()
        self._again.now()

    # Looking up what is owed, on the cluster's thread.

    def _attend(self, audience: Audience) -> None:
        """Have it subscribed, looked up or unsubscribed, whatever it needs. At most so many are looked up at once."""
        if audience.is_attended or audience in self._due:
            return  # whoever looks, looks again before it ends
        self._halted.pop(audience, None)
        self._due[audience] = None
        if self._lookers < AT_ONCE:
            self._lookers += 1
            self._errands.start(self._look)

    async def _look(self) -> None:
        try:
            while self._due:
                audience = next(iter(self._due))
                del self._due[audience]
                audience.is_attended = True
                try:
                    await self._bring_level(audience)
                finally:
                    audience.is_attended = False
        finally:
            self._lookers -= 1

    async def _bring_level(self, audience: Audience) -> None:
        session = self._worker.session
        try:
            while not self._is_done(audience, session):
                if not audience.cursors:
                    audience.subscribed_by = None  # first: for whoever joins in the middle of it, it is begun anew
                    await session.unsubscribe(audience.key)
                elif audience.subscribed_by is not session:
                    await session.subscribe(audience.key)
                    audience.subscribed_by = session
                    audience.is_behind = True
                else:
                    await self._catch_up(audience)
        except ClusterUnavailableError as error:
            self._worker.doubt(error)
            self._halt(audience)
        except Exception:
            logger.exception("the events of a user could not be looked up; it is tried again")
            self._halt(audience)
        else:
            self._again.reset()

    def _is_done(self, audience: Audience, session: Session) -> bool:
        with self._hub.lock:
            if audience.cursors:
                return audience.subscribed_by is session and not audience.is_behind
            if audience.subscribed_by is session:
                return False
            if self._audiences.get(audience.key) is audience:
                del self._audiences[audience.key]
            return True

    def _halt(self, audience: Audience) -> None:
        """Try it again later, or when the store is back."""
        self._halted[audience] = None
        self._again.plan()

    def _attend_halted(self) -> None:
        if self._worker.state in ("down", "local"):
            self._again.plan()
            return
        halted, self._halted = self._halted, {}
        for audience in halted:
            self._attend(audience)

    async def _catch_up(self, audience: Audience) -> None:
        with self._hub.lock:
            asked = audience.ask()
        try:
            history = await self._worker.session.history(audience.key, asked.after)
            if history.newest is not None and not is_place(history.newest):
                self._seals.refuse()
                raise ClusterUnavailableError("refused")
            if asked.is_other_epoch(history.newest):
                await self._catch_up_notices(audience.key)
        except BaseException:
            with self._hub.lock:
                audience.unanswered()
            raise
        self._hub.purge_numbered(audience.user_id)
        self._answered(audience, asked, history)

    def _answered(self, audience: Audience, asked: Asked, history: History) -> None:
        newest = history.newest
        kept: dict[int, Heard] = {}
        if newest is not None:
            with self._hub.lock:
                heard = audience.waiting()  # what was opened, and looked at, already
            for sequence, payload in history.events:
                place = Place(newest.epoch, sequence)
                kept[sequence] = heard.get(place) or self._opened(audience, place, payload)
        effects = Effects()
        with self._hub.lock:
            for one in audience.answered(asked, newest, kept):
                if one.events is None:
                    events = [Heard(newest or Place("", 0), self._missed(audience.user_id, one.last, newest))]
                else:
                    events = one.events
                # What is looked up has a bound of its own, but only once: a slow one is not behind for ever.
                is_kept = one.newcomer or not one.connection.outbox.is_replaying
                for event in events:
                    _put(one.connection, event, effects, is_kept=is_kept)
            for connection, event in audience.catch_up(asked):
                _put(connection, event, effects)
        self._see_to(audience, effects)

    # Putting in line.

    def _opened(self, audience: Audience, place: Place, payload: bytes) -> Heard:
        user_id = audience.user_id
        packed = self._seals.unseal("event", audience.key, payload)
        draft = worker = None
        if packed is not None:
            try:
                draft, worker = Draft.unpacked(packed)
            except (ValueError, TypeError):
                self._seals.refuse()
        if draft is None:  # it takes its place all the same, and clients are told that they miss something
            draft = missed(user_id, LastEvent(place.epoch, place.sequence - 1), self._hub.policy)
        elif worker != self._worker.id:
            watch = self._hub.watch
            if watch is not None and watch.keeps_out(user_id, draft.data_text):
                return Heard(place, None)
        return Heard(place, draft.numbered(place.epoch, place.sequence, 0.0))

    def _missed(self, user_id: str, last: LastEvent, newest: Place | None) -> Event:
        """With the newest number there is: what comes after it is live. Where there is none, with one of no epoch of
        the store's, so that whoever comes back with it is told again.
        """
        place = Place(self._worker.id, 0) if newest is None else newest
        return missed(user_id, last, self._hub.policy).numbered(place.epoch, place.sequence, 0.0)

    def _see_to(self, audience: Audience, effects: "Effects") -> None:
        """What is to be done about it without the hub's lock."""
        for connection in effects.put:
            connection.outbox.wake()
            self._mind_room(connection)
        for sequence in effects.lost:
            self._recorded(partial(self._trail.event_lost, audience.user_id, None, "full", sequence))
        self._close_slow(effects.full)

    def _close_slow(self, contexts: Iterable[UserExecutionContext]) -> None:
        for context in contexts:
            self._close(context, "slow")

    def _recorded(self, record: Callable[[], None]) -> None:
        try:
            record()
        except Exception:
            logger.exception("that a user's event was lost could not be recorded")

    # The policy "wait". Senders in other workers cannot be held up: it is waited for here.

    def _mind_room(self, connection: Connection) -> None:
        policy = self._hub.policy
        outbox = connection.outbox
        if policy.when_full != "wait" or not outbox.is_full or outbox.is_over or connection in self._overdue:
            return
        loop = asyncio.get_running_loop()
        self._overdue[connection] = loop.call_later(
            policy.wait_seconds, self._is_overdue, connection, context=Context()
        )
        outbox.when_room(partial(self._worker.call, self._has_room, connection))

    def _has_room(self, connection: Connection) -> None:
        timer = self._overdue.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._mind_room(connection)  # it may be full again by now

    def _is_overdue(self, connection: Connection) -> None:
        self._overdue.pop(connection, None)
        if connection.outbox.is_full:
            self._close(connection.context, "slow")


def _put(connection: Connection, heard: Heard, effects: Effects, *, is_kept: bool = False) -> None:
    """Put an event in line, with the hub's lock held."""
    event, outbox = heard.event, connection.outbox
    if event is None or outbox.is_over or connection.is_hushed or not connection.gets(event.narrowing):
        return
    effects.put[connection] = None
    if is_kept:
        outbox.replay(event)
        return
    for sequence, why in outbox.put(event):
        if why != "gone":
            effects.lost.append(sequence)
        if why == "full":
            effects.full.append(connection.context)


def _tell_lost(number: int) -> None:
    logger.error("%d events of users could not be sent: the cluster's store took none, or too many waited", number)
