"""What is kept of a user's events, for how long, and what a connection gets that comes back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.clock import Clock
from support.contexts import MakeManager
from support.events import Client, Envelope, accept, connect, open_connection, settled
from ucm_middleware import ContextNotFoundError, EventPolicy, UserContextManager
from ucm_middleware.events.channel import LastEvent
from ucm_middleware.events.envelope import TO_ALL, Draft, Narrowing, Origin
from ucm_middleware.events.hub import SLICE, Hub
from ucm_middleware.websocket.asgi import last_event


def numbers(client: Client) -> list[int]:
    return [envelope["sequence"] for envelope in client.envelopes]


async def come_back(manager: UserContextManager, after: tuple[str | None, int | None] | None) -> Client:
    _, client, _ = connect(manager, "alice", after)
    await settled()
    return client


def assert_missed(client: Client, epoch: str, sequence: int, named: tuple[str | None, int | None]) -> Envelope:
    """That is all it was told, and the number with which it goes on."""
    (envelope,) = client.envelopes
    assert (envelope["type"], envelope["epoch"], envelope["sequence"]) == ("events_missed", epoch, sequence)
    assert envelope["data"] == {"epoch": named[0], "sequence": named[1]}
    return envelope


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(make_manager: MakeManager, clock: Clock) -> UserContextManager:
    """Of which alice was a user, and keeps four events for a minute."""
    manager = make_manager(clock=clock, events=EventPolicy(keep_events=4, keep_seconds=60))
    clock.attach(manager)
    manager.create_isolated_context("alice").close("closed")
    return manager


async def test_events_for_a_user_without_a_connection_are_kept(manager: UserContextManager) -> None:
    deliveries = [await manager.send_event("alice", "message", number) for number in range(3)]
    assert [(each.delivered, each.queued, each.kept) for each in deliveries] == [(0, 0, True)] * 3
    client = await come_back(manager, (None, 0))
    assert client.data == [0, 1, 2]


async def test_without_naming_an_event_there_is_only_what_is_new(manager: UserContextManager) -> None:
    await manager.send_event("alice", "message", "old")
    client = await come_back(manager, None)
    await manager.send_event("alice", "message", "new")
    assert client.data == ["new"]


async def test_what_came_after_the_last_event_comes_first_and_then_the_live_ones(manager: UserContextManager) -> None:
    deliveries = [await manager.send_event("alice", "message", number) for number in range(4)]
    for last in deliveries[:3]:
        again = await come_back(manager, (last.epoch, last.sequence))
        assert numbers(again) == list(range(last.sequence + 1, 5))
    client = await come_back(manager, (deliveries[3].epoch, 4))
    await manager.send_event("alice", "message", 4)
    assert client.data == [4]


async def test_a_replayed_event_is_the_same_to_the_byte(manager: UserContextManager) -> None:
    _, live, _ = connect(manager, "alice")
    await manager.send_event("alice", "message", {"text": "hello"})
    assert (await come_back(manager, (None, 0))).frames == live.frames


async def test_an_event_keeps_its_narrowing(manager: UserContextManager) -> None:
    context, first, _ = connect(manager, "alice")
    sent = await manager.send_event("alice", "message", "thread", thread_id=context.thread_id)
    await manager.send_event("alice", "message", "connection", connection_id=context.websocket_client_id)
    await manager.send_event("alice", "message", "all")
    assert first.data == ["thread", "connection", "all"]
    again = await come_back(manager, (sent.epoch, 0))
    assert again.data == ["all"]


async def test_the_newest_are_kept(manager: UserContextManager) -> None:
    deliveries = [await manager.send_event("alice", "message", number) for number in range(6)]
    epoch = deliveries[0].epoch
    assert numbers(await come_back(manager, (epoch, 2))) == [3, 4, 5, 6]
    assert_missed(await come_back(manager, (epoch, 1)), epoch, 6, (epoch, 1))
    assert numbers(await come_back(manager, (None, 0))) == [3, 4, 5, 6]  # the first time: whatever there is


@pytest.mark.parametrize("named", [(None, None), (None, 1), ("0" * 16, 1), ("0" * 16, 0), (None, -1)])
async def test_an_unknown_last_event_is_said_so_and_then_come_the_live_ones(
    manager: UserContextManager, named: tuple[str | None, int | None]
) -> None:
    epoch = (await manager.send_event("alice", "message", 0)).epoch
    client = await come_back(manager, named)
    assert_missed(client, epoch, 1, named)
    await manager.send_event("alice", "message", 1)
    assert numbers(client) == [1, 2]


async def test_a_last_event_that_was_never_sent_is_unknown(manager: UserContextManager) -> None:
    epoch = (await manager.send_event("alice", "message", 0)).epoch
    assert_missed(await come_back(manager, (epoch, 2)), epoch, 1, (epoch, 2))


async def test_whoever_had_all_is_told_nothing(manager: UserContextManager) -> None:
    last = await manager.send_event("alice", "message", 0)
    assert (await come_back(manager, (last.epoch, last.sequence))).frames == []


async def test_an_event_that_is_not_kept_leaves_a_gap_that_is_said(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(max_size=4096, keep_bytes=1000))
    context, _, _ = connect(manager, "alice")
    small = await manager.send_event("alice", "message", "small")
    big = await manager.send_event("alice", "message", "x" * 2000)
    assert (small.kept, big.kept) == (True, False)
    await manager.send_event("alice", "message", "small again")
    assert_missed(await come_back(manager, (small.epoch, 1)), small.epoch, 3, (small.epoch, 1))
    assert numbers(await come_back(manager, (small.epoch, 2))) == [3]
    assert context.is_open


async def test_they_are_kept_for_so_long(manager: UserContextManager, clock: Clock) -> None:
    first = await manager.send_event("alice", "message", 0)
    clock.advance(59.9)
    await manager.send_event("alice", "message", 1)
    assert numbers(await come_back(manager, (first.epoch, 0))) == [1, 2]
    clock.advance(0.1)
    assert numbers(await come_back(manager, (first.epoch, 1))) == [2]
    assert_missed(await come_back(manager, (first.epoch, 0)), first.epoch, 2, (first.epoch, 0))
    clock.advance(59.9)
    # While she has connections, her numbers go on.
    assert_missed(await come_back(manager, (first.epoch, 1)), first.epoch, 2, (first.epoch, 1))
    assert (await come_back(manager, (first.epoch, 2))).frames == []


async def test_what_is_too_old_but_not_swept_is_not_replayed_and_its_room_is_free(make_manager: MakeManager) -> None:
    clock = Clock()
    manager = make_manager(
        clock=clock, events=EventPolicy(max_size=4096, keep_bytes=4096, keep_total_bytes=4096, keep_seconds=60)
    )
    for user in ("alice", "bob"):
        connect(manager, user)
    old = await manager.send_event("alice", "message", "x" * 1000)
    clock.advance(60)
    assert_missed(await come_back(manager, (old.epoch, 0)), old.epoch, 1, (old.epoch, 0))
    assert manager._hub._kept_size == 0
    for _ in range(20):
        assert (await manager.send_event("bob", "message", "x" * 1000)).kept
    manager._hub.sweep()


async def test_older_ones_go_with_the_next(manager: UserContextManager, clock: Clock) -> None:
    first = await manager.send_event("alice", "message", 0)
    clock.advance(40)
    await manager.send_event("alice", "message", 1)
    clock.advance(20)
    await manager.send_event("alice", "message", 2)
    assert numbers(await come_back(manager, (first.epoch, 1))) == [2, 3]
    assert [envelope["type"] for envelope in (await come_back(manager, (first.epoch, 0))).envelopes] == [
        "events_missed"
    ]


async def test_when_nobody_and_nothing_is_left_a_new_epoch_begins(manager: UserContextManager, clock: Clock) -> None:
    first = await manager.send_event("alice", "message", 0)
    clock.advance(60)
    second = await manager.send_event("alice", "message", 1)
    assert (second.sequence, second.epoch != first.epoch) == (1, True)
    assert_missed(await come_back(manager, (first.epoch, 1)), second.epoch, 1, (first.epoch, 1))


async def test_a_replay_has_room_in_a_full_queue(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=2, keep_events=10))
    manager.create_isolated_context("alice").close("closed")
    for number in range(8):
        await manager.send_event("alice", "message", number)
    context, client, _ = connect(manager, "alice", (None, 0))
    # Before its task had a turn: what was replayed is nothing that it failed to keep up with.
    assert manager.post_event("alice", "message", 8).dropped == ()
    await settled()
    assert (client.data, context.is_open) == ([*range(9)], True)


async def test_a_stranger_who_names_an_event_gets_it_once_bound(manager: UserContextManager) -> None:
    last = await manager.send_event("alice", "message", 0)
    await manager.send_event("alice", "message", 1)
    context, client, _ = connect(manager, None, (last.epoch, last.sequence))
    await settled()
    assert client.frames == []
    context.bind("alice")
    await manager.send_event("alice", "message", 2)
    await settled()
    assert client.data == [1, 2]


async def test_bob_cannot_have_hers_by_naming_her_epoch(manager: UserContextManager) -> None:
    last = await manager.send_event("alice", "message", "hers")
    _, bob, _ = connect(manager, "bob", (last.epoch, 0))
    await settled()
    assert [envelope["type"] for envelope in bob.envelopes] == ["events_missed"]


# What a client may name.


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (b"", None),
        (b"epoch=abc", None),
        (b"epoch=abc&last_sequence=5", LastEvent("abc", 5)),
        (b"last_sequence=0", LastEvent(None, 0)),
        (b"a=b&last_sequence=12&c", LastEvent(None, 12)),
        (b"last_sequence=", LastEvent(None, None)),
        (b"last_sequence=-1&epoch=abc", LastEvent("abc", None)),
        (b"last_sequence=1e3", LastEvent(None, None)),
        (b"last_sequence=" + b"9" * 19, LastEvent(None, None)),
        (b"last_sequence=" + b"9" * 18, LastEvent(None, 10**18 - 1)),
        ("last_sequence=\u0663".encode(), LastEvent(None, None)),
        (b"last_sequence=%D9%A3", LastEvent(None, None)),
        (b"last_sequence=1&last_sequence=2", LastEvent(None, None)),
        (b"last_sequence=1&epoch=a&epoch=b", LastEvent(None, 1)),
        (b"last_sequence=1&epoch=" + b"a" * 19, LastEvent(None, 1)),
        (b"last_sequence=1&epoch=%3Cscript%3E", LastEvent(None, 1)),
        (b"last_sequence=1&" + b"a=1&" * 200, LastEvent(None, None)),
        (b"last_sequence=\xff\xfe", LastEvent(None, None)),
    ],
)
def test_what_a_client_says_it_had(query: bytes, found: LastEvent | None) -> None:
    assert last_event(query) == found


@given(st.binary(max_size=100))
def test_no_query_is_too_odd(query: bytes) -> None:
    last_event(query)
    last_event(b"last_sequence=" + query)


# The bounds of what is kept, in bytes.

sends = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 900)), max_size=60)


@given(sends, st.integers(0, 1500), st.integers(0, 3000), st.integers(0, 5))
def test_no_more_bytes_are_kept_than_may(
    sent: list[tuple[str, int]], keep_bytes: int, keep_total_bytes: int, keep_events: int
) -> None:
    policy = EventPolicy(
        max_size=4096, keep_bytes=keep_bytes, keep_total_bytes=keep_total_bytes, keep_events=keep_events
    )
    hub = Hub(policy, lambda: 0.0, lambda _: None)
    for user, size in sent:
        is_kept = hub.send(user, Draft("message", "x" * size, Origin(user), TO_ALL, policy)).kept
        sizes = {name: [event.size for event in channel.kept] for name, channel in hub._channels.items()}
        channel_now = hub._channels.get(user)  # nobody has a connection
        is_there = channel_now is not None and channel_now.kept[-1].sequence == channel_now.sequence
        assert is_kept == is_there
        assert all(sum(each) <= keep_bytes and len(each) <= keep_events for each in sizes.values())
        assert sum(map(sum, sizes.values())) == hub._kept_size <= keep_total_bytes
        assert all(sum(sizes[name]) == channel.kept_size for name, channel in hub._channels.items())
        for channel in hub._channels.values():  # the newest of those that were kept at all
            kept = [event.sequence for event in channel.kept]
            assert kept == sorted(kept)
        assert hub._keeping.keys() == hub._channels.keys()
    for user in "abc":
        hub.purge(user)
    assert (hub._channels, hub._keeping, hub._kept_size) == ({}, {}, 0)


class CountedLock:
    """Counts how many times it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


def test_the_events_of_many_users_are_forgotten_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders get the lock in between."""
    now, policy = 0.0, EventPolicy(keep_seconds=60)
    hub = Hub(policy, lambda: now, lambda _: None)
    for number in range(2 * SLICE + 1):
        hub.send(f"user-{number}", Draft("message", None, Origin(f"user-{number}"), TO_ALL, policy))
    now = 30.0
    hub.send("late", Draft("message", None, Origin("late"), TO_ALL, policy))
    lock = CountedLock()
    monkeypatch.setattr(hub, "_lock", lock)
    now = 61.0
    hub.sweep()
    assert (list(hub._channels), hub.next_wake(), lock.taken) == (["late"], 90.0, 3)
    now = 91.0
    hub.sweep()
    assert (hub._channels, hub.next_wake(), hub._kept_size) == ({}, None, 0)


async def test_of_all_users_those_lose_first_who_were_quiet_longest(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(max_size=4096, keep_bytes=4096, keep_total_bytes=4096))
    for user in ("alice", "bob", "carol"):
        connect(manager, user)
    deliveries = {user: await manager.send_event(user, "message", "x" * 1000) for user in ("alice", "bob", "carol")}
    await manager.send_event("alice", "message", "x" * 1000)
    for user, expected in (("alice", [1, 2]), ("bob", ["events_missed"]), ("carol", [1])):
        _, client, _ = connect(manager, user, (deliveries[user].epoch, 0))
        await settled()
        got = [e["type"] if e["type"] == "events_missed" else e["sequence"] for e in client.envelopes]
        assert got == expected


def test_an_event_says_its_epoch() -> None:
    event = Draft("message", None, Origin("alice"), Narrowing(), EventPolicy()).numbered("feed" * 4, 7, 0.0)
    assert json.loads(event.text)["epoch"] == "feed" * 4


async def test_what_it_follows_before_it_is_accepted_is_replayed_to_it(manager: UserContextManager) -> None:
    await manager.send_event("alice", "message", "of report", thread_id="report")
    await manager.send_event("alice", "message", "of another", thread_id="another")
    context, client = open_connection(manager, "alice")
    manager.follow(context, "report")
    accept(manager, context, client, (None, 0))
    await manager.send_event("alice", "message", "live", run_id="report")
    await settled()
    assert client.data == ["of report", "live"]


async def test_following_ends_with_a_connection_that_is_never_accepted(manager: UserContextManager) -> None:
    context, _ = open_connection(manager, "alice")
    manager.follow(context, "report")
    context.close("disconnected")
    assert manager._hub._ahead == {}
    with pytest.raises(ContextNotFoundError):
        manager.follow(context, "report")
    assert manager._hub._ahead == {}


async def test_whoever_was_closed_at_a_full_queue_loses_nothing_by_it(make_manager: MakeManager) -> None:
    """With the settings that there are when nothing is said."""
    manager = make_manager()
    context, slow, _ = connect(manager, "alice")
    first = await manager.send_event("alice", "message", 0)
    slow.stall()
    number = 0
    while context.is_open:
        number += 1
        await manager.send_event("alice", "message", number)
    client = await come_back(manager, (first.epoch, first.sequence))
    assert client.data == list(range(1, number + 1))
