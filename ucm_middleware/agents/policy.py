"""How many runs of agents a user may have at once, for how long, and how far a stream may run ahead of its reader."""

from dataclasses import dataclass

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.expiry import LONGEST_TTL
from ucm_middleware.settings import checked_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPolicy:
    """``max_runs_per_user`` counts the runs that are under way, and not those that agents start inside of a run.
    ``timeout`` is a run's time in seconds, where neither the agent nor the call names one. ``queue_items`` is how many
    items of a stream may wait for its reader.

    Raises ConfigurationError for what breaks a rule.
    """

    max_runs_per_user: int = 5
    timeout: float = 300.0
    queue_items: int = 64

    def __post_init__(self) -> None:
        checked_limit("max_runs_per_user", self.max_runs_per_user, 1)
        checked_limit("queue_items", self.queue_items, 1)
        checked_timeout(self.timeout)


def checked_timeout(timeout: object) -> float:
    """Seconds as a float. Raises ConfigurationError for what is no number above 0, and for more than a year."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= LONGEST_TTL:
        raise ConfigurationError(
            f"timeout must be a number of seconds above 0 and at most {LONGEST_TTL:g}, not {timeout!r}"
        )
    return float(timeout)
