"""From an event for a user to each of that user's connections, and to nobody else's."""

import asyncio
from unittest.mock import patch

import pytest

from support.clock import Clock
from support.contexts import MakeManager, events
from support.events import connect, settled
from support.waiting import wait_until
from ucm_middleware import ContextNotFoundError, EventPolicy, InvalidContextError, managed_user_context
from ucm_middleware.events.channel import MAX_FOLLOWED
from ucm_middleware.sweeper import Sweeper


async def test_an_event_reaches_each_connection_of_its_user_and_no_other(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, first, _ = connect(manager, "alice")
    _, second, _ = connect(manager, "alice")
    _, bob, _ = connect(manager, "bob")
    _, nobody, _ = connect(manager, None)
    for number in range(3):
        delivery = await manager.send_event("alice", "message", number)
        assert (delivery.delivered, delivery.queued, delivery.dropped, delivery.kept) == (2, 0, (), True)
    assert first.data == second.data == [0, 1, 2]
    assert first.frames == second.frames
    assert [envelope["sequence"] for envelope in first.envelopes] == [1, 2, 3]
    assert bob.frames == nobody.frames == []


async def test_it_is_serialised_once_for_all(make_manager: MakeManager) -> None:
    manager = make_manager()
    clients = [connect(manager, "alice")[1] for _ in range(8)]
    await manager.send_event("alice", "message", {"text": "hello"})
    assert {id(client.frames[0]) for client in clients} == {id(clients[0].frames[0])}


async def test_a_post_is_in_line_when_it_returns(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    delivery = manager.post_event("alice", "message", 1)
    # Where tasks can begin at once, its server has it by now.
    assert (delivery.delivered, delivery.queued) == (len(client.data), 1 - len(client.data))
    await settled()
    assert client.data == [1]


async def test_it_can_be_narrowed(make_manager: MakeManager) -> None:
    manager = make_manager()
    first_context, first, _ = connect(manager, "alice")
    second_context, second, _ = connect(manager, "alice")
    assert first_context.websocket_client_id is not None
    await manager.send_event("alice", "message", "thread", thread_id=first_context.thread_id)
    await manager.send_event("alice", "message", "run", run_id=second_context.run_id)
    await manager.send_event("alice", "message", "connection", connection_id=first_context.websocket_client_id)
    delivery = await manager.send_event(
        "alice", "message", "of both", thread_id=first_context.thread_id, run_id=second_context.run_id
    )
    assert (delivery.delivered, delivery.queued) == (0, 0)
    await manager.send_event("alice", "message", "all")
    assert first.data == ["thread", "connection", "all"]
    assert second.data == ["run", "all"]


async def test_a_connection_may_follow_threads_and_runs_of_its_user(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, _ = connect(manager, "alice")
    _, other, _ = connect(manager, "alice")
    manager.follow(context, "thread-1", "run-1")
    await manager.send_event("alice", "message", 1, thread_id="thread-1")
    await manager.send_event("alice", "message", 2, run_id="run-1")
    await manager.send_event("alice", "message", 3, thread_id="thread-2")
    await manager.send_event("alice", "message", 4, thread_id="thread-1", run_id="run-2")
    assert client.data == [1, 2]
    assert other.data == []


async def test_a_child_follows_for_its_connection(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, _ = connect(manager, "alice")
    manager.follow(context.create_child_context("message"), "thread-1")
    await manager.send_event("alice", "message", 1, thread_id="thread-1")
    assert client.data == [1]


async def test_following_has_limits(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, _, _ = connect(manager, "alice")
    manager.follow(context, *(f"thread-{number}" for number in range(MAX_FOLLOWED)))
    manager.follow(context, "thread-0")
    with pytest.raises(InvalidContextError, match="are 101, and a connection follows 100 at most"):
        manager.follow(context, "thread-x")
    with pytest.raises(InvalidContextError):
        manager.follow(context, "")
    context.close("closed")
    with pytest.raises(ContextNotFoundError, match="is of no live connection"):
        manager.follow(context, "thread-0")
    with pytest.raises(ContextNotFoundError):
        manager.follow(manager.create_isolated_context("alice"), "thread-0")


async def test_a_closed_connection_gets_nothing_more(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, outbox = connect(manager, "alice")
    client.stall()
    await manager.send_event("alice", "message", 1)
    manager.post_event("alice", "message", 2)
    context.close("closed")
    client.read_on()
    await settled()
    delivery = await manager.send_event("alice", "message", 3)
    assert (client.frames, delivery.delivered, delivery.queued, delivery.kept) == ([], 0, 0, True)
    assert outbox.is_over


async def test_what_is_lost_with_a_connection_is_said(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    client.error = OSError("gone")
    first = await manager.send_event("alice", "message", 1)
    second = await manager.send_event("alice", "message", 2)
    assert [[each.why for each in delivery.dropped] for delivery in (first, second)] == [["gone"], ["gone"]]


async def test_each_event_is_on_record_without_what_it_says(make_manager: MakeManager) -> None:
    manager = make_manager()
    connect(manager, "alice")
    await manager.send_event("alice", "message", {"text": "top secret"})
    (record,) = events(manager, "alice", "event_sent")
    assert (record["type"], record["sequence"], record["connections"]) == ("message", 1, 1)
    assert "top secret" not in str(manager.get_audit_trail("alice"))


# Late identity.


async def test_a_connection_moves_to_its_user(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, _ = connect(manager, None)
    stranger = context.user_id
    await manager.send_event(stranger, "message", "to a stranger")
    context.bind("alice")
    await manager.send_event("alice", "message", "to alice")
    assert client.data == ["to a stranger", "to alice"]
    delivery = await manager.send_event(stranger, "message", "to nobody")
    assert (delivery.delivered, delivery.queued) == (0, 0)
    assert client.data == ["to a stranger", "to alice"]


async def test_what_a_stranger_had_does_not_count_as_the_users(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, _ = connect(manager, None)
    for _ in range(3):
        await manager.send_event(context.user_id, "message", "to a stranger")
    context.bind("alice")
    client.stall()
    delivery = await manager.send_event("alice", "message", "to alice")
    assert (delivery.delivered, delivery.queued) == (0, 1)


async def test_a_connection_whose_binding_could_not_be_recorded_leaves_nothing_behind(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager()
    context, _, outbox = connect(manager, None)
    trail = type(manager._trail)
    with monkeypatch.context() as broken:
        broken.setattr(trail, "bound", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            context.bind("alice")
    context.close("failed")
    assert outbox.is_over
    assert manager._hub._channels == {}


async def test_one_whose_binding_fails_half_way_leaves_nothing_behind_either(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had to make room could not be closed, for want of threads, say."""
    manager = make_manager()
    context, client, _ = connect(manager, None)
    with monkeypatch.context() as broken:
        broken.setattr(type(manager), "_close_displaced", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            context.bind("alice")
    assert (await manager.send_event("alice", "message", 1)).delivered == 1
    assert client.data == [1]
    context.close("failed")
    assert [name for name, channel in manager._hub._channels.items() if channel.connections] == []
    assert list(manager._hub._channels) == ["alice"]  # by what is kept


# Revocation.


async def test_a_revocation_ends_the_connections_and_forgets_what_was_kept(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, _, outbox = connect(manager, "alice")
    _, bob, _ = connect(manager, "bob")
    last = await manager.send_event("alice", "message", "kept")
    assert manager.revoke("alice", "her laptop was stolen") == 1
    assert (context.lifetime.reason, outbox.is_over) == ("revoked", True)
    assert "alice" not in manager._hub._channels
    _, again, _ = connect(manager, "alice", (last.epoch, 0))
    await settled()
    assert [envelope["type"] for envelope in again.envelopes] == ["events_missed"]
    _, fresh, _ = connect(manager, "alice", (None, 0))
    await settled()
    assert fresh.frames == []
    assert (await manager.send_event("bob", "message", 1)).delivered == 1
    assert bob.data == [1]
    by_context, by_us = sorted(events(manager, "alice", "revoked"), key=lambda record: "reason" in record)
    assert by_context["request_id"] == context.request_id
    assert (by_us["reason"], by_us["contexts"]) == ("her laptop was stolen", 1)


async def test_a_connection_that_came_while_the_events_were_forgotten_counts_anew(make_manager: MakeManager) -> None:
    manager = make_manager()
    _, client, _ = connect(manager, "alice")
    for number in range(3):
        await manager.send_event("alice", "message", number)
    manager._hub.purge("alice")
    client.stall()
    delivery = await manager.send_event("alice", "message", 3)
    assert (delivery.delivered, delivery.queued) == (0, 1)
    client.read_on()
    await settled()
    assert client.data == [0, 1, 2, 3]


async def test_one_that_cannot_be_closed_keeps_no_other_open(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no such disk")

    manager = make_manager()
    first, last = connect(manager, "alice")[0], connect(manager, "alice")[0]
    monkeypatch.setattr(type(manager._trail), "user_revoked", refuse)
    with patch.object(first, "close", side_effect=RuntimeError("can't start new thread")):
        assert manager.revoke("alice", "stolen") == 2
    assert (last.lifetime.reason, first.is_open) == ("revoked", True)
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [
        ("CRITICAL", "that 2 contexts of a user are revoked could not be recorded"),
        ("ERROR", f"{first!r} is revoked, and its closing failed"),
    ]
    first.close()


async def test_what_is_sent_while_they_close_is_forgotten_too(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, _, _ = connect(manager, "alice")
    context.callback(manager.post_event, "alice", "message", "of the session that was stolen")
    manager.revoke("alice", "stolen")
    _, again, _ = connect(manager, "alice", (None, 0))
    await settled()
    assert again.frames == []


async def test_a_reason_is_wanted(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, _, _ = connect(manager, "alice")
    with pytest.raises(InvalidContextError, match="reason: is empty"):
        manager.revoke("alice", "  ")
    assert context.is_open


# Nothing stays behind.


async def test_of_those_who_have_gone_nothing_is_left(make_manager: MakeManager) -> None:
    clock = Clock()
    manager = make_manager(clock=clock, events=EventPolicy(keep_seconds=60))
    clock.attach(manager)
    hub = manager._hub
    contexts = [connect(manager, f"user-{number}")[0] for number in range(20)]
    strangers = [connect(manager, None)[0] for _ in range(20)]
    for context in contexts:
        await manager.send_event(context.user_id, "message", "x" * 100)
    await settled()
    for context in (*contexts, *strangers):
        context.close("closed")
    assert len(hub._channels) == len(hub._keeping) == 20
    clock.advance(59.9)
    assert len(hub._channels) == 20
    clock.advance(0.1)
    assert (hub._channels, hub._keeping, hub._kept_size, hub.next_wake()) == ({}, {}, 0, None)


async def test_of_an_anonymous_user_nothing_is_kept_that_takes_the_place_of_others(make_manager: MakeManager) -> None:
    manager = make_manager()
    context, client, _ = connect(manager, None)
    async with managed_user_context(context):
        assert not (await manager.send_event(context.user_id, "message", 1)).kept
    assert (manager._hub._channels, manager._hub._kept_size, client.data) == ({}, 0, [1])


async def test_without_keeping_nothing_is_left_at_once(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(keep_events=0))
    context, client, _ = connect(manager, "alice")
    assert not (await manager.send_event("alice", "message", 1)).kept
    context.close("closed")
    assert manager._hub._channels == {}
    assert client.data == [1]


async def test_a_forked_child_begins_anew(make_manager: MakeManager) -> None:
    manager = make_manager()
    connect(manager, "alice")
    await manager.send_event("alice", "message", 1)
    hub = manager._hub
    parents = (hub._channels, hub._keeping, hub._kept_size, hub._lock)
    try:
        hub.after_fork()
        assert (hub._channels, hub._keeping, hub._kept_size, hub.next_wake()) == ({}, {}, 0, None)
        assert hub.lock is not parents[3]
    finally:
        hub._channels, hub._keeping, hub._kept_size, hub._lock = parents


# Threads.


@pytest.mark.usefixtures("threads_switch_often")
async def test_many_threads_and_tasks_send_in_one_order(make_manager: MakeManager) -> None:
    manager = make_manager(
        events=EventPolicy(queue_events=10_000), max_contexts_per_user=50, max_connections_per_user=50
    )
    clients = [connect(manager, "alice")[1] for _ in range(3)]

    def post(sender: int) -> list[int]:
        return [manager.post_event("alice", "message", [sender, number]).sequence for number in range(100)]

    async def send(sender: int) -> list[int]:
        return [(await manager.send_event("alice", "message", [sender, number])).sequence for number in range(100)]

    given = await asyncio.gather(
        *(asyncio.to_thread(post, sender) for sender in range(3)), *(send(sender) for sender in range(3, 6))
    )
    await asyncio.to_thread(wait_until, lambda: all(len(client.frames) == 600 for client in clients), "all are sent")
    assert sorted(number for numbers in given for number in numbers) == list(range(1, 601))
    for client in clients:
        assert [envelope["sequence"] for envelope in client.envelopes] == list(range(1, 601))
        for sender in range(6):
            assert [number for who, number in client.data if who == sender] == list(range(100))


def test_a_sweeper_is_planned_once_for_all_that_is_kept(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[float] = []
    monkeypatch.setattr(Sweeper, "plan", lambda _, wake: planned.append(wake))
    clock = Clock()
    manager = make_manager(clock=clock, events=EventPolicy(keep_seconds=60))
    for user in ("alice", "bob"):
        manager.create_isolated_context(user)
        for _ in range(3):
            manager.post_event(user, "message")
    assert planned == [clock() + 60]
    clock.advance(30)
    manager.post_event("alice", "message")
    manager._hub.sweep()
    assert manager._hub.next_wake() == clock() + 30
