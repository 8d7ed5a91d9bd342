"""What is told of the runs of one manager: to the user's connections, and to the audit trail."""

import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from ucm_middleware.agents.stragglers import Stragglers
from ucm_middleware.audit.records import Data, Outcome
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.errors import InvalidEventError
from ucm_middleware.events.envelope import TO_ALL, Draft
from ucm_middleware.events.hub import Hub, Posted, lost_by
from ucm_middleware.events.policy import LEAST_SIZE
from ucm_middleware.telemetry import Telemetry

if TYPE_CHECKING:
    from ucm_middleware.agents.run import AgentRun
    from ucm_middleware.context import UserExecutionContext

logger = logging.getLogger(__name__)

Phase = Literal[
    "agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed", "agent_failed"
]

NOTHING: Final[Mapping[str, object]] = MappingProxyType({})


class AgentRuns:
    """The way from a run to its user's connections, to the trail and to the spans."""

    __slots__ = ("_hub", "_telemetry", "_trail", "stragglers")

    def __init__(self, hub: Hub, trail: AuditTrail, telemetry: Telemetry) -> None:
        self._hub = hub
        self._trail = trail
        self._telemetry = telemetry
        self.stragglers = Stragglers()

    def tell(
        self,
        run: "AgentRun",
        phase: Phase,
        shown: Mapping[str, object],
        about: Data = (),
        outcome: Outcome = "ok",
        reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Send an event of a run to its user's connections, and put it on record.

        ``shown`` is for the user, and ``about`` for the record. Raises InvalidEventError for what is no event, and what
        the ledger raises.
        """
        sent = self._send(run, phase, {"agent": run.agent_name, **shown})
        data: Data = ("phase", phase), ("agent", run.agent_name), *about, *sent.placed
        try:
            self._trail.agent_run(run.context, outcome, reason, seconds, data)
        finally:
            _close_slow(sent)

    def tell_end(
        self,
        run: "AgentRun",
        phase: Phase,
        shown: Mapping[str, object],
        about: Data,
        begun: float,
        reason: str | None,
    ) -> None:
        """The same of what has ended, and began at ``begun`` of the monotonic clock; ``reason`` is why not well. Never
        raises: what has happened has happened, and its error is not to be hidden by another.
        """
        seconds = time.monotonic() - begun
        outcome: Outcome = "ok" if reason is None else "failed"
        why = NOTHING if reason is None else {"reason": reason}
        try:
            self.tell(run, phase, {**shown, "seconds": round(seconds, 6), **why}, about, outcome, reason, seconds)
        except Exception:
            logger.exception("that %s of agent %s could not be recorded", phase, run.agent_name)

    def emit(self, run: "AgentRun", event: str, data: object) -> None:
        """Send an event of the application's. Raises as ``tell`` does."""
        sent = self._send(run, event, data)
        about = ("type", event), *sent.placed
        try:
            self._trail.event_sent(run.context, run.context.user_id, about, lost_by(sent) if sent.dropped else None)
        finally:
            _close_slow(sent)

    def fitting(self, text: str) -> str:
        """As much of a model's text as an event has room for: none is a reason to end a run."""
        # The ids may take half of the least event, and a character six bytes.
        most = (self._hub.policy.max_size - LEAST_SIZE // 2) // 6
        return text[:most] if text.isascii() else text[:most].encode(errors="replace").decode()

    def begin(self, context: "UserExecutionContext", agent_name: str) -> None:
        """A context is from now on that of a run: its span is named for the agent."""
        if (spans := self._telemetry.spans) is not None:
            spans.name_agent(context, agent_name)

    def enter_tool(self, run: "AgentRun", number: int) -> Callable[[], None] | None:
        """Make the span of a tool's call the current one here. Returns what undoes it."""
        spans = self._telemetry.spans
        return None if spans is None else spans.enter_tool(run.context, number)

    def _send(self, run: "AgentRun", event: str, data: object) -> Posted:
        hub = self._hub
        user_id = run.context.user_id
        try:
            draft = Draft(event, data, run.origin, TO_ALL, hub.policy)
        except InvalidEventError as error:
            rule = f"{error.rule} (in an event of agent {run.agent_name!r})"
            raise InvalidEventError(error.field, rule, error.remedy) from None
        self._trail.require_room()
        relay = None if hub.relay is None else hub.relay_of(user_id)
        return hub.send(user_id, draft) if relay is None else relay.post(user_id, draft)


def _close_slow(sent: Posted) -> None:
    for context in sent.full:
        context.close("slow")
