"""What is told of one context beyond its beginning and its end, and counted for the record of its end."""

# A record takes the ids that a context was given.
# pyright: reportPrivateUsage=false

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ucm_middleware.lifetime import Lifetime

if TYPE_CHECKING:
    from ucm_middleware.audit.trail import AuditTrail
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.ids import Core

logger = logging.getLogger(__name__)


class Journal:
    """Made for a context that has something to tell; most never have one.

    It has the context's ids and not the context, so that it is no cycle, and serves what is released late. A ledger
    that fails is logged: the resources must be released all the same.
    """

    __slots__ = (
        "_children",
        "_denials",
        "_resources",
        "_trail",
        "core",
        "request_id",
        "run_id",
        "thread_id",
        "user_id",
    )

    core: "Core"
    request_id: "str | Core"

    def __init__(self, trail: "AuditTrail", context: "UserExecutionContext") -> None:
        self._trail = trail
        self.user_id = context._user_id
        self.core = context._core
        self.request_id = context._request_id
        self.thread_id = context._thread_id
        self.run_id = context._run_id
        self._resources = self._children = self._denials = 0

    def bound(self, user_id: str) -> None:
        """The context learned its user."""
        self.user_id = user_id

    def entered(self, name: str) -> None:
        """A resource was entered."""
        with Lifetime.transition:
            self._resources += 1
        self._tell(self._trail.resource_entered, name)

    def exited(self, name: str, handed_over: bool) -> None:
        """It was released, or went over to the context that took this one's place."""
        self._tell(self._trail.resource_exited, name, handed_over)

    def failed(self, name: str, reason: str, error: str) -> None:
        """It was not released, or not as it should: why, and the name of the error's type."""
        self._tell(self._trail.resource_failed, name, reason, error)

    def child_opened(self) -> None:
        """A child was opened."""
        with Lifetime.transition:
            self._children += 1

    def denied(self) -> None:
        """The context's code was denied something."""
        with Lifetime.transition:
            self._denials += 1

    def statistics(self) -> tuple[tuple[str, int], ...]:
        """What there was any of, by name."""
        counts = ("resources", self._resources), ("children", self._children), ("denials", self._denials)
        return tuple((name, count) for name, count in counts if count)

    def _tell(self, write: Callable[..., None], *what: object) -> None:
        try:
            write(self, *what)
        except Exception:
            logger.exception("a record of a resource could not be written")
