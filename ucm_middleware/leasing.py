"""Where workers share their users: how a manager's contexts come to their leases, and give them back."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import logging

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.state import MemberState
from ucm_middleware.cluster.weak import weakly
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError, ContextLimitError
from ucm_middleware.lifetime import WEBSOCKET
from ucm_middleware.registry import Key, Registry
from ucm_middleware.teardown import close_apart

logger = logging.getLogger(__name__)


class Leasing:
    """Stands between a manager and its member of the cluster."""

    __slots__ = ("__weakref__", "_registry", "_trail", "member")

    def __init__(self, member: Member, registry: Registry, trail: AuditTrail) -> None:
        self.member = member
        self._registry = registry
        self._trail = trail
        member.close_expired = weakly(self._close_expired)
        member.on_state = weakly(self._is_now)

    async def take(self, user_id: str, *, is_connection: bool) -> Lease:
        """A lease for a context that is about to be opened. A refusal is on record.

        Raises ContextLimitError and ClusterUnavailableError.
        """
        try:
            return await self.member.acquire(user_id, is_connection=is_connection, limits=self._registry.limits)
        except (ContextLimitError, ClusterUnavailableError) as error:
            self._trail.refused(user_id, error, str(error))
            raise

    def take_now(self, context: UserExecutionContext, user_id: str) -> Lease:
        """The same from synchronous code, which waits. Whoever asks puts a refusal on record."""
        is_connection = context._lifetime.opened_by == WEBSOCKET
        return self.member.acquire_now(user_id, is_connection=is_connection, limits=self._registry.limits)

    def let_live(self, context: UserExecutionContext, lease: Lease) -> None:
        """The context lives under the lease from now on."""
        lease.context = context
        context._lifetime.lease = lease
        self.member.lives(lease)

    def give_back(self, context: UserExecutionContext, present: UserExecutionContext | None = None) -> None:
        """The context needs its lease no more; ``present``, where it took it over from that, goes on under it."""
        lease, context._lifetime.lease = context._lifetime.lease, None
        if not isinstance(lease, Lease):
            return
        if present is not None:
            self.let_live(present, lease)
            if present.is_open:
                return
            present._lifetime.lease = None  # it closed without one
        self.member.release(lease)

    def lease(self, context: UserExecutionContext, key: Key) -> UserExecutionContext | None:
        """Give a context that is about to come under a key its lease: that of its owner's context there, which it
        replaces and which is returned, or one of its own.

        Raises ContextLimitError and ClusterUnavailableError.
        """
        if context._anonymous:
            return None
        present = self._take_over(context, key)
        if present is None:
            self.let_live(context, self.take_now(context, context._user_id))
        return present

    def _take_over(self, context: UserExecutionContext, key: Key) -> UserExecutionContext | None:
        present = self._registry.lookup(key)
        if present is None or present is context or present._user_id != context._user_id:
            return None
        lease, present._lifetime.lease = present._lifetime.lease, None
        if not isinstance(lease, Lease) or lease.is_over:
            return None
        self.let_live(context, lease)
        return present

    def _close_expired(self, user_id: str) -> None:
        """Close the contexts of a user whose deadline has come. Their leases are free at once."""
        for _, context in self._registry.live_of([user_id]):
            if context.lifetime.is_expired:
                self.give_back(context)
                close_apart(context, "expired")

    def _is_now(self, state: MemberState, reason: str | None) -> None:
        try:
            self._trail.cluster_is(state, reason)
        except Exception:  # whatever a ledger raises: the leases must be kept
            logger.exception("that the cluster's store is %r could not be recorded", state)
