"""The hub and whoever sweeps it each have a lock, and neither waits for the other's while it holds its own."""

import threading

from ucm_middleware.events.envelope import TO_ALL, Draft, Origin
from ucm_middleware.events.hub import Hub
from ucm_middleware.events.policy import EventPolicy
from ucm_middleware.testing import FakeClock
from ucm_middleware.testing.waiting import PATIENCE


def test_a_sweep_is_planned_without_the_hubs_lock() -> None:
    wakes: list[float | None] = []

    def plan(at: float) -> None:  # as the sweeper does, which asks under its own lock
        asking = threading.Thread(target=lambda: wakes.append(hub.next_wake()), daemon=True)
        asking.start()
        asking.join(PATIENCE)

    policy = EventPolicy(keep_seconds=60)
    clock = FakeClock()
    hub = Hub(policy, clock, plan)
    hub.send("alice", Draft("message", None, Origin("alice"), TO_ALL, policy))
    assert wakes == [clock() + 60]
