"""CensusPolicy: what is done about that which outlives a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ucm_middleware.errors import ConfigurationError

CensusAction = Literal["off", "record", "warn", "cancel", "raise"]
"""What is done about what still holds a context; every action but "off" also puts it on record."""

ACTIONS: Final[tuple[str, ...]] = get_args(CensusAction)


@dataclass(frozen=True, slots=True)
class CensusPolicy:
    """What is done when something still holds a request's context after its teardown.

    ``action`` "record" puts it on record, "warn" gives a ResourceWarning too, "cancel" cancels the tasks and timers,
    "raise" raises ContextLeakError when the request is over, "off" does not look. None is "record" in production and
    "warn" elsewhere. ``allow`` names functions that may outlive their request, by module and qualified name:
    ``shop.mail.send``. With ``search`` False, what no task, timer and thread explains is not looked for in the heap:
    that stops the process for some milliseconds for each million objects.

    Raises ConfigurationError for another action, and for names that are no text.
    """

    action: CensusAction | None = None
    allow: Sequence[str] = ()
    search: bool = True

    def __post_init__(self) -> None:
        if self.action is not None and self.action not in ACTIONS:
            raise ConfigurationError(f"census: action must be one of {', '.join(ACTIONS)}, not {self.action!r}")
        allow: object = self.allow
        if not isinstance(allow, list | tuple | set | frozenset) or not all(type(name) is str for name in self.allow):
            raise ConfigurationError("census: allow must be a list of names, such as ['shop.mail.send']")
