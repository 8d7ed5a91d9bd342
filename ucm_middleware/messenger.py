"""Sends events to a user: who may, what they carry, what is on record of it."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import suppress
from contextvars import Context
from functools import partial

from ucm_middleware.audit.records import Data
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ConfigurationError, InvalidEventError
from ucm_middleware.events.delivery import Delivery
from ucm_middleware.events.envelope import Draft, Narrowing, Origin
from ucm_middleware.events.hub import Hub, Posted, Sent, lost_by
from ucm_middleware.guard import Guard
from ucm_middleware.ids import checked_user_id
from ucm_middleware.waiting import running_loop


class Messenger:
    """Stands between those who send and the hub. ``live_of`` lists the live contexts of users."""

    __slots__ = ("_guard", "_hub", "_live_of", "_trail")

    def __init__(self, hub: Hub, guard: Guard, trail: AuditTrail, live_of: Callable[[Iterable[str]], Sized]) -> None:
        self._hub = hub
        self._guard = guard
        self._trail = trail
        self._live_of = live_of

    async def send(self, user_id: str, event: str, data: object, narrowing: Narrowing) -> Delivery:
        """Send, and give the connections on this loop the time to take it. Under the policy "wait": wait for room.

        With a cluster: wait until the event has its place there.
        """
        relay = None if self._hub.relay is None else self._hub.relay_of(user_id)
        if not self._is_here(user_id):
            is_known = await self._trail.knows_soon(user_id)
            _require_known(is_known or (relay is not None and await relay.knows_soon(user_id)))
        draft, actor = self._draft(user_id, event, data, narrowing)
        sent = self._hub.send(user_id, draft) if relay is None else await relay.publish(user_id, draft)
        self._finish(actor, user_id, draft, sent)
        if not isinstance(sent, Sent):
            return sent.delivery()
        if sent.waiting and self._hub.policy.when_full == "wait":
            await self._wait_for_room(sent)
        delivery = sent.delivery()
        if delivery.queued:
            await asyncio.sleep(0)  # the tasks that send it have just been made, and come before this one again
            delivery = sent.delivery()
        return delivery

    def post(self, user_id: str, event: str, data: object, narrowing: Narrowing) -> Delivery:
        """Send from a thread without an event loop. Under the policy "wait" it blocks until there is room.

        With a cluster it is given away to be sent, and never waits, but to learn whether there is such a user.
        """
        relay = None if self._hub.relay is None else self._hub.relay_of(user_id)
        if relay is None and self._hub.policy.when_full == "wait" and running_loop() is not None:
            raise ConfigurationError(
                "post_event would block the event loop that runs here, since when_full is 'wait'; await send_event"
            )
        if not self._is_here(user_id):
            is_known = self._trail.knows(user_id)
            _require_known(is_known or (relay is not None and relay.knows(user_id)))
        draft, actor = self._draft(user_id, event, data, narrowing)
        sent = self._hub.send(user_id, draft) if relay is None else relay.post(user_id, draft)
        self._finish(actor, user_id, draft, sent)
        if isinstance(sent, Sent) and self._hub.policy.when_full == "wait":
            self._block_for_room(sent)
        return sent.delivery()

    def _draft(
        self, user_id: str, event: str, data: object, narrowing: Narrowing
    ) -> tuple[Draft, UserExecutionContext | None]:
        """The event, once it is known that the asking code may send it; and the context that this runs in."""
        hub = self._hub
        if type(user_id) is not str:
            user_id = checked_user_id(user_id)
        self._guard.require(user_id, "send_event")
        actor = self._guard.acting()
        if actor is not None and actor.user_id == user_id:
            origin = Origin(user_id, actor.thread_id, actor.run_id, actor.request_id)
        else:
            origin = Origin(user_id)
        draft = Draft(event, data, origin, narrowing, hub.policy)
        self._trail.require_room()
        return draft, actor

    def _finish(self, actor: UserExecutionContext | None, user_id: str, draft: Draft, sent: Posted) -> None:
        """Put on record what was sent, and close whoever does not keep up."""
        data: Data = ("type", draft.type), *sent.placed
        lost = None
        if sent.dropped:
            data, lost = (*data, ("dropped", len(sent.dropped))), lost_by(sent)
        try:
            self._trail.event_sent(actor, user_id, data, lost)  # never what the event says
        finally:  # also when the ledger is in trouble
            for context in sent.full:
                context.close("slow")

    def _is_here(self, user_id: str) -> bool:
        """Whether the user has a connection, events that are kept or a live context: else the ledger must be asked.

        Raises CrossUserAccessError first, so that nobody learns from it who exists.
        """
        if type(user_id) is str and self._hub.knows(user_id):
            return True
        user_id = checked_user_id(user_id)
        self._guard.require(user_id, "send_event")
        return len(self._live_of([user_id])) > 0

    async def _wait_for_room(self, sent: Sent) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._hub.policy.wait_seconds
        for connection, _ in sent.waiting:
            outbox = connection.outbox
            if not outbox.is_full:
                continue
            room = asyncio.Event()
            outbox.when_room(partial(_set_on, loop, room))
            try:
                async with asyncio.timeout_at(deadline):
                    await room.wait()
            except TimeoutError:
                if outbox.is_full:  # else it has just got room, or its turn came when the time was over
                    connection.context.close("slow")

    def _block_for_room(self, sent: Sent) -> None:
        deadline = time.monotonic() + self._hub.policy.wait_seconds
        for connection, _ in sent.waiting:
            room = threading.Event()
            connection.outbox.when_room(room.set)
            if not room.wait(max(0.0, deadline - time.monotonic())):
                connection.context.close("slow")


def _set_on(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed, and whoever waited on it has gone
        loop.call_soon_threadsafe(event.set, context=Context())


def _require_known(is_known: bool) -> None:
    if not is_known:
        raise InvalidEventError(
            "user_id", "is of a user who was never here", "send to users who have connected, or were on record"
        )
