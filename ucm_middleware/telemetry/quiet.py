"""What keeps a fault of an SDK, an exporter or a processor away from the request that is traced."""

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Quiet:
    """Calls what may fail. The first failure is logged, and no other."""

    __slots__ = ("_has_failed",)

    def __init__(self) -> None:
        self._has_failed = False

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The function's answer, None when it raises."""
        try:
            return function(*args, **kwargs)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                logger.exception("OpenTelemetry failed: records go to the ledger without it. This is said once")
            return None
