"""What events there may be, and how many may wait: each rule of EventPolicy."""

import math
from typing import Any

import pytest

from ucm_middleware import ConfigurationError, EventPolicy
from ucm_middleware.events.policy import AGENT_EVENTS, CONTEXT_CHANGED, EVENTS_MISSED, LEAST_SIZE, MAX_TYPE_LENGTH
from ucm_middleware.expiry import LONGEST_TTL

WHOLE = {
    "max_size": LEAST_SIZE,
    "queue_events": 1,
    "queue_bytes": 1,
    "keep_events": 0,
    "keep_bytes": 0,
    "keep_total_bytes": 0,
}
"""The least of each."""


@pytest.mark.parametrize("name", WHOLE)
def test_numbers_are_whole_and_not_too_small(name: str) -> None:
    for value in (WHOLE[name] - 1, -1, 1e6, math.nan, "5000", True, None):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(ConfigurationError, match=rf"^{name} must be a whole number of at least {WHOLE[name]}, not"):
            EventPolicy(**wrong)


def test_the_least_of_each_is_allowed() -> None:
    policy = EventPolicy(**{**WHOLE, "queue_bytes": LEAST_SIZE})  # type: ignore[arg-type]
    assert policy.keep_events == 0


@pytest.mark.parametrize("name", ["wait_seconds", "keep_seconds"])
def test_spans_are_seconds(name: str) -> None:
    for value in (0, -1.0, math.nan, math.inf, LONGEST_TTL * 2, "1", True, None):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(ConfigurationError, match=rf"^{name} must be a number of seconds greater than 0, not"):
            EventPolicy(**wrong)
    right: dict[str, Any] = {name: 0.5}
    assert getattr(EventPolicy(**right), name) == 0.5


def test_there_are_three_things_to_do_when_a_queue_is_full() -> None:
    for when_full in ("close", "drop_oldest", "wait"):
        assert EventPolicy(when_full=when_full).when_full == when_full
    wrong: Any = "drop_newest"
    with pytest.raises(ConfigurationError, match=r"when_full must be .* not 'drop_newest'"):
        EventPolicy(when_full=wrong)


def test_an_empty_queue_has_room_for_every_event_that_may_be_sent() -> None:
    with pytest.raises(ConfigurationError, match=r"queue_bytes \(5000\) is less than max_size \(5001\)"):
        EventPolicy(max_size=5001, queue_bytes=5000)
    assert EventPolicy(max_size=5000, queue_bytes=5000).max_size == 5000


@pytest.mark.parametrize("name", ["", "x" * (MAX_TYPE_LENGTH + 1), "a\nb", "\u202e", 7, None, b"message"])
def test_a_type_is_short_text_that_can_be_read(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be the type of an event: text that is printable"):
        EventPolicy(types=[name])


@pytest.mark.parametrize("types", ["message", 5])
def test_types_are_a_collection_and_no_single_text(types: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"types must be a collection of event types, not (str|int); give a list"
    ):
        EventPolicy(types=types)


def test_the_events_of_the_package_are_declared_in_any_case() -> None:
    assert EventPolicy(types=["x" * MAX_TYPE_LENGTH]).types == {
        "x" * MAX_TYPE_LENGTH,
        *AGENT_EVENTS,
        CONTEXT_CHANGED,
        EVENTS_MISSED,
    }
    assert EventPolicy(types=()).types == {*AGENT_EVENTS, CONTEXT_CHANGED, EVENTS_MISSED}
    assert EventPolicy().types is None


def test_a_declaration_does_not_change_with_the_list_it_was_made_of() -> None:
    types = ["message"]
    policy = EventPolicy(types=types)
    types.append("other")
    assert policy.types is not None
    assert "other" not in policy.types
