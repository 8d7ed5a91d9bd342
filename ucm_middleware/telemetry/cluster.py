"""What is measured of a worker in its cluster."""

from collections.abc import Callable, Iterable
from typing import get_args

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from ucm_middleware.cluster.state import Figures, MemberState

Standing = Callable[[], Figures | None]
"""How a worker stands; None when it is gone."""

Observing = Callable[[CallbackOptions], Iterable[Observation]]


def observe_cluster(meter: Meter, figures: Standing) -> None:
    """Make the instruments, which ask when they are read."""
    meter.create_observable_gauge(
        "ucm.cluster.state", [_states(figures)], "1", "1 for how the worker stands with the store, 0 for the others"
    )
    meter.create_observable_up_down_counter(
        "ucm.cluster.leases", [_observed(figures, lambda now: now.held)], "{lease}", "Leases that the worker holds"
    )
    meter.create_observable_counter(
        "ucm.cluster.lost", [_observed(figures, lambda now: now.lost)], "{lease}", "Leases that it lost"
    )
    meter.create_observable_counter(
        "ucm.cluster.refused",
        [_observed(figures, lambda now: now.refused)],
        "{refusal}",
        "Contexts refused while the store could not be asked",
    )
    meter.create_observable_counter(
        "ucm.cluster.renewals", [_observed(figures, lambda now: now.renewals)], "{renewal}", "Tenancies renewed"
    )
    meter.create_observable_gauge(
        "ucm.cluster.silence",
        [_observed(figures, lambda now: now.silent)],
        "s",
        "How long the store has not answered",
    )


def _observed(figures: Standing, number: Callable[[Figures], float | None]) -> Observing:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        now = figures()
        found = None if now is None else number(now)
        return [] if found is None else [Observation(found)]

    return observe


def _states(figures: Standing) -> Observing:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        now = figures()
        if now is None:
            return []
        return [Observation(int(state == now.state), {"ucm.state": state}) for state in get_args(MemberState)]

    return observe
