"""Events between workers: from the store to the connections here, in the store's order, without loss or doubling."""

# pyright: reportPrivateUsage=false
# The core of a context is read where it is.

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.audience import Asked, Audience, Heard
from ucm_middleware.cluster.errands import Again, Errands
from ucm_middleware.cluster.outgoing import NOBODY
from ucm_middleware.cluster.places import Cursor, is_place
from ucm_middleware.cluster.room import Room
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.sending import Sending
from ucm_middleware.cluster.store import History, Place, Session, UserKey
from ucm_middleware.cluster.worker import Worker
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.channel import Channel, Connection, LastEvent
from ucm_middleware.events.envelope import Draft, Event
from ucm_middleware.events.hub import Hub, Sent, missed
from ucm_middleware.forking import renewed_after_fork

logger = logging.getLogger(__name__)

AT_ONCE: Final = 32
"""Users whose events are looked up at the same time, when there are many who must be."""


@dataclass(slots=True)
class Effects:
    """Into whose lines something was put, whose line has no room, and what is lost by it."""

    put: dict[Connection, None] = field(default_factory=dict[Connection, None])
    full: list[UserExecutionContext] = field(default_factory=list[UserExecutionContext])
    lost: list[int] = field(default_factory=list[int])


class Relay(Sending):
    """Thread-safe. What comes from the store, and what is asked of it, is on the cluster's thread.

    ``close`` closes a context that is too slow, without doing its releases there. ``catch_up_notices`` applies what was
    noticed of a user. A revocation ends the epoch; so where that has changed, it is seen to before anything more is
    delivered, and nothing that was sent after a revocation comes to who was revoked.
    """

    __slots__ = (
        "_again",
        "_audiences",
        "_catch_up_notices",
        "_close",
        "_due",
        "_halted",
        "_lookers",
        "_room",
        "_seals",
    )

    def __init__(
        self,
        hub: Hub,
        worker: Worker,
        errands: Errands,
        seals: Seals,
        trail: AuditTrail,
        close: Callable[[UserExecutionContext], object],
        catch_up_notices: Callable[[UserKey], Awaitable[None]],
    ) -> None:
        super().__init__(hub, worker, errands, seals, trail, self._lined_up)
        self._seals = seals
        self._close = close
        self._catch_up_notices = catch_up_notices
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the connections are the parent's."""
        super().after_fork()
        self._audiences: dict[UserKey, Audience] = {}
        self._due: dict[Audience, None] = {}
        self._halted: dict[Audience, None] = {}
        self._lookers = 0
        self._room = Room(self._worker, self._hub.policy, self._close)
        self._again = Again(self._attend_halted)

    def _lined_up(self, sent: Sent) -> None:
        """An event was put in line here alone."""
        for connection, _ in sent.waiting:
            self._room.mind(connection)
        self._close_slow(sent.full)

    # Connections. The hub's lock is held.

    def joined(self, connection: Connection, user_id: str, channel: Channel) -> None:
        """A connection is there, and is owed what came after its place. Never waits."""
        audience = self._audience_of(user_id)
        audience.cursors[connection] = self._cursor_of(connection, user_id, channel)
        audience.is_behind = True
        self._worker.call(self._attend, audience)

    def _audience_of(self, user_id: str) -> Audience:
        key = self._worker.key_of(user_id)
        audience = self._audiences.get(key)
        if audience is None:
            audience = self._audiences[key] = Audience(user_id, key)
        return audience

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
        self._move()
        self._again.now()

    def _move(self) -> None:
        """Users stand elsewhere when another secret's seal stands in the store: their connections are heard for there,
        and what they missed is not known.
        """
        with self._hub.lock:
            audiences = [*self._audiences.values()]
        moved = [one for one in audiences if self._worker.key_of(one.user_id) != one.key]
        for old in moved:
            with self._hub.lock:
                cursors, old.cursors = old.cursors, {}
                new = self._audience_of(old.user_id)
                for connection in cursors:
                    if not connection.outbox.is_over:  # it left, and was looked for where the user stands now
                        new.cursors[connection] = Cursor(None, None)
                new.is_behind = True
            self._attend(old)
            self._attend(new)

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
                    audience.is_leaving = True
                    await session.unsubscribe(audience.key)
                    audience.is_leaving = False
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
            if audience.subscribed_by is session or audience.is_leaving:
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
        draft, mark = None, ""
        if packed is not None:
            try:
                draft, mark = Draft.unpacked(packed)
            except (ValueError, TypeError):
                self._seals.refuse()
        had_by = NOBODY
        if draft is None:  # it takes its place all the same, and clients are told that they miss something
            draft = missed(user_id, LastEvent(place.epoch, place.sequence - 1), self._hub.policy)
        elif mark.partition(".")[0] == self._worker.id:
            had_by = self._outgoing.heard(mark, place)
        else:
            watch = self._hub.watch
            if watch is not None and watch.keeps_out(user_id, draft.data_text):
                return Heard(place, None)
        return Heard(place, draft.numbered(place.epoch, place.sequence, 0.0), had_by)

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
            self._room.mind(connection)
        for sequence in effects.lost:
            self._recorded(partial(self._trail.event_lost, audience.user_id, None, "full", sequence))
        self._close_slow(effects.full)

    def _close_slow(self, contexts: Iterable[UserExecutionContext]) -> None:
        for context in contexts:
            self._close(context)

    def _recorded(self, record: Callable[[], None]) -> None:
        try:
            record()
        except Exception:
            logger.exception("that a user's event was lost could not be recorded")


def _put(connection: Connection, heard: Heard, effects: Effects, *, is_kept: bool = False) -> None:
    """Put an event in line, with the hub's lock held."""
    event, outbox = heard.event, connection.outbox
    if event is None or outbox.is_over or connection.is_hushed or not connection.gets(event.narrowing):
        return
    if heard.had_by and connection.context._core in heard.had_by:
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
