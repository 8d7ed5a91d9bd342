"""How much a client may send on one connection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ucm_middleware.errors import ConfigurationError, MessageLimitError

MAX_MESSAGE_SIZE: Final = 1024 * 1024
"""Bytes of one message, when nothing else is said."""

MESSAGE_RATE: Final = 200.0
"""Messages a second, likewise."""

BURST_SECONDS: Final = 5.0
"""For how long a client that was silent may have saved up messages."""


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """The most bytes of one message, and how many messages a second in the long run; None for any number.

    Raises ConfigurationError for what breaks a rule.
    """

    max_size: int = MAX_MESSAGE_SIZE
    rate: float | None = MESSAGE_RATE

    def __post_init__(self) -> None:
        _check_size(self.max_size)
        _check_rate(self.rate)


class Meter:
    """Counts what one connection sends. ``clock`` is in seconds."""

    __slots__ = ("_broken", "_clock", "_left", "_limits", "_seen")

    def __init__(self, limits: MessageLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._seen = clock()
        self._left = _most(limits)
        self._broken: str | None = None

    def count(self, data: str | bytes) -> None:
        """One message came. Raises MessageLimitError when it is too much, and from then on for each."""
        limits = self._limits
        if self._broken is None and _is_longer(data, limits.max_size):
            self._broken = "size"
        if self._broken is None and limits.rate is not None and not self._has_turn(limits.rate):
            self._broken = "rate"
        if self._broken is not None:
            raise MessageLimitError(self._broken, limits.max_size if self._broken == "size" else limits.rate or 0.0)

    def _has_turn(self, rate: float) -> bool:
        now = self._clock()
        self._left = min(_most(self._limits), self._left + (now - self._seen) * rate)
        self._seen = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _most(limits: MessageLimits) -> float:
    return 0.0 if limits.rate is None else max(1.0, limits.rate * BURST_SECONDS)


def _is_longer(data: str | bytes, most: int) -> bool:
    """Whether it is more bytes than that. Of text, a character is 4 bytes at most."""
    if isinstance(data, bytes) or len(data) > most:
        return len(data) > most
    return len(data) * 4 > most and len(data.encode(errors="surrogatepass")) > most


def _check_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"max_message_size must be a number of bytes of at least 1, not {size!r}")


def _check_rate(rate: object) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e9:
        raise ConfigurationError(f"message_rate must be None or a number of messages a second, not {rate!r}")
