"""What waits for one connection: in order, within its bounds, and what each policy does when it is full."""

import asyncio
import threading

import pytest

from support.contexts import MakeManager, events
from support.events import Client, connect, settled
from support.waiting import wait_until
from ucm_middleware import ConfigurationError, Dropped, EventPolicy, LedgerUnavailableError
from ucm_middleware.current import ambient_context
from ucm_middleware.events.envelope import TO_ALL, Event
from ucm_middleware.events.outbox import TaskOutbox, ThreadOutbox


def event(number: int, size: int = 100) -> Event:
    return Event(number, str(number), size, 0.0, TO_ALL)


class Reader:
    """A client of a connection that a thread serves."""

    def __init__(self) -> None:
        self.frames: list[str] = []
        self.reads = threading.Event()
        self.reads.set()
        self.error: Exception | None = None
        self.threads: set[str] = set()

    def send(self, text: str) -> None:
        assert self.reads.wait(15)
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.frames.append(text)


# A task.


async def test_a_task_sends_while_something_waits_and_no_longer() -> None:
    client = Client()
    lock = threading.RLock()
    outbox = TaskOutbox(client.send, asyncio.get_running_loop(), EventPolicy(), lock)
    before = asyncio.all_tasks()
    client.stall()
    for number in range(1, 4):
        assert outbox.put(event(number)) == ()
        outbox.wake()
    assert len(asyncio.all_tasks() - before) == 1
    await settled()
    assert (client.frames, len(outbox), outbox.is_sending) == ([], 2, True)
    client.read_on()
    await settled()
    assert client.frames == ["1", "2", "3"]
    assert (len(outbox), outbox.is_sending, asyncio.all_tasks() - before) == (0, False, set())
    outbox.wake()  # nothing waits
    assert asyncio.all_tasks() == before


async def test_it_sends_in_a_context_of_its_own(make_manager: MakeManager) -> None:
    manager = make_manager()
    seen: list[object] = []
    context = manager.create_isolated_context("alice")
    _, client, outbox = connect(manager, "bob")
    send = client.send

    async def looked(text: str) -> None:
        seen.append(ambient_context())
        await send(text)

    outbox._send = looked
    with manager.privileged(reason="one user's code sends to another", users=["bob"]):
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.send_event("bob", "message"))
            await asyncio.to_thread(manager.post_event, "bob", "message")
    await settled()
    assert seen == [None, None]
    assert context.is_open


async def test_threads_hand_over_to_the_loop_of_the_connection() -> None:
    client = Client()
    lock = threading.RLock()
    outbox = TaskOutbox(client.send, asyncio.get_running_loop(), EventPolicy(queue_events=5000), lock)

    def post(first: int) -> None:
        for number in range(first, first + 200):
            with lock:
                outbox.put(event(number))
            outbox.wake()

    await asyncio.gather(*(asyncio.to_thread(post, first) for first in (0, 1000, 2000, 3000)))
    await asyncio.to_thread(wait_until, lambda: not outbox.is_sending, "all are sent")
    got = [int(frame) for frame in client.frames]
    assert len(got) == 800
    for first in (0, 1000, 2000, 3000):
        assert [number for number in got if first <= number < first + 200] == list(range(first, first + 200))


async def test_what_the_server_raises_ends_the_outbox_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    outbox = TaskOutbox(client.send, asyncio.get_running_loop(), EventPolicy(), threading.RLock())
    client.error = OSError("the client has gone")
    outbox.put(event(1))
    outbox.put(event(2))
    outbox.wake()
    await settled()
    assert (outbox.is_over, len(outbox), outbox.sent) == (True, 0, 0)
    assert outbox.put(event(3)) == ((3, "gone"),)


async def test_an_end_breaks_off_what_is_being_sent() -> None:
    client = Client()
    outbox = TaskOutbox(client.send, asyncio.get_running_loop(), EventPolicy(), threading.RLock())
    before = asyncio.all_tasks()
    client.stall()
    outbox.put(event(1))
    outbox.wake()
    await settled()
    await asyncio.to_thread(outbox.end)
    await settled()
    assert asyncio.all_tasks() == before
    client.read_on()
    await settled()
    assert client.frames == []


async def test_a_server_that_looks_at_its_task_does_not_find_the_senders() -> None:
    tasks: list[object] = []

    async def send(text: str) -> None:
        async with asyncio.timeout(60):  # which cancels the task it is entered in
            tasks.append(asyncio.current_task())
            await asyncio.sleep(0)

    outbox = TaskOutbox(send, asyncio.get_running_loop(), EventPolicy(), threading.RLock())
    outbox.put(event(1))
    outbox.wake()
    await settled()
    assert len(tasks) == 1
    assert isinstance(tasks[0], asyncio.Task)
    assert tasks[0] is not asyncio.current_task()


async def test_an_end_in_the_middle_of_its_beginning_breaks_it_off_too() -> None:
    before = asyncio.all_tasks()

    async def send(text: str) -> None:
        ending = threading.Thread(target=outbox.end)
        ending.start()
        ending.join()
        await asyncio.Event().wait()

    outbox = TaskOutbox(send, asyncio.get_running_loop(), EventPolicy(), threading.RLock())
    outbox.put(event(1))
    outbox.wake()
    await settled()
    assert outbox.is_over
    assert asyncio.all_tasks() == before


async def test_nothing_is_held_for_an_empty_queue() -> None:
    client = Client()
    outbox, other = (
        TaskOutbox(client.send, asyncio.get_running_loop(), EventPolicy(), threading.RLock()) for _ in range(2)
    )
    outbox.put(event(1))
    assert (len(outbox), len(other)) == (1, 0)
    outbox.wake()
    await settled()
    assert client.frames == ["1"]
    assert outbox._queue is other._queue


def test_a_loop_that_is_closed_ends_the_outbox() -> None:
    loop = asyncio.new_event_loop()
    outbox = TaskOutbox(Client().send, loop, EventPolicy(), threading.RLock())
    loop.close()
    outbox.put(event(1))
    outbox.wake()
    assert outbox.is_over
    outbox.end()


# A thread.


def nothing() -> None:
    """What is done when a connection that a thread serves is over."""


def test_a_thread_sends_while_something_waits_and_no_longer() -> None:
    reader = Reader()
    outbox = ThreadOutbox(reader.send, nothing, EventPolicy(), threading.RLock())
    reader.reads.clear()
    for number in range(1, 4):
        outbox.put(event(number))
        outbox.wake()
    assert [thread.name for thread in threading.enumerate()].count("ucm-middleware events") == 1
    reader.reads.set()
    wait_until(lambda: reader.frames == ["1", "2", "3"], "all are sent")
    wait_until(lambda: not outbox.is_sending, "the thread has ended")
    assert reader.threads == {"ucm-middleware events"}


def test_what_a_threads_server_raises_ends_its_outbox() -> None:
    reader = Reader()
    reader.error = OSError("the client has gone")
    outbox = ThreadOutbox(reader.send, nothing, EventPolicy(), threading.RLock())
    outbox.put(event(1))
    outbox.wake()
    wait_until(lambda: outbox.is_over, "it is over")


def test_a_thread_that_cannot_be_started_ends_its_outbox_and_spares_the_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outbox = ThreadOutbox(Reader().send, nothing, EventPolicy(), threading.RLock())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    outbox.put(event(1))
    outbox.wake()
    assert outbox.is_over


def test_the_end_of_a_threads_outbox_breaks_off_what_blocks() -> None:
    over = threading.Event()
    outbox = ThreadOutbox(Reader().send, over.set, EventPolicy(), threading.RLock())
    outbox.end()
    assert over.is_set()


# Bounds.


def stalled(policy: EventPolicy) -> TaskOutbox:
    """An outbox whose loop does not run, so that everything waits."""
    loop = asyncio.new_event_loop()
    loop.close()
    return TaskOutbox(Client().send, loop, policy, threading.RLock())


def waiting(outbox: TaskOutbox) -> list[int]:
    return [each.sequence for each in outbox._queue]


def test_a_full_queue_takes_no_more() -> None:
    outbox = stalled(EventPolicy(queue_events=3))
    assert [outbox.put(event(number)) for number in range(1, 6)] == [(), (), (), ((4, "full"),), ((5, "full"),)]
    assert waiting(outbox) == [1, 2, 3]


def test_the_bytes_count_too() -> None:
    outbox = stalled(EventPolicy(max_size=4096, queue_bytes=5000))
    assert [outbox.put(event(number, 2500)) for number in range(1, 4)] == [(), (), ((3, "full"),)]


def test_the_oldest_make_room() -> None:
    outbox = stalled(EventPolicy(when_full="drop_oldest", queue_events=3, max_size=4096, queue_bytes=5000))
    for number in range(1, 4):
        assert outbox.put(event(number)) == ()
    assert outbox.put(event(4)) == ((1, "oldest"),)
    assert outbox.put(event(5, 4850)) == ((2, "oldest"), (3, "oldest"))
    assert outbox.put(event(6, 4096)) == ((4, "oldest"), (5, "oldest"))
    assert waiting(outbox) == [6]


def test_senders_that_wait_have_as_much_room_again() -> None:
    outbox = stalled(EventPolicy(when_full="wait", queue_events=2))
    told: list[int] = []
    for number in range(1, 5):
        assert outbox.put(event(number)) == ()
        outbox.when_room(lambda number=number: told.append(number))  # type: ignore[misc]
    assert outbox.put(event(5)) == ((5, "full"),)
    assert told == [1, 2]
    assert outbox._next() is not None
    assert told == [1, 2]
    assert outbox._next() is not None  # as many wait as may
    assert told == [1, 2, 3, 4]


def test_those_who_wait_are_told_of_the_end() -> None:
    outbox = stalled(EventPolicy(when_full="wait", queue_events=1))
    told: list[str] = []
    for number in (1, 2):
        outbox.put(event(number))
    outbox.when_room(lambda: told.append("before"))
    assert told == []
    outbox.end()
    outbox.when_room(lambda: told.append("after"))
    assert told == ["before", "after"]


# The policies, as senders meet them.


async def test_a_connection_that_does_not_keep_up_is_closed(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=3))
    slow_context, slow, _ = connect(manager, "alice")
    fast_context, fast, _ = connect(manager, "alice")
    slow.stall()
    deliveries = [await manager.send_event("alice", "message", number) for number in range(6)]
    assert [(each.delivered, each.queued, len(each.dropped)) for each in deliveries] == [
        (1, 1, 0),  # in the server's hands
        *[(1, 1, 0)] * 3,
        (1, 0, 1),
        (1, 0, 0),
    ]
    assert deliveries[4].dropped == (Dropped(slow_context.websocket_client_id or "", 5, "full"),)
    assert (slow_context.is_open, slow_context.lifetime.reason) == (False, "slow")
    assert fast_context.is_open
    assert fast.data == list(range(6))
    (record,) = [each for each in events(manager, "alice", "event_sent") if each["outcome"] != "ok"]
    assert (record["reason"], record["dropped"]) == ("full", 1)


async def test_it_is_closed_also_when_the_ledger_is_in_trouble(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LedgerUnavailableError("the disk is full")

    manager = make_manager(events=EventPolicy(queue_events=1))
    context, slow, _ = connect(manager, "alice")
    slow.stall()
    for number in range(2):
        await manager.send_event("alice", "message", number)
    monkeypatch.setattr(type(manager._trail), "event_sent", refuse)
    with pytest.raises(LedgerUnavailableError):
        await manager.send_event("alice", "message", 2)
    assert context.lifetime.reason == "slow"


async def test_a_connection_may_lose_its_oldest_instead(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=3, when_full="drop_oldest"))
    context, slow, outbox = connect(manager, "alice")
    slow.stall()
    deliveries = [await manager.send_event("alice", "message", number) for number in range(6)]
    dropped = [[each.sequence for each in delivery.dropped] for delivery in deliveries]
    assert dropped == [[], [], [], [], [2], [3]]
    assert (len(outbox), context.is_open) == (3, True)
    slow.read_on()
    await settled()
    assert slow.data == [0, 3, 4, 5]


async def test_a_sender_may_wait_and_goes_on_when_there_is_room(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=2, when_full="wait", wait_seconds=60))
    _, slow, _ = connect(manager, "alice")
    slow.stall()
    for number in range(3):
        await manager.send_event("alice", "message", number)
    sender = asyncio.create_task(manager.send_event("alice", "message", 3))
    other = asyncio.create_task(manager.send_event("alice", "message", 4))
    await settled()
    assert not sender.done()
    assert not other.done()
    slow.read_on()
    assert (await sender).delivered == 1
    await other
    assert slow.data == [0, 1, 2, 3, 4]


async def test_a_thread_may_wait_and_goes_on_when_there_is_room(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=2, when_full="wait", wait_seconds=60))
    _, slow, outbox = connect(manager, "alice")
    slow.stall()
    for number in range(3):
        await asyncio.to_thread(manager.post_event, "alice", "message", number)
        await settled()
    sender = asyncio.create_task(asyncio.to_thread(manager.post_event, "alice", "message", 3))
    await asyncio.to_thread(wait_until, lambda: bool(outbox._waiters), "the sender waits")
    slow.read_on()
    assert (await sender).dropped == ()
    await settled()
    assert slow.data == [0, 1, 2, 3]


@pytest.mark.parametrize("by", ["task", "thread"])
async def test_who_waits_in_vain_closes_that_connection_alone(make_manager: MakeManager, by: str) -> None:
    manager = make_manager(events=EventPolicy(queue_events=1, when_full="wait", wait_seconds=0.001))
    slow_context, slow, _ = connect(manager, "alice")
    fast_context, fast, _ = connect(manager, "alice")
    slow.stall()
    for number in range(6):
        if by == "task":
            await manager.send_event("alice", "message", number)
        else:
            await asyncio.to_thread(manager.post_event, "alice", "message", number)
            await settled()
    assert slow_context.lifetime.reason == "slow"
    assert fast_context.is_open
    assert fast.data == list(range(6))


async def test_a_loop_is_never_blocked_by_a_post(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(when_full="wait"))
    _, client, _ = connect(manager, "alice")
    with pytest.raises(ConfigurationError, match="await send_event"):
        manager.post_event("alice", "message")
    assert client.frames == []
    assert manager._hub._channels["alice"].sequence == 0


async def test_a_wait_that_is_cancelled_leaves_the_event_in_line(make_manager: MakeManager) -> None:
    manager = make_manager(events=EventPolicy(queue_events=1, when_full="wait", wait_seconds=60))
    context, slow, _ = connect(manager, "alice")
    slow.stall()
    for number in range(2):
        await manager.send_event("alice", "message", number)
    sender = asyncio.create_task(manager.send_event("alice", "message", 2))
    await settled()
    sender.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sender
    slow.read_on()
    await settled()
    assert (slow.data, context.is_open) == ([0, 1, 2], True)
