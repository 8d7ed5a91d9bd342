"""How much a look at the isolation of all contexts may take, and how often one is taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from ucm_middleware.errors import ConfigurationError

MAX_SECONDS: Final = 10.0
"""Seconds that ``isolation_report`` may take, when no others are given."""

MAX_OBJECTS: Final = 20_000_000
"""Objects that it may look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationPolicy:
    """``sample`` is the share of contexts, from 0 to 1, whose data are compared with those of all other live ones when
    they close, before they are wiped. That takes ``max_seconds`` and ``max_objects`` at most, in the task that closes
    the context; where there are very many others, it is some of them each time. What is found is recorded and logged.

    Objects of ``shared_types``, and of their subclasses, are shared by design and not looked into. Of a framework with
    an adapter, the adapter knows them; without it name them here, such as its engine and its pool, or each of these is
    a finding. The walk knows by itself where a server and an ASGI application begin, and the standard library.

    Raises ConfigurationError for what breaks a rule.
    """

    sample: float = 0.0
    max_seconds: float = 0.02
    max_objects: int = 100_000
    shared_types: Sequence[type] = ()

    def __post_init__(self) -> None:
        if not _is_number(self.sample) or not 0 <= self.sample <= 1:
            raise ConfigurationError(f"sample must be a number from 0 to 1, not {self.sample!r}")
        checked_budget(self.max_seconds, self.max_objects)
        types = cast("object", self.shared_types)
        if not isinstance(types, (list, tuple)) or not all(
            isinstance(one, type) for one in cast("Sequence[object]", types)
        ):
            raise ConfigurationError("shared_types must be a list or a tuple of classes")


def checked_budget(max_seconds: float | None, max_objects: int | None) -> tuple[float, float]:
    """Both as numbers, None as infinity. Raises ConfigurationError for what is no number above 0."""
    limits: tuple[tuple[str, object], ...] = (("max_seconds", max_seconds), ("max_objects", max_objects))
    for name, given in limits:
        if given is not None and not (_is_number(given) and cast("float", given) > 0):
            raise ConfigurationError(f"{name} must be a number above 0, or None for no limit, not {given!r}")
    return (math.inf if max_seconds is None else max_seconds, math.inf if max_objects is None else max_objects)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
