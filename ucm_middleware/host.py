"""What a context needs of the manager that it lives under."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.ids import UnifiedIDManager
from ucm_middleware.keys import OwnerKeys
from ucm_middleware.lifetime import Journal
from ucm_middleware.strays import Strays

if TYPE_CHECKING:
    from ucm_middleware.agents.runs import AgentRuns
    from ucm_middleware.census.census import Census
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.dispatch import Hooks
    from ucm_middleware.egress.guard import EgressGuard
    from ucm_middleware.telemetry import Telemetry


class ClosingInspector(Protocol):
    """Looks at what contexts that close share with others."""

    def context_closes(self, context: "UserExecutionContext") -> None:
        """The data of a context are about to be wiped. Never raises."""
        ...


class ContextHost(Protocol):
    """Told of each step in a context's life, and asked where a context cannot decide by itself."""

    agents: "AgentRuns"
    closing_inspector: ClosingInspector | None
    census: "Census | None"
    ids: UnifiedIDManager
    keys: OwnerKeys
    hooks: "Hooks"
    owned_types: tuple[type, ...]
    strays: Strays
    telemetry: "Telemetry"

    @property
    def egress(self) -> "EgressGuard | None":
        """What looks for protected values in what is sent; None where there is no such guard."""
        ...

    def subkeys(self, purpose: str) -> tuple[bytes, ...]:
        """32 bytes for an adapter's own keyed hashes under each secret, the current one's first."""
        ...

    @property
    def guard(self) -> object:
        """Who decides for that manager."""
        ...

    def journal_of(self, context: "UserExecutionContext") -> Journal:
        """Where it is written down what happens to the context's resources: the one that it has, or a new one."""
        ...

    def report(
        self,
        context: "UserExecutionContext",
        event: str,
        outcome: str,
        reason: str | None,
        seconds: float | None,
        data: Mapping[str, object],
    ) -> None:
        """Put on record what an adapter reports. Raises InvalidContextError for what breaks a rule."""
        ...

    def bind_refused(self, context: "UserExecutionContext", user_id: str) -> None:
        """A context was given a user that it cannot have."""
        ...

    def child_opened(self, child: "UserExecutionContext", operation_name: str) -> None:
        """A child was opened for a part of the work."""
        ...

    def context_closing(self, context: "UserExecutionContext") -> None:
        """The context is no longer live; its resources are about to be released."""
        ...

    def context_ended(self, context: "UserExecutionContext", metadata: Mapping[str, object] | None) -> None:
        """Both at once, for a context that had nothing to release."""
        ...

    def context_closed(self, context: "UserExecutionContext", metadata: Mapping[str, object] | None) -> None:
        """The teardown is through. ``metadata`` is what the application had added by then, None for nothing."""
        ...

    def bind_context(self, context: "UserExecutionContext", user_id: str) -> None:
        """An anonymous context learned its user."""
        ...

    def end_within(self, context: "UserExecutionContext", seconds: float) -> None:
        """The credentials behind a context hold no longer than that."""
        ...

    def renew_credentials(self, context: "UserExecutionContext", seconds: float | None) -> None:
        """Others have taken their place, which hold for so long; None for no end."""
        ...

    def require_owner(self, user_id: str, action: str) -> None:
        """Raise CrossUserAccessError when the code that asks may not touch this user's contexts."""
        ...

    def new_environment(self) -> IsolatedEnvironment:
        """A new overlay on the application's configuration."""
        ...
