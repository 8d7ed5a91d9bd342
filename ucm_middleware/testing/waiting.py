"""Waiting for a condition: bounded, and failing with what was waited for."""

import time
from collections.abc import Callable

PATIENCE = 15.0
"""Seconds until a wait gives up: far above what any wait here needs, so that only a hang gets there."""

_TICK = 0.01


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = PATIENCE) -> None:
    """Return as soon as `condition()` is true; raise `TimeoutError` naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain until {what}")
        time.sleep(_TICK)
