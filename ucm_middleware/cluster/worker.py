"""What the parts that talk through the store need of this process's membership."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ucm_middleware.cluster.policy import ClusterPolicy
from ucm_middleware.cluster.store import Place, Session, UserKey
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import ClusterUnavailableError


class Held(Protocol):
    """A lease of this worker. ``position`` is that of the newest notice that was applied to its context."""

    position: str
    is_restored: bool
    """Whether it was put back into a store that is new, or has failed over, and may have lost the notice there: then
    one of an older position may be newer than it.
    """

    @property
    def is_awaited(self) -> bool:
        """Whether nothing has come to live under it yet. Whoever lets something do so looks for notices then."""
        ...

    @property
    def context(self) -> UserExecutionContext | None:
        """Whose it is; None until it lives."""
        ...

    @property
    def events(self) -> Place | None:
        """The place in its user's events when the slot was taken; None when there was no event yet."""
        ...


class Worker(Protocol):
    """This process among those that share the store. It has one thread, and one loop there."""

    @property
    def id(self) -> str:
        """Tells this process from others, and from the one that it was forked from."""
        ...

    @property
    def policy(self) -> ClusterPolicy: ...

    @property
    def state(self) -> str:
        """ "starting", "up", "recovering", "full", "down" or "local"."""
        ...

    @property
    def session(self) -> Session:
        """The store, for the thread's loop, and only used there."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether the asking code runs on the thread."""
        ...

    async def looked(self) -> None:
        """Wait until the store was looked at for the first time, for a while at most: before that it is not known under
        which secret users stand there.
        """
        ...

    def call(self, run: Callable[..., object], *args: Any) -> bool:
        """Have this called soon on the thread's loop, outside of any context, in the order of the calls; from any
        thread, and never waiting. False when the thread is gone for good.
        """
        ...

    def doubt(self, error: ClusterUnavailableError) -> None:
        """The store was asked in vain: see soon whether it can be."""
        ...

    def key_of(self, user_id: str) -> UserKey:
        """Where a user stands in the store."""
        ...

    def leases_here(self, user: UserKey) -> Sequence[Held]:
        """What this worker holds for a user, in any thread."""
        ...

    def taken_here(self, user: UserKey) -> int:
        """How many leases of a user the store counts to this worker: also those that it was not told the end of yet."""
        ...

    def lease_of(self, context: UserExecutionContext) -> Held | None:
        """The lease that a context lives under; None when it was opened while the store could not be asked."""
        ...
