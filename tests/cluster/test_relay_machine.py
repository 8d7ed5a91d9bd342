"""Senders in several workers, connections that come, drop and come back elsewhere, a store that fails in many ways: in
any order, each connection has every event of its user in the store's order, or is told that it missed some.

All workers run in one loop, which goes on only where a rule says so: so what is under way stands still anywhere.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.cluster import SECRET, Site, joined, quiet, recover, seasoned, site
from support.events import Client, Envelope
from support.memory_store import MemoryServer
from ucm_middleware import EventPolicy, UserExecutionContext
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Keep, Published, UserKey
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.events.envelope import Draft

SCALE = 20 if settings.get_current_profile_name() == "soak" else 1

USERS = ("alice", "bob")
WORKERS = 3
MISSED = "events_missed"


@dataclass(eq=False, repr=False)
class Seat:
    """A connection, and where its client says that it was."""

    user: str
    site: Site
    context: UserExecutionContext
    client: Client
    after: tuple[str | None, int | None] | None
    since: tuple[str, int] | None


@dataclass
class Truth:
    """Every event that has its place in the store, as it was left there."""

    said: dict[str, dict[tuple[str, int], int]] = field(default_factory=dict)
    newest: dict[str, tuple[str, int]] = field(default_factory=dict)


class RelayMachine(RuleBasedStateMachine):
    when_unavailable = "closed"
    policy = EventPolicy(queue_events=64, keep_events=6, keep_seconds=3600.0)
    is_calm = False
    """Whether nothing happens by which an event could be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.server = seasoned()
        self.truth = Truth()
        self.sites: list[Site] = []
        self.seats: list[Seat] = []
        self.gone: list[Seat] = []
        self.sending: list[asyncio.Task[Any]] = []
        self.number = 0
        self.watch(self.server)

    def watch(self, server: MemoryServer) -> None:
        publish = server.publish
        seals = Seals((SECRET,), "ucm", lambda: 0, print)

        def watched(key: UserKey, payload: bytes, keep: Keep) -> Published:
            published = publish(key, payload, keep)
            secret = seals.unseal("event", key, payload)
            assert secret is not None
            user = key.digest.removeprefix("digest-of-")
            at = published.place.epoch, published.place.sequence
            self.truth.said.setdefault(user, {})[at] = int(Draft.unpacked(secret)[0].data_text)
            self.truth.newest[user] = at
            return published

        server.publish = watched  # type: ignore[method-assign]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def start(self) -> None:
        async def enter() -> None:
            for _ in range(WORKERS):
                made = site(self.server, when_unavailable=self.when_unavailable, events=self.policy)
                self.sites.append(one := await self.stack.enter_async_context(made))
                for user in USERS:
                    one.manager.create_isolated_context(user).close("closed")

        self.run(enter())

    # Connections.

    @rule(at=st.integers(0, WORKERS - 1), user=st.sampled_from(USERS))
    def come(self, at: int, user: str) -> None:
        self.connect(self.sites[at], user, None)

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), at=st.integers(0, WORKERS - 1))
    def drop_and_come_back(self, data: st.DataObject, at: int) -> None:
        seat = data.draw(st.sampled_from(self.seats))
        self.end(seat)
        last = seat.client.envelopes[-1] if seat.client.frames else None
        after = seat.after if last is None else (last["epoch"], last["sequence"])
        self.connect(self.sites[at], seat.user, after)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.seats)))

    def connect(self, one: Site, user: str, after: tuple[str | None, int | None] | None) -> None:
        if one.worker.state == "down" or self.server._held is not None:
            return
        try:
            lease, context, client = self.run(joined(one, user, after))
        except ClusterUnavailableError:
            return
        since = None
        if after is not None and after[0] is not None and after[1] is not None:
            since = after[0], after[1]
        elif lease is not None and lease.events is not None:
            since = lease.events.epoch, lease.events.sequence
        self.seats.append(Seat(user, one, context, client, after, since))

    def end(self, seat: Seat) -> None:
        self.seats.remove(seat)
        self.gone.append(seat)
        self.run(seat.context.aclose("disconnected"))

    # Events.

    @rule(at=st.integers(0, WORKERS - 1), user=st.sampled_from(USERS), times=st.integers(1, 4))
    def send(self, at: int, user: str, times: int) -> None:
        async def send_all(numbers: list[int]) -> None:
            for number in numbers:
                with suppress(ClusterUnavailableError):  # it was not sent, and whoever sent it knows
                    await self.sites[at].manager.send_event(user, "message", number)

        numbers = [self.number + one for one in range(times)]
        self.number += times
        self.sending.append(self.loop.create_task(send_all(numbers)))

    @rule(at=st.integers(0, WORKERS - 1), user=st.sampled_from(USERS), times=st.integers(1, 4))
    def post(self, at: int, user: str, times: int) -> None:
        for _ in range(times):
            self.sites[at].manager.post_event(user, "message", self.number)
            self.number += 1

    # Time.

    @rule(ticks=st.integers(1, 12))
    def go_on(self, ticks: int) -> None:
        async def tick() -> None:
            for _ in range(ticks):
                await asyncio.sleep(0)

        self.run(tick())

    @rule()
    def hold(self) -> None:
        if self.server._held is None:
            self.server.hold()

    @rule()
    def let_go(self) -> None:
        self.server.let_go()

    # What goes wrong.

    @rule(at=st.integers(0, WORKERS - 1), is_known=st.booleans())
    def cut(self, at: int, is_known: bool) -> None:
        worker = self.sites[at].worker
        worker.store.is_cut = True
        if is_known:
            worker.state = "local" if self.when_unavailable == "local" else "down"

    @rule(at=st.integers(0, WORKERS - 1))
    def mend(self, at: int) -> None:
        self.run(self.now(partial(self.heal_one, self.sites[at])))

    def heal_one(self, one: Site) -> None:
        if one.worker.store.is_cut:
            one.worker.store.is_cut = False
            one.worker.state = "up"
            one.deaf()
            one.relay.store_is_back()

    @rule(at=st.integers(0, WORKERS - 1), lag=st.integers(0, 6), is_slow=st.booleans())
    def be_slow(self, at: int, lag: int, is_slow: bool) -> None:
        """Answers take a while, and what is told stays on its way."""
        session = self.sites[at].worker.session
        session.lag, session.is_slow = lag, is_slow

    @rule(at=st.integers(0, WORKERS - 1))
    def hear(self, at: int) -> None:
        """What is on its way comes in."""
        self.run(self.now(self.sites[at].worker.session.hear))

    @rule(at=st.integers(0, WORKERS - 1))
    def lose_what_is_told(self, at: int) -> None:
        """The connection that events come by is lost with what is on it, and is there again."""
        self.sites[at].worker.session.lose_told()

    @staticmethod
    async def now(work: Callable[[], object]) -> None:
        """On the loop."""
        work()

    @precondition(lambda self: not self.is_calm)
    @rule(number=st.integers(1, 3))
    def lose_answers(self, number: int) -> None:
        self.server.lose_answers = number

    @precondition(lambda self: not self.is_calm)
    @rule()
    def wipe(self) -> None:
        self.server.wipe()
        recover(self.server)
        self.truth.newest.clear()

    # The end.

    def teardown(self) -> None:
        try:
            if self.sites:
                self.run(self.heal())
                for seat in self.gone:
                    self.check(seat, is_live=False)
                for seat in self.seats:
                    self.check(seat, is_live=True)
                self.check_senders()
        finally:
            self.run(self.stack.aclose())
            self.loop.close()

    async def heal(self) -> None:
        self.server.lose_answers = 0
        self.server.let_go()
        for one in self.sites:
            self.heal_one(one)
            one.worker.session.is_slow = False
            one.worker.session.hear()
        await asyncio.wait_for(asyncio.gather(*self.sending), 10)
        for _ in range(10):
            await quiet()
        for one in self.sites:
            one.relay.store_is_back()
        for _ in range(10):
            await quiet()

    def check(self, seat: Seat, *, is_live: bool) -> None:
        envelopes = seat.client.envelopes
        local = {one["epoch"] for one in envelopes if not one["epoch"].startswith(("epoch", "worker"))}
        if self.when_unavailable == "closed":
            assert not local
        for epoch in local:
            numbers = [one["sequence"] for one in envelopes if one["epoch"] == epoch and one["type"] != MISSED]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        data = [one["data"] for one in envelopes if one["type"] != MISSED]
        assert len(set(data)) == len(data), f"{seat.user} has {data}"
        had = {one["data"] for one in envelopes if one["epoch"] in local and one["type"] != MISSED}
        last = seat.since
        is_known = last is not None
        for one in (one for one in envelopes if one["epoch"] not in local):
            last, is_known = self.check_one(seat, one, self.beyond(seat, had, last), is_known), True
        newest = self.truth.newest.get(seat.user)
        if is_live and newest is not None:
            last = self.beyond(seat, had, last)
            assert last == newest, f"{seat.user} has {last} of {newest}"

    def beyond(self, seat: Seat, had: set[int], last: tuple[str, int] | None) -> tuple[str, int] | None:
        """The place after which the store owes a connection the next event: what it ``had``, numbered by its worker
        while nobody knew whether the store had taken it, is not delivered again by its place in the store.
        """
        said = self.truth.said.get(seat.user, {})
        while last is not None and said.get((last[0], last[1] + 1)) in had:
            last = last[0], last[1] + 1
        return last

    def check_one(self, seat: Seat, one: Envelope, last: tuple[str, int] | None, is_known: bool) -> tuple[str, int]:
        at = one["epoch"], one["sequence"]
        if one["type"] == MISSED:
            assert not self.is_calm or not self.could_have_all(seat), f"{seat.user} missed {one} after {last}"
            return at
        assert self.truth.said[seat.user][at] == one["data"]
        if last is None:
            assert at[1] == 1 or not is_known
        elif last[0] == at[0]:
            assert at[1] == last[1] + 1, f"{last} is followed by {at}"
        else:
            assert at[1] == 1, f"{last} is followed by {at}"
            assert last[1] == 0, f"{last} is followed by {at}, untold"
        return at

    def could_have_all(self, seat: Seat) -> bool:
        """Whether all that the user was ever sent is kept."""
        return len(self.truth.said.get(seat.user, {})) <= self.policy.keep_events

    def check_senders(self) -> None:
        """No event stands twice in the store."""
        for said in self.truth.said.values():
            assert len(set(said.values())) == len(said)


class LocalMachine(RelayMachine):
    when_unavailable = "local"


class CalmMachine(RelayMachine):
    policy = EventPolicy(queue_events=64, keep_events=1000, keep_seconds=3600.0)
    is_calm = True


def test_closed() -> None:
    run_state_machine_as_test(RelayMachine, settings=settings(max_examples=60 * SCALE, stateful_step_count=40))


def test_local() -> None:
    run_state_machine_as_test(LocalMachine, settings=settings(max_examples=60 * SCALE, stateful_step_count=40))


def test_calm() -> None:
    run_state_machine_as_test(CalmMachine, settings=settings(max_examples=60 * SCALE, stateful_step_count=40))
