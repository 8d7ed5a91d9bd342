"""The sending side: events on their way from this worker to the store, and what is said of them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from ucm_middleware.audit.records import Data
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.errands import Errands
from ucm_middleware.cluster.outgoing import Outgoing, Publication
from ucm_middleware.cluster.places import MOST
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Published
from ucm_middleware.cluster.tally import Tally
from ucm_middleware.cluster.worker import Worker
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.delivery import Delivery, Dropped
from ucm_middleware.events.envelope import Draft
from ucm_middleware.events.hub import Hub, Sent

logger = logging.getLogger(__name__)

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


class Sending:
    """Thread-safe. ``lined_up`` is told, on the cluster's thread, of an event that was put in line here alone."""

    __slots__ = ("__weakref__", "_errands", "_hub", "_lost", "_outgoing", "_trail", "_worker")

    def __init__(
        self,
        hub: Hub,
        worker: Worker,
        errands: Errands,
        seals: Seals,
        trail: AuditTrail,
        lined_up: Callable[[Sent], None],
    ) -> None:
        self._hub = hub
        self._worker = worker
        self._errands = errands
        self._trail = trail
        self._outgoing = Outgoing(worker, errands, hub, seals, self._lose, lined_up)
        self._lost = Tally(_tell_lost)

    def after_fork(self) -> None:
        """Begin anew in a forked child: what waits is sent by the parent."""
        self._outgoing.after_fork()

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
            await worker.looked()
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
        try:
            self._trail.event_lost(user_id, draft.type, "cluster")
        except Exception:
            logger.exception("that an event of a user is lost could not be recorded")


def _tell_lost(number: int) -> None:
    logger.error("%d events of users could not be sent: the cluster's store took none, or too many waited", number)
