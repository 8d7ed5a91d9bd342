"""What events there may be, how many of them may wait, and what happens to a connection that does not keep up."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ucm_middleware.errors import ConfigurationError
from ucm_middleware.expiry import LONGEST_TTL

WhenFull = Literal["close", "drop_oldest", "wait"]

AGENT_EVENTS: Final = (
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "agent_completed",
    "agent_failed",
)
CONTEXT_CHANGED: Final = "context_changed"
"""What ``notify_context_change`` sends."""

EVENTS_MISSED: Final = "events_missed"
"""Sent by the hub itself, to a connection that names a last event from which nothing can be replayed."""

MAX_TYPE_LENGTH: Final = 64
"""Characters of an event's type."""

LEAST_SIZE: Final = 4096
"""Bytes that ``max_size`` allows at least: ids alone can take half of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPolicy:
    """``types`` are the events that may be sent, None for any; those of the package may be in any case.

    ``max_size`` is the most bytes of one event on the wire. ``queue_events`` and ``queue_bytes`` are what may wait for
    one connection. A connection whose queue is full is closed with 1013 ("close"), loses its oldest events
    ("drop_oldest"), or holds up whoever sends to it, for ``wait_seconds`` at most, before it is closed ("wait").

    Of each user, the ``keep_events`` newest events, ``keep_bytes`` at most, are kept for ``keep_seconds``; of all users
    together ``keep_total_bytes``. Keeping none is 0 events.

    Raises ConfigurationError for what breaks a rule.
    """

    types: Collection[str] | None = None
    max_size: int = 64 * 1024
    queue_events: int = 256
    queue_bytes: int = 1024 * 1024
    when_full: WhenFull = "close"
    wait_seconds: float = 5.0
    keep_events: int = 512  # twice a queue: whoever is closed at a full one can come back for all that was lost
    keep_bytes: int = 256 * 1024
    keep_seconds: float = 300.0
    keep_total_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        _require_types(self.types)
        if self.types is not None:
            for declared in self.types:
                check_type(declared)
            object.__setattr__(self, "types", frozenset((*self.types, *AGENT_EVENTS, CONTEXT_CHANGED, EVENTS_MISSED)))
        _require_whole("max_size", self.max_size, LEAST_SIZE)
        for name in ("queue_events", "queue_bytes"):
            _require_whole(name, getattr(self, name), 1)
        for name in ("keep_events", "keep_bytes", "keep_total_bytes"):
            _require_whole(name, getattr(self, name), 0)
        for name in ("wait_seconds", "keep_seconds"):
            _require_seconds(name, getattr(self, name))
        if self.when_full not in get_args(WhenFull):
            raise ConfigurationError(f"when_full must be 'close', 'drop_oldest' or 'wait', not {self.when_full!r}")
        if self.queue_bytes < self.max_size:
            raise ConfigurationError(
                f"queue_bytes ({self.queue_bytes}) is less than max_size ({self.max_size}): an event that may be sent "
                "must have room in an empty queue"
            )


def check_type(name: object) -> None:
    """Raise ConfigurationError unless this can be the type of an event."""
    if not is_type(name):
        raise ConfigurationError(f"{name!r} cannot be the type of an event: {TYPE_RULE}")


TYPE_RULE: Final = f"text that is printable, not empty, and not longer than {MAX_TYPE_LENGTH} characters"


def is_type(name: object) -> bool:
    """Whether this can be the type of an event."""
    return isinstance(name, str) and 0 < len(name) <= MAX_TYPE_LENGTH and name.isprintable()


def _require_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _require_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_TTL:
        raise ConfigurationError(f"{name} must be a number of seconds greater than 0, not {value!r}")


def _require_types(types: object) -> None:
    if types is not None and (isinstance(types, str) or not isinstance(types, Collection)):
        raise ConfigurationError(f"types must be a collection of event types, not {type(types).__name__}; give a list")
