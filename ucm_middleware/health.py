"""How an application is, for whoever watches over it."""

from dataclasses import dataclass

from ucm_middleware.cluster.state import MemberState


@dataclass(frozen=True, slots=True)
class Health:
    """``is_healthy`` is whether new contexts are opened, and their records can be kept: what a readiness probe asks.

    ``is_draining``: the manager opens no more. ``ledger`` is what is wrong with the audit ledger, None for nothing.
    ``cluster`` is how this worker stands with the store that workers share, None without one; ``cluster_silent`` for
    how many seconds that has not answered, None when it never did. With "local" a worker is healthy, and counts by
    itself.
    """

    is_healthy: bool
    is_draining: bool
    ledger: str | None
    cluster: MemberState | None
    cluster_silent: float | None
