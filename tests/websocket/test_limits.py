"""What one connection may send: sizes in bytes, rates in the long run."""

import pytest

from ucm_middleware import ConfigurationError, MessageLimitError
from ucm_middleware.testing import FakeClock
from ucm_middleware.websocket.limits import BURST_SECONDS, MessageLimits, Meter


@pytest.mark.parametrize("data", ["x" * 10, b"y" * 10, "ä" * 5, "𝄞" * 2, "", "\ud800" * 3])
def test_up_to_the_limit_it_passes(data: str | bytes) -> None:
    Meter(MessageLimits(10), FakeClock()).count(data)


@pytest.mark.parametrize("data", ["x" * 11, b"y" * 11, "ä" * 6, "𝄞" * 3, "\ud800" * 4])
def test_beyond_it_does_not(data: str | bytes) -> None:
    with pytest.raises(MessageLimitError) as caught:
        Meter(MessageLimits(10), FakeClock()).count(data)
    assert (caught.value.scope, caught.value.limit) == ("size", 10)


def test_a_connection_that_sent_too_much_stays_refused() -> None:
    meter = Meter(MessageLimits(10), FakeClock())
    for data in ("x" * 11, "x"):
        with pytest.raises(MessageLimitError, match="size"):
            meter.count(data)


def test_who_was_silent_may_send_five_seconds_worth_and_then_at_the_rate() -> None:
    clock = FakeClock()
    meter = Meter(MessageLimits(10, rate=2.0), clock)
    clock.advance(1000)
    for _ in range(int(2 * BURST_SECONDS)):
        meter.count("x")
    for _ in range(100):
        clock.advance(0.5)
        meter.count("x")
    clock.advance(0.4)
    with pytest.raises(MessageLimitError) as caught:
        meter.count("x")
    assert (caught.value.scope, caught.value.limit) == ("rate", 2.0)


def test_a_slow_rate_lets_one_message_pass() -> None:
    meter = Meter(MessageLimits(10, rate=0.01), FakeClock())
    meter.count("x")
    with pytest.raises(MessageLimitError, match="rate"):
        meter.count("x")


def test_without_a_rate_any_number_may_come() -> None:
    meter = Meter(MessageLimits(10, rate=None), FakeClock())
    for _ in range(10_000):
        meter.count("x")


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1"])
def test_a_size_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="max_message_size"):
        MessageLimits(size)


@pytest.mark.parametrize("rate", [0, -1.0, True, float("nan"), float("inf"), "1"])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="message_rate"):
        MessageLimits(10, rate)
