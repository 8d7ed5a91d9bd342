"""Events of one user over several workers, through a store in memory."""

import asyncio
import logging
from typing import Any

import pytest

from support.cluster import Site, joined, quiet, recover, seasoned, site
from support.events import Client, accept, open_connection, settled
from support.memory_store import MemoryServer
from support.waiting import wait_until
from ucm_middleware import Delivery, Dropped, EventPolicy, UserExecutionContext
from ucm_middleware.cluster.notices import Notice
from ucm_middleware.cluster.store import UserKey
from ucm_middleware.errors import ClusterUnavailableError, InvalidEventError
from ucm_middleware.events.envelope import TO_ALL, Draft, Origin

ALICE = "alice"


@pytest.fixture
def server() -> MemoryServer:
    return seasoned()


async def join(
    one: Site, user_id: str = ALICE, after: tuple[str | None, int | None] | None = None
) -> tuple[UserExecutionContext, Client]:
    _, context, client = await joined(one, user_id, after)
    return context, client


async def send(one: Site, *numbers: int) -> None:
    for number in numbers:
        await one.manager.send_event(ALICE, "message", number)


def seen(client: Client) -> list[tuple[str, int, object]]:
    return [
        (one["epoch"], one["sequence"], one["data"] if one["type"] != "events_missed" else "missed")
        for one in client.envelopes
    ]


def commands(server: MemoryServer, name: str) -> int:
    return server.commands.count(name)


# From any worker to any other.


async def test_an_event_reaches_the_connections_of_every_worker(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two, site(server) as three:
        _, first = await join(one)
        _, second = await join(two)
        _, stranger = await join(three, "bob")
        await quiet()
        said = await one.manager.send_event(ALICE, "message", {"n": 1})
        back = await two.manager.send_event(ALICE, "message", {"n": 2})
        await quiet()

        assert said == Delivery("epoch1", 1, 0, 2, (), True)
        assert (back.epoch, back.sequence) == ("epoch1", 2)
        assert first.data == second.data == [{"n": 1}, {"n": 2}]
        assert first.frames == second.frames
        assert stranger.frames == []


async def test_a_worker_without_connections_of_a_user_hears_nothing_of_that_user(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        await join(one)
        context, _ = await join(two)
        await quiet()
        context.close("disconnected")
        await quiet()
        await send(one, 1)

        assert [len(worker.worker.session.subscribed) for worker in (one, two)] == [1, 0]


async def test_who_joins_while_the_last_one_is_unsubscribed_hears_all_the_same(server: MemoryServer) -> None:
    async with site(server) as one:
        context, _ = await join(one)
        await quiet()
        server.hold()
        context.close("disconnected")
        await quiet()
        assert server.waiting == 1  # to unsubscribe
        context, client = open_connection(one.manager, ALICE)
        accept(one.manager, context, client)
        server.let_go()
        await quiet()
        await send(one, 1)
        await quiet()

        assert client.data[-1] == 1


async def test_a_narrowed_event_goes_to_those_that_it_is_for_on_any_worker(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        _, first = await join(one)
        context, second = await join(two)
        await quiet()
        await one.manager.send_event(ALICE, "message", 1, thread_id=context.thread_id)
        await one.manager.send_event(ALICE, "message", 2)
        await quiet()

        assert (first.data, second.data) == ([2], [1, 2])


async def test_the_events_of_one_sender_keep_their_order_however_they_are_sent(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        _, client = await join(two)
        one.manager.create_isolated_context(ALICE)
        await quiet()
        for number in range(0, 30, 3):
            one.manager.post_event(ALICE, "message", number)
            await one.manager.send_event(ALICE, "message", number + 1)
            one.manager.agents._hub.relay.post(  # type: ignore[union-attr]
                ALICE, Draft("message", number + 2, Origin(ALICE), TO_ALL, EventPolicy())
            )
        await quiet()

        assert client.data == list(range(30))


async def test_one_event_of_a_user_is_under_way_at_a_time(server: MemoryServer) -> None:
    async with site(server) as one:
        await join(one)
        await quiet()
        server.hold()
        for number in range(3):
            one.manager.post_event(ALICE, "message", number)
        await quiet()
        assert server.waiting == 1
        server.let_go()
        await quiet()


async def test_whoever_is_hushed_gets_nothing_more(server: MemoryServer) -> None:
    async with site(server) as one:
        context, client = await join(one)
        await quiet()
        await send(one, 1)
        await quiet()
        one.manager._hub.hush(context)
        await send(one, 2)
        await quiet()

        assert client.data == [1]


async def test_what_is_posted_has_no_place_yet(server: MemoryServer) -> None:
    async with site(server) as one:
        await join(one)
        await quiet()

        assert one.manager.post_event(ALICE, "message") == Delivery("", 0, 0, 1, (), False)
        await quiet()


# Who may be sent to.


async def test_a_user_of_another_worker_is_known(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        _, client = await join(one)
        await quiet()
        assert (await two.manager.send_event(ALICE, "message", 1)).sequence == 1
        await quiet()
        assert client.data == [1]


async def test_who_was_never_anywhere_is_not(server: MemoryServer) -> None:
    async with site(server) as one:
        with pytest.raises(InvalidEventError, match="never here"):
            await one.manager.send_event("carol", "message", 1)
        assert "publish" not in server.commands


async def test_whether_a_user_is_known_is_not_guessed_while_the_store_cannot_say(server: MemoryServer) -> None:
    async with site(server) as one, site(server, when_unavailable="local") as two:
        server.is_down = True
        with pytest.raises(ClusterUnavailableError):
            await one.manager.send_event("carol", "message", 1)
        with pytest.raises(InvalidEventError):
            await two.manager.send_event("carol", "message", 1)


# Coming back.


async def test_who_comes_back_to_another_worker_gets_what_was_missed(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        context, _ = await join(one)
        await quiet()
        await send(one, 1, 2, 3)
        await quiet()
        context.close("disconnected")
        await send(one, 4, 5)
        _, client = await join(two, after=("epoch1", 2))
        await quiet()
        await send(one, 6)
        await quiet()

        assert client.data == [3, 4, 5, 6]


@pytest.mark.parametrize("after", [("epoch2", 1), ("epoch1", 9), (None, 1), ("epoch1", None), (None, None)])
async def test_who_names_what_cannot_be_had_is_told(server: MemoryServer, after: tuple[str | None, int | None]) -> None:
    async with site(server) as one:
        one.manager.create_isolated_context(ALICE)
        await send(one, 1, 2)
        _, client = await join(one, after=after)
        await send(one, 3)
        await quiet()

        assert seen(client) == [("epoch1", 2, "missed"), ("epoch1", 3, 3)] or seen(client) == [
            ("epoch1", 3, "missed")  # the third was sent before its place was looked up
        ]
        assert client.data[0] == {"epoch": after[0], "sequence": after[1]}


async def test_who_asks_for_whatever_there_is_gets_it(server: MemoryServer) -> None:
    async with site(server, events=EventPolicy(keep_events=2)) as one:
        one.manager.create_isolated_context(ALICE)
        await send(one, 1, 2, 3)
        _, client = await join(one, after=(None, 0))
        await quiet()

        assert client.data == [2, 3]


async def test_a_new_connection_gets_what_comes_after_its_slot(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        await send(two, 1, 2)
        lease = await one.worker.acquire(ALICE)
        context, client = open_connection(one.manager, ALICE)
        lease.context = context
        await send(two, 3)
        accept(one.manager, context, client)
        await quiet()

        assert client.data == [3]


async def test_what_the_store_did_not_keep_is_told(server: MemoryServer) -> None:
    async with site(server, events=EventPolicy(keep_events=1)) as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        await send(one if one.manager._hub.knows(ALICE) else two, 1)
        lease = await one.worker.acquire(ALICE)
        context, client = open_connection(one.manager, ALICE)
        lease.context = context
        one.manager.create_isolated_context(ALICE)
        await send(one, 2, 3)
        accept(one.manager, context, client)
        await quiet()

        assert seen(client) == [("epoch1", 3, "missed")]


async def test_an_anonymous_connection_that_learns_its_user_is_caught_up(server: MemoryServer) -> None:
    async with site(server) as one:
        one.manager.create_isolated_context(ALICE)
        await send(one, 1, 2)
        context, client = open_connection(one.manager, None)
        accept(one.manager, context, client, ("epoch1", 1))
        await one.manager.send_event(context.user_id, "message", "to nobody yet")
        await quiet()
        context.bind(ALICE)
        await send(one, 3)
        await quiet()

        assert client.data == ["to nobody yet", 2, 3]
        assert commands(server, "publish") == 3


# In the middle of it.


async def test_what_comes_before_the_subscription_is_confirmed_is_not_lost(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        _, client = await join(one)
        server.hold()
        await settled()
        sending = asyncio.ensure_future(send(two, 1, 2))
        await settled()
        server.let_go()
        await sending
        await quiet()

        assert client.data == [1, 2]


async def test_what_comes_while_it_is_looked_up_is_neither_lost_nor_doubled(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        await send(two, 1, 2)
        one.worker.session.lag = 9
        _, client = await join(one, after=("epoch1", 0))
        for number in range(3, 9):
            await send(two, number)
            await asyncio.sleep(0)
        await quiet()
        await quiet()

        assert client.data == list(range(1, 9))


async def test_the_first_event_of_all_may_overtake_the_answer_that_there_is_none(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        _, client = await join(one)
        await quiet()
        one.worker.session.lag = 9
        one.deaf()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await send(two, 1)
        await quiet()
        await send(two, 2)
        await quiet()

        assert client.data == [1, 2]


async def test_a_gap_is_looked_up(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        _, client = await join(one)
        await quiet()
        await send(two, 1)
        one.worker.session.is_slow = True
        await send(two, 2, 3)
        one.worker.session._told.clear()
        one.worker.session.is_slow = False
        await send(two, 4)
        await quiet()

        assert client.data == [1, 2, 3, 4]


async def test_what_was_missed_while_nothing_was_heard_is_looked_up(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        _, client = await join(one)
        await quiet()
        one.worker.session.is_slow = True
        await send(two, 1, 2)
        one.worker.session.lose_told()
        await quiet()

        assert client.data == [1, 2]


async def test_many_who_were_deaf_are_looked_up_a_few_at_a_time(server: MemoryServer) -> None:
    async with site(server) as one:
        for number in range(100):
            await join(one, f"user-{number}")
        await quiet()
        await quiet()
        server.hold()
        one.deaf()
        await quiet()
        assert server.waiting == 32
        server.let_go()
        await quiet()
        assert commands(server, "history") == 200


async def test_what_waits_for_a_look_up_is_bounded_and_looked_up_again(server: MemoryServer) -> None:
    policy = EventPolicy(queue_events=3, keep_events=50)
    async with site(server, events=policy) as one, site(server) as two:
        _, client = await join(one)
        await quiet()
        await send(two, 1)
        one.worker.session.lag = 25
        one.deaf()
        audience = one.relay._audiences[one.worker.key_of(ALICE)]
        audience.cursors[one.manager._hub.connections_of(ALICE)[0]].is_settled = False
        await asyncio.sleep(0)
        for number in range(2, 12):
            await send(two, number)
            assert len(audience._waiting) <= 3
        one.worker.session.lag = 0
        await quiet()
        await quiet()

        assert client.data == list(range(1, 12))


async def test_a_connection_that_ends_while_it_is_looked_up_gets_nothing(server: MemoryServer) -> None:
    async with site(server) as one:
        one.manager.create_isolated_context(ALICE)
        await send(one, 1)
        one.worker.session.lag = 5
        context, client = await join(one, after=("epoch1", 0))
        context.close("disconnected")
        await quiet()

        assert client.frames == []
        assert one.relay._audiences == {}


async def test_an_event_that_comes_twice_is_delivered_once(server: MemoryServer) -> None:
    async with site(server) as one:
        _, client = await join(one)
        await quiet()
        await send(one, 1, 2)
        await quiet()
        key = one.worker.key_of(ALICE)
        history = await one.worker.session.history(key, 0)
        assert history.newest is not None
        for sequence, payload in history.events:
            one.event(key, type(history.newest)("epoch1", sequence), payload)
        await quiet()

        assert client.data == [1, 2]


async def test_another_epoch_is_told(server: MemoryServer) -> None:
    async with site(server) as one:
        _, client = await join(one)
        await quiet()
        await send(one, 1, 2)
        await quiet()
        server.wipe()
        recover(server)
        await send(one, 3, 4)
        await quiet()

        assert seen(client)[:2] == [("epoch1", 1, 1), ("epoch1", 2, 2)]
        assert "missed" in {what for _, _, what in seen(client)[2:]}
        assert seen(client)[-1][:2] == ("epoch2", 2)


async def test_that_all_is_forgotten_is_told_and_what_comes_then_is_had(server: MemoryServer) -> None:
    async with site(server) as one:
        _, client = await join(one)
        await quiet()
        await send(one, 1)
        await quiet()
        server.wipe()
        recover(server)
        await quiet()
        assert [what for _, _, what in seen(client)] == [1, "missed"]
        await send(one, 2)
        await quiet()

        assert seen(client)[-1] == ("epoch2", 1, 2)


@pytest.mark.parametrize("is_first", [True, False])
async def test_nothing_that_was_sent_after_a_revocation_comes_to_who_was_revoked(
    server: MemoryServer, is_first: bool
) -> None:
    async with site(server) as one, site(server) as two:  # none of which renews, and hears of notices by that
        context, client = await join(two)
        await quiet()
        if not is_first:
            await send(one, 1)
            await quiet()
        await asyncio.wrap_future(one.notices.leave(Notice("revoked", ALICE, reason="stolen")))
        _, again = await join(one)
        await quiet()
        await send(one, 2)
        await asyncio.to_thread(wait_until, lambda: not context.is_open, "who was revoked is closed")
        await quiet()

        assert client.data == ([] if is_first else [1])
        assert context.lifetime.reason == "revoked"
        assert again.data == [2]


# The store cannot be asked.


async def test_closed_an_event_is_refused_and_the_sender_knows_whether_it_may_have_been_sent(
    server: MemoryServer,
) -> None:
    async with site(server) as one:
        _, client = await join(one)
        await quiet()
        await send(one, 0)
        await quiet()
        server.lose_answers = 1
        with pytest.raises(ClusterUnavailableError) as unknown:
            await one.manager.send_event(ALICE, "message", 1)
        server.is_down = True
        with pytest.raises(ClusterUnavailableError) as known:
            await one.manager.send_event(ALICE, "message", 2)
        await quiet()

        assert (unknown.value.is_unknown, known.value.is_unknown) == (True, False)
        assert client.data == [0, 1]


async def test_what_was_posted_and_is_lost_is_in_the_log_and_on_record(
    server: MemoryServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(server) as one:
        await join(one)
        await quiet()
        server.is_down = True
        with caplog.at_level(logging.ERROR):
            one.manager.post_event(ALICE, "message", "not to be seen")
            await quiet()
        assert "1 events of users could not be sent" in caplog.text
        assert "not to be seen" not in caplog.text
        trail = one.manager.get_audit_trail(ALICE)
        assert trail is not None
        lost = [record for record in trail["events"] if record["event"] == "event_sent"]
        assert [(record["outcome"], record.get("reason")) for record in lost] == [("ok", None), ("failed", "cluster")]

        one.worker.state = "down"
        said = one.manager.post_event(ALICE, "message", 1)
        assert said.dropped == (Dropped("", 0, "cluster"),)


async def test_what_fails_in_a_way_of_its_own_holds_up_nothing_behind_it(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site(server) as one:
        _, _, client = await joined(one, ALICE)
        await quiet()
        good = one.worker.session.publish

        async def bad(*_: Any) -> Any:
            await asyncio.sleep(0)
            raise RuntimeError("garbage")

        monkeypatch.setattr(one.worker.session, "publish", bad)
        one.manager.post_event(ALICE, "message", 0)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(one.manager.send_event(ALICE, "message", 1), 5)
        monkeypatch.setattr(one.worker.session, "publish", good)
        await asyncio.wait_for(one.manager.send_event(ALICE, "message", 2), 5)
        await quiet()
        assert client.data == [2]


async def test_what_does_not_fit_is_told(server: MemoryServer) -> None:
    async with site(server, events=EventPolicy(queue_events=2)) as one:
        await join(one)
        await quiet()
        server.hold()
        said = [one.manager.post_event(ALICE, "message", number).dropped for number in range(3)]
        await quiet()
        server.let_go()

        assert said == [(), (), (Dropped("", 0, "cluster"),)]


async def test_local_events_have_an_epoch_of_their_own_and_are_had_by_those_here(server: MemoryServer) -> None:
    async with site(server, when_unavailable="local") as one, site(server) as two:
        _, here = await join(one)
        _, there = await join(two)
        await quiet()
        await send(one, 1)
        await quiet()
        one.worker.store.is_cut = True
        said = await one.manager.send_event(ALICE, "message", 2)
        one.worker.state = "local"
        await send(one, 3)
        await send(two, 4)
        one.worker.store.is_cut = False
        one.worker.state = "up"
        one.relay.store_is_back()
        one.deaf()
        await quiet()
        await send(one, 5)
        await quiet()

        assert (said.delivered, said.queued) == (1, 0)
        local = said.epoch
        assert seen(here) == [
            ("epoch1", 1, 1),
            (local, 1, 2),
            (local, 2, 3),
            ("epoch1", 2, 4),
            ("epoch1", 3, 5),
        ]
        assert there.data == [1, 4, 5]


async def test_who_had_a_local_event_last_is_told_after_the_outage(server: MemoryServer) -> None:
    async with site(server, when_unavailable="local") as one:
        context, _ = await join(one)
        await quiet()
        await send(one, 1)
        one.worker.state = "local"
        one.worker.store.is_cut = True
        said = await one.manager.send_event(ALICE, "message", 2)
        context.close("disconnected")
        _, again, client = await joined(one, ALICE, (said.epoch, 0))
        await quiet()
        assert seen(client) == [(said.epoch, 1, 2)]
        again.close("disconnected")
        one.worker.state = "up"
        one.worker.store.is_cut = False
        one.relay.store_is_back()
        _, client = await join(one, after=(said.epoch, 1))
        await quiet()

        assert seen(client) == [("epoch1", 1, "missed")]


async def test_who_joined_in_the_outage_is_told_that_something_may_be_missed(server: MemoryServer) -> None:
    async with site(server, when_unavailable="local") as one, site(server) as two:
        two.manager.create_isolated_context(ALICE)
        await send(two, 1)
        one.worker.state = "local"
        one.worker.store.is_cut = True
        _, client = await join(one)
        await send(two, 2)
        await quiet()
        assert client.frames == []
        one.worker.state = "up"
        one.worker.store.is_cut = False
        one.relay.store_is_back()
        await quiet()

        assert seen(client) == [("epoch1", 2, "missed")]


# Queues.


@pytest.mark.parametrize("when_full", ["close", "drop_oldest", "wait"])
async def test_a_slow_connection_is_dealt_with_where_it_is(server: MemoryServer, when_full: str) -> None:
    policy = EventPolicy(queue_events=2, when_full=when_full, wait_seconds=0.01)  # type: ignore[arg-type]
    async with site(server, events=policy) as one, site(server) as two:
        context, slow = await join(one)
        _, quick = await join(two)
        await quiet()
        slow.stall()
        for number in range(8):
            await send(two, number)
            await quiet()
        if when_full == "wait":
            await asyncio.to_thread(wait_until, lambda: not context.is_open, "the connection is closed")
        slow.read_on()
        await quiet()

        assert quick.data == list(range(8))
        assert context.is_open == (when_full == "drop_oldest")
        if when_full == "drop_oldest":
            assert slow.data == [0, 6, 7]
        else:
            assert context.lifetime.reason == "slow"


async def test_whoever_finds_room_in_time_stays(server: MemoryServer) -> None:
    policy = EventPolicy(queue_events=2, when_full="wait", wait_seconds=3600.0)
    async with site(server, events=policy) as one:
        context, client = await join(one)
        await quiet()
        client.stall()
        for number in range(4):
            await send(one, number)
            await quiet()
        assert len(one.relay._room) == 1
        client.read_on()
        await quiet()

        assert len(one.relay._room) == 0
        assert context.is_open
        assert client.data == [0, 1, 2, 3]


async def test_connections_of_a_user_who_stands_elsewhere_from_now_on_hear_there(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store came back new, and under another secret's seal."""
    async with site(server, when_unavailable="local") as one:
        _, client = await join(one)
        stays, gone = await join(one, "bob"), await join(one, "bob")
        await quiet()
        server.is_down, one.worker.state = True, "local"
        server.wipe()
        before = one.worker.key_of(ALICE)
        monkeypatch.setattr(one.worker, "key_of", lambda user_id: UserKey(7, f"new-digest-of-{user_id}"))
        gone[0].close()
        server.is_down, one.worker.state = False, "up"
        one.relay.store_is_back()
        await quiet()
        await send(one, 1)
        await one.manager.send_event("bob", "message", 2)
        await quiet()

        assert client.data[-1] == 1
        assert stays[1].data[-1] == 2
        assert before not in one.worker.session.subscribed
        assert {key.digest for key in one.relay._audiences} == {"new-digest-of-alice", "new-digest-of-bob"}
        assert all(len(audience.cursors) == 1 for audience in one.relay._audiences.values())


@pytest.mark.parametrize("is_heard_first", [False, True])
async def test_local_an_event_that_may_have_been_sent_is_had_once_by_those_here(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch, is_heard_first: bool
) -> None:
    async with site(server, when_unavailable="local") as one, site(server) as two:
        _, here = await join(one)
        _, there = await join(two)
        await quiet()
        server.lose_answers = 1
        publish = one.worker.session.publish

        async def slow(*args: Any) -> Any:
            try:
                return await publish(*args)
            except ClusterUnavailableError:
                if is_heard_first:
                    await quiet()
                raise

        monkeypatch.setattr(one.worker.session, "publish", slow)
        said = await one.manager.send_event(ALICE, "message", 1)
        await quiet()
        await send(one, 2)
        await quiet()
        _, again = await join(one, after=("epoch1", 0))
        await quiet()

        assert there.data == again.data == [1, 2]
        assert [what for _, _, what in seen(here)] == [1, 2]
        assert said.queued + said.delivered == 1
        assert (said.epoch == "epoch1") is is_heard_first


async def test_who_could_not_be_unsubscribed_is_later(server: MemoryServer) -> None:
    async with site(server) as one:
        context, _ = await join(one)
        await quiet()
        one.worker.store.is_cut = True
        context.close()
        await quiet()
        one.worker.store.is_cut = False
        one.relay.store_is_back()
        await quiet()

        assert one.worker.session.subscribed == set()
        assert one.relay._audiences == {}
