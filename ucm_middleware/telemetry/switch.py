"""Whether there is anybody to trace for. OpenTelemetry is imported only where the application has imported it."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import WeakMethod

from ucm_middleware.audit.records import Row
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.cluster.state import Figures
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.secret import SecretRing
from ucm_middleware.types import Receive, Scope, Send

if TYPE_CHECKING:
    from ucm_middleware.telemetry.metrics import Metrics
    from ucm_middleware.telemetry.spans import Spans

T = TypeVar("T")

_SET_BY_NAME: Final = ("OTEL_PYTHON_TRACER_PROVIDER", "OTEL_PYTHON_METER_PROVIDER")
"""The variables by which an SDK is set without an import: the API loads it when it is asked."""


class Telemetry:
    """OpenTelemetry for one manager. ``spans`` and ``metrics`` are None until a provider of each is found.

    ``live`` answers how many contexts there are, ``lag`` how many records are not durable yet, ``late`` how many
    threads and tasks outlive their run, ``figures`` how the worker stands in its cluster: methods of the manager, which
    they do not keep alive.
    """

    __slots__ = ("_figures", "_lag", "_late", "_live", "_secrets", "_trail", "_wanted", "metrics", "spans")

    spans: "Spans | None"
    metrics: "Metrics | None"

    def __init__(
        self,
        trail: AuditTrail,
        secrets: SecretRing,
        live: Callable[[], int],
        lag: Callable[[], int],
        late: Callable[[], int],
        figures: Callable[[], Figures | None],
        *,
        wanted: bool,
    ) -> None:
        self._trail = trail
        self._secrets = secrets
        self._live = _weakly(live)
        self._lag = _weakly(lag)
        self._late = _weakly(late)
        self._figures = _weakly(figures)
        self._wanted = wanted
        self.spans = None
        self.metrics = None
        if wanted:
            trail.carry_with(self._carry_first)

    def look(self) -> None:
        """See whether a provider is set by now. Called where applications set one, and never on a request's path."""
        if not self._wanted or not ("opentelemetry" in sys.modules or any(name in os.environ for name in _SET_BY_NAME)):
            return
        from ucm_middleware.telemetry.metrics import find_metrics
        from ucm_middleware.telemetry.spans import find_spans

        if self.metrics is None:
            self.metrics = find_metrics(self._live, self._lag, self._late, self._figures)
        if self.spans is None:
            self.spans = find_spans(self._secrets)
        if self.spans is not None and self.metrics is not None:
            self.spans.not_exported = self.metrics.not_exported
        if self.spans is not None or self.metrics is not None:
            self._trail.carry_with(self._carry)

    def around(self, context: UserExecutionContext, scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Make the span of a request or connection the current one, here. Returns what the app is to receive and send
        with, so that each message of a WebSocket has its span.
        """
        spans = self.spans
        if spans is None:
            return receive, send
        spans.enter(context)
        if scope["type"] != "websocket" or (traced := spans.connect(context)) is None:
            return receive, send
        from ucm_middleware.telemetry.messages import Conversation

        conversation = Conversation(spans, context, traced, receive, send)
        return conversation.receive, conversation.send

    def _carry_first(self, row: Row) -> Row:
        """The manager's first record: the last time to look."""
        self._trail.carry_with(None)
        self.look()
        return self._carry(row)

    def _carry(self, row: Row) -> Row:
        """Count a record, and put it on a span, before it goes to the ledger. Returns it with the ids of the span."""
        metrics, spans = self.metrics, self.spans
        if metrics is not None:
            metrics.count(row)
            if spans is None:
                metrics.not_exported(row[0])
        return row if spans is None else spans.carry(row)


def _weakly(method: Callable[[], T]) -> Callable[[], T | None]:
    """The same for an SDK, which never forgets what it was given; None when the object has gone."""
    reference = WeakMethod(method)

    def answer() -> T | None:
        found = reference()
        return None if found is None else found()

    return answer
