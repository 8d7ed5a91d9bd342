"""Connections that come, stall, go and come back while events are sent, in any order, against a simple model.

Every event is at its user's connections in order, and nowhere else; what comes back is exact or said to be missed; and
when everybody has gone, nothing is left. The loop runs only where a rule says so: what threads send stands in line.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.clock import Clock
from support.events import Client, connect, settled
from ucm_middleware import Delivery, EventPolicy, UserContextManager, UserExecutionContext
from ucm_middleware.events.outbox import HELD_UP, TaskOutbox
from ucm_middleware.events.policy import WhenFull
from ucm_middleware.testing import closing_contexts

T = TypeVar("T")

SCALE = 20 if settings.get_current_profile_name() == "soak" else 1

USERS = ("alice", "bob", "carol")
QUEUE, KEEP, KEEP_SECONDS = 3, 4, 60.0
THREADS = ("thread-1", "thread-2")


@dataclass
class Sent:
    """An event of the model. ``to`` is a thread, a run or a connection that it is narrowed to."""

    data: int
    sequence: int
    at: float
    to: tuple[str, str] | None


@dataclass(eq=False)
class Line:
    """One connection of the model: what its client has, what is in the server's hands, and what waits."""

    context: UserExecutionContext
    client: Client
    outbox: TaskOutbox
    user: str
    after: tuple[str | None, int | None] | None
    followed: set[str] = field(default_factory=set)
    has: list[Any] = field(default_factory=list)
    in_hand: list[Any] = field(default_factory=list)
    waits: list[Any] = field(default_factory=list)
    extra: int = 0
    stalled: bool = False

    def gets(self, to: tuple[str, str] | None) -> bool:
        if to is None:
            return True
        name, value = to
        return value == getattr(self.context, name) or (name != "websocket_client_id" and value in self.followed)

    def flow(self) -> None:
        """The loop has run."""
        if not self.stalled:
            self.has += self.in_hand + self.waits
            self.in_hand, self.waits = [], []
        elif not self.in_hand and self.waits:
            self.in_hand = [self.waits.pop(0)]
        if not self.waits:
            self.extra = 0


@dataclass
class Order:
    """One user's events of the model, of one epoch."""

    epoch: str | None = None
    sequence: int = 0
    kept: list[Sent] = field(default_factory=list)


class EventMachine(RuleBasedStateMachine):
    when_full: WhenFull = "close"

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.loop = asyncio.new_event_loop()
        self.stack.callback(self.loop.close)
        self.clock = Clock()
        policy = EventPolicy(
            queue_events=QUEUE,
            keep_events=KEEP,
            keep_seconds=KEEP_SECONDS,
            when_full=self.when_full,
            wait_seconds=0.001,
        )
        self.manager = self.stack.enter_context(
            closing_contexts(
                UserContextManager(
                    clock=self.clock, events=policy, max_contexts_per_user=100, max_connections_per_user=100
                )
            )
        )
        self.clock.attach(self.manager)
        for user in USERS:
            self.manager.create_isolated_context(user).close("closed")
        self.lines: list[Line] = []
        self.orders: dict[str, Order] = {}
        self.epochs: list[tuple[str, str, int]] = []
        self.told = 0

    def teardown(self) -> None:
        for line in tuple(self.lines):
            line.context.close("closed")
        self.run(settled())
        self.clock.advance(KEEP_SECONDS)
        hub = self.manager._hub
        try:
            assert (hub._channels, hub._keeping, hub._kept_size, hub.next_wake()) == ({}, {}, 0, None)
            assert not asyncio.all_tasks(self.loop)
        finally:
            self.stack.close()

    def run(self, waiting: Any) -> Any:
        return self.loop.run_until_complete(waiting)

    def in_thread(self, call: Callable[[], T]) -> T:
        found: list[T] = []
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()
        return found[0]

    # The model.

    def flow(self) -> None:
        self.run(settled())
        for line in self.lines:
            line.flow()

    def order(self, user: str) -> Order:
        return self.orders.setdefault(user, Order())

    def forget_idle(self) -> None:
        for user, order in tuple(self.orders.items()):
            if not order.kept and not any(line.user == user for line in self.lines):
                del self.orders[user]

    def take_out(self, *lines: Line) -> None:
        """Whose connection is over has what it has, and gets no more."""
        self.lines = [line for line in self.lines if line not in lines]
        self.flow()
        for line in lines:
            line.client.read_on()
        self.run(settled())
        for line in lines:
            assert self.got(line) == line.has
            assert line.outbox.is_over
            assert len(line.outbox) == 0

    @staticmethod
    def got(line: Line) -> list[Any]:
        return [json.loads(frame)["data"] for frame in line.client.frames]

    def note(self, user: str, to: tuple[str, str] | None, delivery: Delivery) -> list[Line]:
        """What the model makes of an event. Returns the connections that must be closed for it."""
        order = self.order(user)
        if order.epoch is None:
            assert delivery.epoch not in [epoch for _, epoch, _ in self.epochs]
            order.epoch = delivery.epoch
        order.sequence += 1
        assert (delivery.epoch, delivery.sequence, delivery.kept) == (order.epoch, order.sequence, True)
        self.epochs.append((user, delivery.epoch, delivery.sequence))
        sent = Sent(self.told, order.sequence, self.clock(), to)
        order.kept = [each for each in order.kept if each.at > self.clock() - KEEP_SECONDS] + [sent]
        order.kept = order.kept[-KEEP:]
        full: list[Line] = []
        dropped = 0
        factor = HELD_UP if self.when_full == "wait" else 1
        for line in self.lines:
            if line.user != user or not line.gets(to):
                continue
            if len(line.waits) >= QUEUE * factor + line.extra:
                dropped += 1
                if self.when_full != "drop_oldest":
                    full.append(line)
                    continue
                line.waits.pop(0)
            line.waits.append(self.told)
        assert len([each for each in delivery.dropped if each.why != "gone"]) == dropped
        return full

    def join(self, line: Line) -> None:
        """Give a connection, which has its user by now, what it missed."""
        order = self.order(line.user)
        if order.epoch is None:
            order.epoch = self.manager._hub._channels[line.user].epoch
        if line.after is None:
            return
        order.kept = [each for each in order.kept if each.at > self.clock() - KEEP_SECONDS]
        (epoch, sequence), line.after = line.after, None
        newest = order.sequence
        missed: list[Any] = []
        if sequence == 0 and epoch is None:
            missed = [each.data for each in order.kept if line.gets(each.to)]
        else:
            newer = [each for each in order.kept if sequence is not None and each.sequence > sequence]
            known = sequence is not None and sequence <= newest and epoch == order.epoch
            if known and len(newer) == newest - (sequence or 0):
                missed = [each.data for each in newer if line.gets(each.to)]
            else:
                missed = [{"epoch": epoch, "sequence": sequence}]
        line.waits += missed
        line.extra += len(missed)

    def pick(self, number: int, lines: list[Line] | None = None) -> Line:
        lines = self.lines if lines is None else lines
        return lines[number % len(lines)]

    def narrowing(self, kind: str, number: int) -> tuple[dict[str, Any], tuple[str, str] | None]:
        if kind == "thread":
            thread = THREADS[number % 2]
            return {"thread_id": thread}, ("thread_id", thread)
        if not self.lines or kind == "all":
            return {}, None
        context = self.pick(number).context
        if kind == "run":
            return {"run_id": context.run_id}, ("run_id", context.run_id)
        assert context.websocket_client_id is not None
        return {"connection_id": context.websocket_client_id}, ("websocket_client_id", context.websocket_client_id)

    # What can happen.

    numbers = st.integers(0, 20)
    kinds = st.sampled_from(["all", "all", "all", "thread", "run", "connection"])

    @initialize()
    def begin(self) -> None:
        self.open("alice", None)
        self.open("bob", None)

    @rule(user=st.sampled_from(USERS), after=st.one_of(st.none(), numbers))
    def open(self, user: str, after: int | None) -> None:
        if len(self.lines) >= 9:
            return
        named = self.last_event(after, user)
        self.flow()
        context, client, outbox = self.run(self.connect(user, named))
        line = Line(context, client, outbox, user, named)
        self.lines.append(line)
        self.join(line)
        self.flow()

    async def connect(self, user: str | None, named: Any) -> tuple[UserExecutionContext, Client, TaskOutbox]:
        return connect(self.manager, user, named)

    def last_event(self, after: int | None, whose: str | None = None) -> tuple[str | None, int | None] | None:
        """Some event of this user's or, with higher numbers, of some user's, or what never was one."""
        if after is None:
            return None
        own = [(epoch, sequence) for user, epoch, sequence in self.epochs if user == whose]
        all_of_them = [(epoch, sequence) for _, epoch, sequence in self.epochs]
        named = [*own[:-6:-1], *all_of_them[:-6:-1], (None, 0), ("0" * 16, 3), (None, None)]
        return named[after % len(named)]

    @rule(after=st.one_of(st.none(), numbers))
    def open_stranger(self, after: int | None) -> None:
        if len(self.lines) >= 9:
            return
        named = self.last_event(after)
        self.flow()
        context, client, outbox = self.run(self.connect(None, named))
        line = Line(context, client, outbox, context.user_id, named)
        self.lines.append(line)
        order = self.order(line.user)
        order.epoch = self.manager._hub._channels[line.user].epoch

    @precondition(lambda self: any(line.context.is_anonymous for line in self.lines))
    @rule(number=numbers, user=st.sampled_from(USERS))
    def bind(self, number: int, user: str) -> None:
        line = self.pick(number, [line for line in self.lines if line.context.is_anonymous])
        line.context.bind(user)
        line.user = user
        self.join(line)
        self.forget_idle()

    @precondition(lambda self: bool(self.lines))
    @rule(number=numbers)
    def stall(self, number: int) -> None:
        line = self.pick(number)
        self.flow()
        line.client.stall()
        line.stalled = True

    @precondition(lambda self: any(line.stalled for line in self.lines))
    @rule(number=numbers)
    def read_on(self, number: int) -> None:
        line = self.pick(number, [line for line in self.lines if line.stalled])
        line.client.read_on()
        line.stalled = False
        self.flow()

    @precondition(lambda self: bool(self.lines))
    @rule(number=numbers, elsewhere=st.booleans())
    def close(self, number: int, elsewhere: bool) -> None:
        line = self.pick(number)
        if elsewhere:
            self.in_thread(lambda: line.context.close("closed"))
        else:
            line.context.close("closed")
        self.take_out(line)
        self.forget_idle()

    @rule(user=st.sampled_from(USERS), kind=kinds, number=numbers)
    def send(self, user: str, kind: str, number: int) -> None:
        """From a task: whoever reads has it when the sender goes on."""
        self.flow()
        self.told += 1
        narrowed, to = self.narrowing(kind, number)
        delivery = self.run(self.manager.send_event(user, "message", self.told, **narrowed))
        full = self.note(user, to, delivery)
        reading = [line for line in self.lines if line.user == user and line.gets(to) and not line.stalled]
        assert delivery.delivered >= len(reading)
        self.after_send(full)
        self.flow()

    @rule(user=st.sampled_from(USERS), kind=kinds, number=numbers)
    def post(self, user: str, kind: str, number: int) -> None:
        """From a thread, while the loop does something else."""
        self.told += 1
        narrowed, to = self.narrowing(kind, number)
        delivery = self.in_thread(lambda: self.manager.post_event(user, "message", self.told, **narrowed))
        self.after_send(self.note(user, to, delivery))

    def after_send(self, full: list[Line]) -> None:
        if self.when_full == "wait":  # the sender has waited in vain
            full = [line for line in self.lines if len(line.waits) > QUEUE + line.extra]
        assert all(line.context.lifetime.reason == "slow" for line in full)
        self.take_out(*full)
        self.forget_idle()

    @precondition(lambda self: bool(self.lines))
    @rule(number=numbers, thread=st.sampled_from(THREADS))
    def follow(self, number: int, thread: str) -> None:
        line = self.pick(number)
        self.manager.follow(line.context, thread)
        line.followed.add(thread)

    @rule(user=st.sampled_from(USERS))
    def purge(self, user: str) -> None:
        """As a revocation does, to connections that came in the same moment."""
        self.manager._hub.purge(user)
        order = self.orders.get(user)
        if order is not None:
            fresh = self.manager._hub._channels.get(user)
            self.orders[user] = Order(None if fresh is None else fresh.epoch)
            assert fresh is None or fresh.epoch != order.epoch
        self.forget_idle()

    @rule(user=st.sampled_from(USERS))
    def revoke(self, user: str) -> None:
        lines = [line for line in self.lines if line.user == user]
        assert self.manager.revoke(user, "test") == len(lines)
        self.take_out(*lines)
        self.orders.pop(user, None)

    @rule(seconds=st.sampled_from([1.0, 20.0, KEEP_SECONDS]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for order in self.orders.values():
            if order.kept and order.kept[-1].at <= self.clock() - KEEP_SECONDS:
                order.kept = []
        self.forget_idle()

    @rule()
    def let_flow(self) -> None:
        self.flow()

    # What always holds.

    @invariant()
    def every_client_has_what_it_should(self) -> None:
        for line in self.lines:
            assert self.got(line) == line.has, line.user
            for envelope in line.client.envelopes:
                assert envelope["user_id"] == line.user or envelope["user_id"].startswith("anonymous_")

    @invariant()
    def as_much_waits_as_should(self) -> None:
        for line in self.lines:
            assert len(line.outbox) == len(line.waits)

    @invariant()
    def nothing_is_kept_that_should_not(self) -> None:
        hub = self.manager._hub
        assert hub._channels.keys() == self.orders.keys()
        for user, order in self.orders.items():
            channel = hub._channels[user]
            assert (channel.epoch, channel.sequence) == (order.epoch, order.sequence)
            assert [event.sequence for event in channel.kept] == [sent.sequence for sent in order.kept]
        assert hub._kept_size == sum(event.size for each in hub._channels.values() for event in each.kept)

    @invariant()
    def somebody_is_awake_for_what_is_kept(self) -> None:
        newest = [order.kept[-1].at for order in self.orders.values() if order.kept]
        wake = self.manager._hub.next_wake()
        assert not newest or (wake is not None and wake <= min(newest) + KEEP_SECONDS)


class DroppingMachine(EventMachine):
    when_full = "drop_oldest"


class WaitingMachine(EventMachine):
    when_full = "wait"


@pytest.mark.parametrize("machine", [EventMachine, DroppingMachine, WaitingMachine])
def test_events_reach_their_user_only_in_order(machine: type[EventMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=25 * SCALE, stateful_step_count=30))
