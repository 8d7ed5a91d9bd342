"""Signing a user out, and clearing a key, here and on every other worker."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

from ucm_middleware.audit.redaction import text_for_record
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.notices import Notice, Notices
from ucm_middleware.cluster.store import Notified
from ucm_middleware.cluster.worker import Held
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.dispatch import Hooks
from ucm_middleware.events.hub import Hub
from ucm_middleware.ids import is_anonymous_id
from ucm_middleware.lifetime import CloseReason
from ucm_middleware.registry import Key, Registry
from ucm_middleware.teardown import close_apart

logger = logging.getLogger(__name__)


class Revocation:
    """``notices`` is None where a manager stands alone, and for anonymous users, whose contexts are all here."""

    __slots__ = ("__weakref__", "_hooks", "_hub", "_registry", "_trail", "notices")

    def __init__(self, registry: Registry, hub: Hub, trail: AuditTrail, hooks: Hooks) -> None:
        self._registry = registry
        self._hub = hub
        self._trail = trail
        self._hooks = hooks
        self.notices: Notices | None = None

    def revoke(self, actor_id: str | None, user_id: str, reason: str) -> int:
        """Close every live context of a user, and forget the events that were kept. Returns how many contexts there
        were, with a cluster on all workers.

        Raises ClusterUnavailableError where other workers could not be told, once all that is here is done.
        """
        notices = None if self.notices is None or is_anonymous_id(user_id) else self.notices
        number: int | None = None
        failure: Exception | None = None
        with nullcontext() if notices is None else notices.holding(user_id):
            if notices is not None:
                told = text_for_record(reason)
                try:
                    notice = Notice("revoked", user_id, reason=told, actor=actor_id, at=time.time())
                    notified = notices.leave_now(notice)
                    number = None if notified is None else notified.leases
                except Exception as error:  # noqa: BLE001 - raised when nobody is signed in here any more
                    failure = error
            contexts = [context for _, context in self._registry.live_of([user_id])]
            number = len(contexts) if number is None else number
            self._record(actor_id, user_id, reason, number, None)
            self._hub.purge(user_id)
            for context in contexts:
                try:
                    context.close("revoked")
                except Exception:  # no more threads, say: the others must not stay signed in for that
                    logger.exception("%r is revoked, and its closing failed", context)
            self._hub.purge(user_id)  # and what was sent while they closed
        self._hooks.user_revoked(user_id, reason)
        if failure is not None:
            raise failure
        return number

    def clear_elsewhere(self, owner_id: str, key: Key) -> bool:
        """Have the context under a key closed on the other workers. True when there are any with contexts of the
        owner. Raises ClusterUnavailableError where they could not be told.
        """
        notices = self.notices
        if notices is None or is_anonymous_id(owner_id):
            return False
        notified = notices.leave_now(_cleared(owner_id, key))
        return notified is not None and notices.is_told_elsewhere(owner_id, notified)

    async def clear_elsewhere_soon(self, owner_id: str, key: Key) -> bool:
        """The same without holding up an event loop."""
        notices = self.notices
        if notices is None or is_anonymous_id(owner_id):
            return False
        notified: Notified = await asyncio.wrap_future(notices.leave(_cleared(owner_id, key)))
        return notices.is_told_elsewhere(owner_id, notified)

    def apply(self, notice: Notice, position: str, leases: Sequence[Held]) -> None:
        """Close what a notice is meant for, of what lives under these leases."""
        contexts = [context for lease in leases if (context := lease.context) is not None and context.is_open]
        if notice.kind == "cleared":
            found = None if notice.key is None else self._registry.lookup(notice.key)
            if found in contexts:
                self._close(contexts=[found], reason="cleared")
            return
        if leases:
            # Whose lease another one is just taking over has none, and gets it back where that one fails.
            live = [one for _, one in self._registry.live_of([notice.user_id])]
            contexts += [one for one in live if one._lifetime.lease is None and one.is_open]
        for context in contexts:
            self._hub.hush(context)  # first: it may be that its own loop must close it, which takes a while
        if contexts:
            self._record(notice.actor, notice.user_id, notice.reason, len(contexts), position)
        self._hub.purge_numbered(notice.user_id)
        self._close(contexts, "revoked")
        if contexts:
            self._hooks.user_revoked(notice.user_id, notice.reason)

    def _close(self, contexts: Iterable[UserExecutionContext], reason: CloseReason) -> None:
        for context in contexts:
            try:
                close_apart(context, reason)
            except Exception:
                logger.exception("%r is %s by another worker, and its closing failed", context, reason)

    def _record(self, actor_id: str | None, user_id: str, reason: str, contexts: int, notice: str | None) -> None:
        try:
            self._trail.user_revoked(actor_id, user_id, reason, contexts, notice)
        except Exception:  # nobody stays signed in because a disk is full
            logger.critical("that %d contexts of a user are revoked could not be recorded", contexts, exc_info=True)


def _cleared(owner_id: str, key: Key) -> Notice:
    return Notice("cleared", owner_id, key=key, at=time.time())
