"""What is counted and measured of contexts, for whoever has set a meter provider. docs/how-to/tracing.md lists it."""

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import cast

from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter_provider

from ucm_middleware.audit.records import Row
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.ids import Core
from ucm_middleware.telemetry.api import SCOPE, is_of_the_api
from ucm_middleware.telemetry.cluster import Standing, observe_cluster
from ucm_middleware.telemetry.quiet import Quiet

Number = Callable[[], int | None]


class Metrics:
    """The instruments, and what must be remembered of contexts to fill them."""

    __slots__ = (
        "__weakref__",
        "_closing",
        "_expired",
        "_open",
        "_opened",
        "_quiet",
        "_refused",
        "_teardown",
        "_unexported",
    )

    _open: set[Core]
    _closing: dict[Core, float]

    def __init__(self, meter: Meter, live: Number, lag: Number, late: Number, figures: Standing) -> None:
        self._quiet = Quiet()
        self._opened = meter.create_counter("ucm.context.opened", "{context}", "Contexts opened")
        self._refused = meter.create_counter("ucm.context.refused", "{refusal}", "Contexts refused, by reason")
        self._expired = meter.create_counter("ucm.context.expired", "{context}", "Contexts that reached their deadline")
        self._teardown = meter.create_histogram(
            "ucm.context.teardown.duration", "s", "How long contexts took to release what they held"
        )
        self._unexported = meter.create_counter(
            "ucm.record.unexported", "{record}", "Audit records without an exported span"
        )
        meter.create_observable_up_down_counter(
            "ucm.context.live", [_observed(live)], "{context}", "Contexts that are live"
        )
        meter.create_observable_gauge(
            "ucm.ledger.lag", [_observed(lag)], "{record}", "Audit records that are not durable yet"
        )
        meter.create_observable_up_down_counter(
            "ucm.agent.stragglers", [_observed(late)], "{straggler}", "Threads and tasks that outlive their run"
        )
        if figures() is not None:
            observe_cluster(meter, figures)
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the contexts are the parent's."""
        self._open = set()
        self._closing = {}

    def count(self, row: Row) -> None:
        """Count what a record says."""
        event, core = row[0], row[4]
        if event == "opened" and core is not None and core not in self._open:
            self._open.add(core)
            self._quiet.call(self._opened.add, 1)
        elif event == "refused":
            number = dict(row[11]).get("count", 1)  # of a flood, one record says how many more there were
            self._quiet.call(self._refused.add, cast("int", number), {"ucm.reason": str(row[9])})
        elif event == "closed" and core is not None:
            if row[9] == "expired" and core in self._open:
                self._quiet.call(self._expired.add, 1)
            self._open.discard(core)
            begun = self._closing.pop(core, None)
            if begun is not None:
                self._quiet.call(self._teardown.record, perf_counter() - begun, {"ucm.outcome": row[8]})

    def closing(self, core: Core) -> None:
        """The teardown of a context that holds something begins."""
        self._closing[core] = perf_counter()

    def not_exported(self, event: str) -> None:
        """A record is in the ledger and on no span, or on one that goes nowhere."""
        self._quiet.call(self._unexported.add, 1, {"ucm.event": event})


def find_metrics(live: Number, lag: Number, late: Number, figures: Standing) -> Metrics | None:
    """The metrics of one manager; None while no meter provider is set, or the SDK is disabled."""
    provider = get_meter_provider()
    if is_of_the_api(provider):
        return None
    meter = provider.get_meter(SCOPE)
    return None if is_of_the_api(meter) else Metrics(meter, live, lag, late, figures)


def _observed(number: Number) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(number() or 0)]
