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

    __slots__ = ("_burst", "_clock", "_left", "_max_size", "_rate", "_refusal", "_seen")

    def __init__(self, limits: MessageLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._max_size = limits.max_size
        self._rate = limits.rate
        self._seen = clock()
        self._left = self._burst = 0.0 if limits.rate is None else _burst(limits.rate)
        self._refusal: tuple[str, float] | None = None  # not the error, which would hold the frames it was raised in

    def count(self, data: str | bytes) -> None:
        """One message came. Raises MessageLimitError when it is too much, and from then on for each."""
        # On the way of each message: what nearly all of them pass is asked first.
        if self._refusal is not None:
            raise MessageLimitError(*self._refusal)
        if len(data) * 4 > self._max_size and self._is_too_long(data):
            raise self._refused("size", self._max_size)
        rate = self._rate
        if rate is not None:
            now = self._clock()
            left = self._left + (now - self._seen) * rate
            self._seen = now
            if left > self._burst:
                left = self._burst
            if left < 1.0:
                self._left = left
                raise self._refused("rate", rate)
            self._left = left - 1.0

    def _is_too_long(self, data: str | bytes) -> bool:
        """In bytes, of which a character of text takes four at most."""
        most = self._max_size
        if isinstance(data, bytes) or len(data) > most:
            return len(data) > most
        return len(data.encode(errors="surrogatepass")) > most

    def _refused(self, scope: str, limit: float) -> MessageLimitError:
        self._refusal = scope, limit
        return MessageLimitError(scope, limit)


def _burst(rate: float) -> float:
    """How many messages at once a client that was silent may send."""
    return max(1.0, rate * BURST_SECONDS)


def _check_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"max_message_size must be a number of bytes of at least 1, not {size!r}")


def _check_rate(rate: object) -> None:
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e9:
        raise ConfigurationError(f"message_rate must be None or a number of messages a second, not {rate!r}")
