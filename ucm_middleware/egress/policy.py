"""What the egress guard looks for, and what it does with what it finds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.settings import checked_limit

LEAST_ENTROPY = 32.0
"""Bits. Of less, whoever guesses finds one, and texts have it by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressPolicy:
    """``fields`` are names of JSON members: a token-shaped value under one of them, in what is sent to a named user or
    in ``agent_context`` when a context is opened, is that user's from then on, if it is nobody's yet. Without
    ``block``, what is found is only recorded. ``min_entropy`` is how many bits a value must have, as estimated. Of more
    than ``max_values`` protected values the oldest is forgotten, and each is after ``keep_seconds``.

    Raises ConfigurationError for what breaks a rule.
    """

    fields: Sequence[str] = ()
    block: bool = False
    min_entropy: float = 64.0
    max_values: int = 1_000_000
    keep_seconds: float = 3600.0

    def __post_init__(self) -> None:
        fields = cast("Sequence[object]", self.fields)
        if isinstance(fields, str) or not all(isinstance(name, str) and name for name in fields):
            raise ConfigurationError("fields must be a list of names of JSON members, such as ['access_token']")
        if not _is_number(self.min_entropy) or not LEAST_ENTROPY <= self.min_entropy <= 1024:
            raise ConfigurationError(f"min_entropy must be {LEAST_ENTROPY:g} to 1024 bits, not {self.min_entropy!r}")
        checked_limit("max_values", self.max_values, 1)
        if not _is_number(self.keep_seconds) or not 0 < self.keep_seconds <= 366 * 86400:
            raise ConfigurationError(
                f"keep_seconds must be a number above 0 and at most a year, not {self.keep_seconds!r}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
