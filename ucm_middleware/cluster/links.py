"""What ties a member of the cluster to the manager of its process: events and notices, both ways."""

# pyright: reportPrivateUsage=false
# The lease of a context is read where it is.

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.errands import Errands
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.notices import Apply, Notices
from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.relay import Relay
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Session, UserKey
from ucm_middleware.cluster.weak import weakly, weakly_soon
from ucm_middleware.cluster.worker import Held
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.hub import Hub
from ucm_middleware.secret import SecretRing
from ucm_middleware.teardown import close_apart


class MemberWorker:
    """A member as the relay and the notices see it."""

    __slots__ = ("_member",)

    def __init__(self, member: Member) -> None:
        self._member = member

    @property
    def id(self) -> str:
        return self._member.book.worker

    @property
    def policy(self) -> ClusterPolicy:
        return self._member.policy

    @property
    def state(self) -> str:
        """While a store recovers, it grants no leases; for events and notices it is up."""
        return "up" if self._member.is_reachable else self._member.state

    @property
    def session(self) -> Session:
        return self._member.session

    @property
    def is_here(self) -> bool:
        return self._member.thread.is_here

    async def looked(self) -> None:
        await self._member.first_look()

    def call(self, run: Callable[..., object], *args: Any) -> bool:
        return self._member.thread.soon(run, *args)

    def doubt(self, error: ClusterUnavailableError) -> None:
        self._member.doubt(error)

    def key_of(self, user_id: str) -> UserKey:
        return self._member.key_of(user_id)

    def leases_here(self, user: UserKey) -> Sequence[Held]:
        return self._member.leases_at(user)

    def taken_here(self, user: UserKey) -> int:
        return len(self._member.leases_at(user)) + len(self._member.book.unreleased_of(user))

    def lease_of(self, context: UserExecutionContext) -> Held | None:
        lease = context._lifetime.lease
        return lease if isinstance(lease, Lease) and lease not in self._member.book.unplaced else None


class Links:
    """The relay and the notices of one worker, tied to its member. It must be kept: the member only knows it weakly,
    since the cluster's thread must not keep a manager alive.

    ``apply`` closes what a notice is meant for; of a method, its object is not kept alive either.
    """

    __slots__ = ("__weakref__", "notices", "relay")

    def __init__(self, member: Member, hub: Hub, secrets: SecretRing, trail: AuditTrail, apply: Apply) -> None:
        worker = MemberWorker(member)
        errands = Errands(worker)
        seals = Seals(secrets.all, member.policy.application, lambda: member.users.seal, trail.cluster_unopened)
        self.notices = Notices(worker, errands, seals, weakly(apply))
        self.relay = Relay(hub, worker, errands, seals, trail, _close_in_thread, self.notices.catch_up)
        hub.relay = self.relay
        member.on_event = weakly(self.relay.heard)
        member.on_deaf = weakly(self.relay.was_deaf)
        member.on_noticed = weakly_soon(self.notices.catch_up)
        member.on_reconnected = weakly_soon(self._reconnected)

    async def _reconnected(self, is_new: bool) -> None:
        self.relay.store_is_back()
        if is_new:
            self.notices.store_is_new()
        else:
            self.notices.store_is_back()


def _close_in_thread(context: UserExecutionContext) -> None:
    """Close a context that is too slow, for the cluster's thread: that has leases to keep, and waits for no plugin."""
    threading.Thread(
        target=close_apart, args=(context, "slow"), name="ucm-middleware slow connection", daemon=True
    ).start()
