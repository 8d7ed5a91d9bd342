"""An event as it stands on the wire, what is refused, and that of what is refused nothing gets there."""

import json
import math
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.contexts import MakeManager, events, running_as
from support.events import connect
from ucm_middleware import (
    CrossUserAccessError,
    EventPolicy,
    InvalidContextError,
    InvalidEventError,
)
from ucm_middleware.events.envelope import FRAME, TO_ALL, Draft, Narrowing, Origin
from ucm_middleware.events.policy import LEAST_SIZE

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def draft(data: object = None, event: object = "message", policy: EventPolicy | None = None) -> Draft:
    return Draft(event, data, Origin("alice"), TO_ALL, policy or EventPolicy())


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@given(json_values, st.integers(1, 10**15))
def test_what_json_has_arrives_as_it_was(data: object, sequence: int) -> None:
    if any(0xD800 <= ord(character) < 0xE000 for character in json.dumps(data, ensure_ascii=False)):
        with pytest.raises(InvalidEventError, match=r"^data: has text that is no Unicode"):
            draft(data)
        return
    event = draft(data).numbered("0123456789abcdef", sequence, 5.0)
    assert json.loads(event.text)["data"] == data
    assert (event.sequence, event.at) == (sequence, 5.0)
    assert len(event.text.encode()) <= event.size < len(event.text.encode()) + FRAME


async def test_an_envelope_says_what_it_is_about(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    delivery = await manager.send_event("alice", "message", {"text": "grüß dich \U0001f600"}, thread_id=None)
    (envelope,) = client.envelopes
    assert datetime.fromisoformat(envelope.pop("timestamp")).tzinfo is not None
    assert envelope == {
        "type": "message",
        "user_id": "alice",
        "thread_id": None,
        "run_id": None,
        "request_id": None,
        "epoch": delivery.epoch,
        "sequence": 1,
        "data": {"text": "grüß dich \U0001f600"},
    }
    assert delivery.sequence == 1


async def test_an_event_names_the_request_that_it_comes_from_where_that_is_the_users_own(
    make_manager: MakeManager,
) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    with running_as(manager, "alice") as mine:
        await manager.send_event("alice", "message")
    with running_as(manager, "bob"), manager.privileged(reason="bob's agent greets her", users=["alice"]):
        await manager.send_event("alice", "message")
    first, second = client.envelopes
    names = ("thread_id", "run_id", "request_id")
    assert [first[name] for name in names] == [mine.thread_id, mine.run_id, mine.request_id]
    assert [second[name] for name in names] == [None, None, None]  # bob's are nothing of hers


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("data", "field", "rule"),
    [
        ({"a": [1, {"b": object()}]}, r"data['a'][1]['b']", "is a object, which JSON has not"),
        ({"a": {1, 2}}, "data['a']", "is a set, which JSON has not"),
        (b"bytes", "data", "is a bytes, which JSON has not"),
        ([0.0, math.nan], "data[1]", "is no finite number"),
        ({"x": (1, math.inf)}, "data['x'][1]", "is no finite number"),
        ([-math.inf], "data[0]", "is no finite number"),
        ({"a": {(1, 2): 3}}, "data['a']", "has a key that is a tuple, not text"),
        ({b"k": 3}, "data", "has a key that is a bytes, not text"),
        ([{math.nan: 1}], "data[0]", "has a key that is no finite number"),
        ([10**5000], "data[0]", "is a number of thousands of digits"),
        (nested(100_000), "data", "nests too deeply, or contains itself"),
        (CYCLE, "data", "nests too deeply, or contains itself"),
        ("\ud800", "data", "has text that is no Unicode: half of a surrogate pair"),
        ({"\udfff": 1}, "data", "has text that is no Unicode: half of a surrogate pair"),
    ],
)
def test_what_json_has_not_is_refused_by_path(data: object, field: str, rule: str) -> None:
    with pytest.raises(InvalidEventError) as refused:
        draft(data)
    assert (refused.value.field, refused.value.rule) == (field, rule)


def test_a_refusal_never_says_the_value() -> None:
    class Card:
        def __repr__(self) -> str:
            return "4111-1111"

    for data in ([Card()], {"pin": {"0000-secret"}}):
        with pytest.raises(InvalidEventError) as refused:
            draft(data)
        assert "4111" not in str(refused.value)
        assert "secret" not in str(refused.value)


def test_the_limit_counts_the_bytes_on_the_wire() -> None:
    policy = EventPolicy(max_size=LEAST_SIZE)
    room = LEAST_SIZE - draft("").numbered("0" * 16, 1, 0.0).size
    assert draft("x" * room, policy=policy).numbered("0" * 16, 10**15, 0.0).size == LEAST_SIZE
    with pytest.raises(InvalidEventError, match=f"^data: makes an event of {LEAST_SIZE + 1} bytes, and {LEAST_SIZE} "):
        draft("x" * (room + 1), policy=policy)
    with pytest.raises(InvalidEventError):
        draft("\U0001f600" * (room // 4 + 1), policy=policy)


@pytest.mark.parametrize("event", ["", "x" * 65, "a\x00b", "\ud800", 7, None, b"message", ["message"]])
def test_a_type_that_is_none_is_refused(event: object) -> None:
    with pytest.raises(InvalidEventError) as refused:
        draft(event=event)
    assert refused.value.field == "event"


def test_only_declared_types_may_be_sent() -> None:
    policy = EventPolicy(types=["message"])
    for event in ("message", "agent_started", "context_changed"):
        assert draft(event=event, policy=policy).type == event
    with pytest.raises(InvalidEventError, match=r"'other' is of no declared type; send one of .*message") as refused:
        draft(event="other", policy=policy)
    assert refused.value.field == "event"


@given(texts, texts, texts)
def test_no_text_breaks_out_of_its_field(user_id: str, request_id: str, data: str) -> None:
    origin = Origin(user_id, "thread", None, request_id)
    event = Draft("message", data, origin, Narrowing("thread"), EventPolicy()).numbered("0" * 16, 3, 0.0)
    envelope = json.loads(event.text)
    assert (envelope["user_id"], envelope["request_id"], envelope["data"]) == (user_id, request_id, data)
    assert len(envelope) == 9
    assert "\n" not in event.text


# What is refused is on no wire, and takes no number.


@pytest.mark.parametrize(
    ("user_id", "event", "data", "narrowed", "error"),
    [
        ("alice", "other", None, {}, InvalidEventError),
        ("alice", "message", {"a": object()}, {}, InvalidEventError),
        ("alice", "message", "x" * LEAST_SIZE, {}, InvalidEventError),
        ("nobody-yet", "message", None, {}, InvalidEventError),
        ("anonymous_" + "0" * 32, "message", None, {}, InvalidEventError),
        ("", "message", None, {}, InvalidContextError),
        (None, "message", None, {}, InvalidContextError),
        (["alice"], "message", None, {}, InvalidContextError),
        (7, "message", None, {}, InvalidContextError),
        ("alice", "message", None, {"thread_id": ""}, InvalidContextError),
        ("alice", "message", None, {"run_id": 5}, InvalidContextError),
        ("alice", "message", None, {"connection_id": "a\nb"}, InvalidContextError),
    ],
)
async def test_the_sender_is_told_and_nobody_else(
    make_manager: MakeManager, user_id: Any, event: str, data: object, narrowed: dict[str, Any], error: type[Exception]
) -> None:
    manager = make_manager(events=EventPolicy(types=["message"], max_size=LEAST_SIZE))
    _, client, _ = connect(manager, "alice")
    with pytest.raises(error):
        await manager.send_event(user_id, event, data, **narrowed)
    with pytest.raises(error):
        manager.post_event(user_id, event, data, **narrowed)
    assert client.frames == []
    assert events(manager, "alice", "event_sent") == []
    assert (await manager.send_event("alice", "message")).sequence == 1


# Who may send to whom.


async def test_alice_can_neither_send_to_bob_nor_learn_whether_he_exists(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, bob, _ = connect(manager, "bob")
    told = []
    with running_as(manager, "alice"):
        for stranger in ("bob", "nobody-yet"):
            with pytest.raises(CrossUserAccessError) as denied:
                await manager.send_event(stranger, "message", "hello")
            told.append(str(denied.value))
            with pytest.raises(CrossUserAccessError) as denied:
                manager.post_event(stranger, "message", "hello")
            told.append(str(denied.value))
            with pytest.raises(CrossUserAccessError) as denied:
                await manager.notify_context_change(stranger, {"role": "admin"})
            told.append(str(denied.value))
            with pytest.raises(CrossUserAccessError) as denied:
                manager.revoke(stranger, "spite")
        assert (await manager.send_event("alice", "message")).kept
    assert len(set(told)) == 1
    assert bob.frames == []
    assert len(events(manager, "alice", "denied")) == 8


async def test_a_text_that_claims_to_equal_every_user_reaches_nobody(make_manager: MakeManager) -> None:
    class Everybody(str):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return hash("bob")

    manager = make_manager()
    _, bob, _ = connect(manager, "bob")
    with running_as(manager, "alice"), pytest.raises(CrossUserAccessError):
        await manager.send_event(Everybody("bob"), "message", "from alice")
    assert bob.frames == []


async def test_code_outside_of_every_context_says_what_it_sends_for_once_the_manager_serves(
    make_manager: MakeManager,
) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    await manager.send_event("alice", "message", 1)
    manager.serve()
    with pytest.raises(CrossUserAccessError, match="privileged"):
        await manager.send_event("alice", "message", 2)
    with pytest.raises(CrossUserAccessError, match="privileged"):
        manager.post_event("alice", "message", 3)
    with manager.privileged(reason="a job tells her that it is done", users=["alice"]):
        await manager.send_event("alice", "message", 4)
        with pytest.raises(CrossUserAccessError):
            await manager.send_event("bob", "message", 5)
    assert client.data == [1, 4]


async def test_a_change_of_the_user_is_an_event_of_its_own_type(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(types=()))
    _, client, _ = connect(manager, "alice")
    await manager.notify_context_change("alice", {"role": "admin"})
    (envelope,) = client.envelopes
    assert (envelope["type"], envelope["data"]) == ("context_changed", {"role": "admin"})
