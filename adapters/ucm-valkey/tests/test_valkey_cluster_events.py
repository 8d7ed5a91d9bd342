"""Events and notices: in order, bounded, to whom it concerns and nobody else, and what was missed is known to be."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from support.tcp_proxy import TcpProxy
from support.valkey import LibraryName, ValkeyServer
from support.valkey_cluster import (
    LEASE,
    PREFIX,
    Heard,
    order,
    release,
    serving,
    session_at,
    slot,
    url_of,
    user,
)
from support.waiting import PATIENCE, wait_until
from ucm_middleware.cluster.store import Alive, Granted, History, Keep, Place, Renewal, Session, UserKey
from ucm_middleware.errors import ClusterUnavailableError
from ucm_valkey.cluster.asking import Asking
from ucm_valkey.cluster.clients import Client
from ucm_valkey.cluster.keys import Keys
from ucm_valkey.cluster.listening import Listener
from ucm_valkey.cluster.topology import OneServer
from ucm_valkey.cluster.urls import target_of

KEEP = Keep(events=100, size=10_000, seconds=60)
ANNA, BERT = user(1), user(2)


@pytest.fixture
async def session(valkey_server: ValkeyServer, library: LibraryName) -> AsyncIterator[Session]:
    """One that serves."""
    made = session_at(url_of(library, valkey_server.port))
    await serving(made)
    yield made
    await made.aclose()


@pytest.fixture
async def listening(session: Session, valkey_proxy: TcpProxy, library: LibraryName) -> AsyncIterator[Session]:
    """Another worker's, through a proxy."""
    made = session_at(url_of(library, valkey_proxy.port))
    yield made
    await made.aclose()


async def test_events_are_heard_in_order_by_whoever_is_subscribed(session: Session, listening: Session) -> None:
    heard, others = Heard(), Heard()
    await listening.listen(heard)
    await session.listen(others)
    await listening.subscribe(ANNA)
    payloads = [bytes([number]) * number for number in range(100)]
    for number, payload in enumerate(payloads, 1):
        published = await session.publish(ANNA, payload, KEEP)
        assert (published.place.sequence, published.workers, published.connections) == (number, 1, 0)
        assert (await session.publish(BERT, b"not for Anna", KEEP)).workers == 0
    assert [await heard.next() for _ in payloads] == [
        ("event", ANNA, number, payload) for number, payload in enumerate(payloads, 1)
    ]
    assert heard.said.empty()
    assert others.said.empty()


async def test_publishers_at_once_share_one_sequence(session: Session, listening: Session) -> None:
    heard = Heard()
    await listening.listen(heard)
    await listening.subscribe(ANNA)
    places = await asyncio.gather(
        *(each.publish(ANNA, b"%d" % number, KEEP) for number in range(50) for each in (session, listening))
    )
    assert sorted(published.place.sequence for published in places) == list(range(1, 101))
    assert [(await heard.next())[2] for _ in range(100)] == list(range(1, 101))
    assert len({published.place.epoch for published in places}) == 1


async def test_who_unsubscribed_hears_no_more(session: Session, listening: Session) -> None:
    heard = Heard()
    await listening.listen(heard)
    await listening.subscribe(ANNA)
    await listening.subscribe(BERT)
    await listening.unsubscribe(ANNA)
    await listening.unsubscribe(ANNA)
    assert (await session.publish(BERT, b"1", KEEP)).workers == 1
    assert await heard.next() == ("event", BERT, 1, b"1")
    await session.publish(ANNA, b"2", KEEP)
    await session.publish(BERT, b"3", KEEP)
    assert await heard.next() == ("event", BERT, 2, b"3")
    await listening.subscribe(ANNA)
    await session.publish(ANNA, b"4", KEEP)
    assert await heard.next() == ("event", ANNA, 2, b"4")


async def test_connections_are_counted_over_all_workers(session: Session, valkey_server: ValkeyServer) -> None:
    await session.acquire(order(slot(ANNA, 1, "w1-1", is_connection=True)))
    await session.acquire(order(slot(ANNA, 2, "w2-1", is_connection=True)))
    await session.acquire(order(slot(ANNA, 3, "w2-1")))
    await session.acquire(order(slot(ANNA, 4, "dead-1", is_connection=True), lease=0.2))
    wait_until(lambda: not valkey_server.admin.exists(f"{PREFIX}{{1}}:t:dead-1"), "a worker's lease has ended")
    assert (await session.publish(ANNA, b"event", KEEP)).connections == 2


async def test_what_is_kept_is_bounded_by_number(session: Session) -> None:
    assert await session.history(ANNA, 0) == History(None, ())
    for number in range(1, 7):
        await session.publish(ANNA, b"%d" % number, Keep(3, 1000, 60))
    place = (await session.publish(ANNA, b"7", Keep(3, 1000, 60))).place
    assert await session.history(ANNA, 0) == History(place, ((5, b"5"), (6, b"6"), (7, b"7")))
    assert await session.history(ANNA, 6) == History(place, ((7, b"7"),))
    assert await session.history(ANNA, 7) == History(place, ())
    # The gap is seen by its sequence: after 2 comes 5.
    assert (await session.history(ANNA, 2)).events[0][0] == 5


async def test_what_is_kept_is_bounded_by_bytes(session: Session, valkey_server: ValkeyServer) -> None:
    keep = Keep(100, 100, 60)
    for _ in range(5):
        await session.publish(ANNA, b"x" * 40, keep)
    assert [number for number, _ in (await session.history(ANNA, 0)).events] == [4, 5]
    await session.publish(ANNA, b"y" * 90, keep)
    assert (await session.history(ANNA, 0)).events == ((6, b"y" * 90),)
    assert valkey_server.admin.hget(f"{PREFIX}{{1}}:u:{ANNA.digest}", "size") == b"90"
    # One that is too large by itself is told, and not kept; nor does it push others out.
    assert (await session.publish(ANNA, b"z" * 101, keep)).place.sequence == 7
    history = await session.history(ANNA, 0)
    assert history.newest is not None
    assert history.newest.sequence == 7
    assert history.events == ((6, b"y" * 90),)


async def test_what_is_kept_is_bounded_by_time(session: Session, valkey_server: ValkeyServer) -> None:
    first = await session.publish(ANNA, b"1", Keep(10, 1000, 0.1))
    key = f"{PREFIX}{{1}}:e:{ANNA.digest}"
    wait_until(lambda: not valkey_server.admin.exists(key), "the events have expired")
    assert await session.history(ANNA, 0) == History(first.place, ())
    second = await session.publish(ANNA, b"2", Keep(10, 1000, 60))
    assert second.place == Place(first.place.epoch, 2)
    assert valkey_server.admin.hget(f"{PREFIX}{{1}}:u:{ANNA.digest}", "size") == b"1"
    assert 50 < valkey_server.admin.ttl(key) <= 60


async def test_nothing_is_kept_where_nothing_is_to_be(session: Session, valkey_server: ValkeyServer) -> None:
    published = await session.publish(ANNA, b"1", Keep(0, 0, 0))
    assert await session.history(ANNA, 0) == History(published.place, ())
    assert not valkey_server.admin.exists(f"{PREFIX}{{1}}:e:{ANNA.digest}")


async def test_the_place_of_a_user_outlives_its_events(session: Session, valkey_server: ValkeyServer) -> None:
    await session.publish(ANNA, b"1", Keep(10, 1000, 7200))
    assert valkey_server.admin.ttl(f"{PREFIX}{{1}}:u:{ANNA.digest}") > 7000
    await session.publish(ANNA, b"2", Keep(10, 1000, 60))
    assert valkey_server.admin.ttl(f"{PREFIX}{{1}}:u:{ANNA.digest}") > 7000


async def test_a_lease_begins_at_the_place_of_the_newest_event_and_notice(session: Session) -> None:
    assert await session.acquire(order(slot(ANNA, 1))) == Granted("", None)
    place = (await session.publish(ANNA, b"1", KEEP)).place
    position = (await session.notify(ANNA, b"n", forget_events=False)).position
    assert await session.acquire(order(slot(ANNA, 2))) == Granted(position, place)


async def test_a_notice_reaches_each_tenancy_that_has_a_lease_of_the_user(session: Session, listening: Session) -> None:
    heard = Heard()
    await listening.listen(heard)
    neighbour = user(1 + 64)
    for number, tenancy in ((1, "w1-1"), (2, "w2-1"), (3, "w2-1")):
        await session.acquire(order(slot(ANNA, number, tenancy)))
    await session.acquire(order(slot(neighbour, 4, "w3-1")))
    notified = await session.notify(ANNA, b"sealed", forget_events=False)
    assert notified.leases == 3
    kind, bucket, tenancies = await heard.next()
    assert (kind, bucket, set(tenancies)) == ("nudged", 1, {"w1-1", "w2-1"})
    told = ((ANNA.digest, notified.position),)
    renewals = [Renewal(1, tenancy, LEASE) for tenancy in ("w1-1", "w2-1", "w3-1")]
    for _ in range(2):  # told until it says that it has them
        assert await session.renew(renewals) == [Alive(told), Alive(told), Alive()]
    assert await session.notices(ANNA, "") == [(notified.position, b"sealed")]
    assert await session.renew([Renewal(1, "w1-1", LEASE, told=told)]) == [Alive()]
    assert await session.renew(renewals) == [Alive(), Alive(told), Alive()]


async def test_a_notice_that_came_meanwhile_is_told_though_an_older_one_was(session: Session) -> None:
    await session.acquire(order(slot(ANNA, 1)))
    first = await session.notify(ANNA, b"1", forget_events=False)
    second = await session.notify(ANNA, b"2", forget_events=False)
    told = Renewal(1, "w1-1", LEASE, told=((ANNA.digest, first.position),))
    assert await session.renew([told]) == [Alive(((ANNA.digest, second.position),))]
    assert await session.notices(ANNA, first.position) == [(second.position, b"2")]


async def test_positions_rise_also_when_the_clock_was_set_back(session: Session, valkey_server: ValkeyServer) -> None:
    key = f"{PREFIX}{{1}}:u:{ANNA.digest}"
    position = (await session.notify(ANNA, b"0", forget_events=False)).position
    later = int(position.partition("-")[0]) + 3_600_000
    valkey_server.admin.delete(f"{PREFIX}{{1}}:n:{ANNA.digest}")
    valkey_server.admin.hset(key, "pos", f"{later}-7")
    assert (await session.notify(ANNA, b"1", forget_events=False)).position == f"{later}-8"
    valkey_server.admin.hdel(key, "pos")
    assert (await session.notify(ANNA, b"2", forget_events=False)).position == f"{later}-9"
    assert [notice for _, notice in await session.notices(ANNA, f"{later}-7")] == [b"1", b"2"]


async def test_notices_are_bounded_and_kept_for_a_day(session: Session, valkey_server: ValkeyServer) -> None:
    for number in range(70):
        await session.notify(ANNA, b"%d" % number, forget_events=False)
    assert [notice for _, notice in await session.notices(ANNA, "")] == [b"%d" % number for number in range(6, 70)]
    for kind in "nu":
        assert 86_000 < valkey_server.admin.ttl(f"{PREFIX}{{1}}:{kind}:{ANNA.digest}") <= 86_400


async def test_whoever_clears_a_lot_pushes_out_no_revocation(session: Session) -> None:
    for number in range(3):
        await session.notify(ANNA, b"revoked %d" % number, forget_events=True)
    for number in range(100):
        await session.notify(ANNA, b"cleared %d" % number, forget_events=False)
    kept = [notice for _, notice in await session.notices(ANNA, "")]
    assert len(kept) == 64
    assert kept == [b"revoked 2", *(b"cleared %d" % number for number in range(37, 100))]


async def test_a_notice_can_forget_a_users_events(session: Session) -> None:
    before = await session.publish(ANNA, b"1", KEEP)
    await session.notify(ANNA, b"n", forget_events=True)
    assert await session.history(ANNA, 0) == History(None, ())
    after = await session.publish(ANNA, b"2", KEEP)
    assert after.place.sequence == 1
    assert after.place.epoch != before.place.epoch
    assert await session.history(ANNA, 0) == History(after.place, ((1, b"2"),))


async def test_a_connection_that_was_cut_is_made_again_and_said_to_have_been_deaf(
    session: Session, listening: Session, valkey_proxy: TcpProxy
) -> None:
    heard = Heard()
    await listening.listen(heard)
    await listening.subscribe(ANNA)
    await session.acquire(order(slot(ANNA, 1)))
    valkey_proxy.refuse()
    valkey_proxy.cut()
    for number in range(3):
        await session.publish(ANNA, b"missed %d" % number, KEEP)
    valkey_proxy.refuse(False)
    assert await heard.next() == ("deaf",)
    # Both are heard again, and what was missed is in the history.
    await session.publish(ANNA, b"heard", KEEP)
    assert await heard.next() == ("event", ANNA, 4, b"heard")
    await session.notify(ANNA, b"n", forget_events=False)
    assert await heard.next() == ("nudged", 1, ("w1-1",))
    assert [number for number, _ in (await listening.history(ANNA, 0)).events] == [1, 2, 3, 4]


async def test_a_server_that_went_silent_is_left(
    valkey_server: ValkeyServer, valkey_proxy: TcpProxy, library: LibraryName
) -> None:
    client = Client(target_of(url_of(library, valkey_proxy.port)), timeout=0.5)
    topology = OneServer(client)
    listener = Listener(client, Asking(topology), Keys(PREFIX, 64), heartbeat=0.1)
    heard = Heard()
    await listener.listen(heard, 64)
    valkey_proxy.hold("replies")  # the connection stands, and nothing comes
    await asyncio.to_thread(wait_until, lambda: valkey_proxy.accepted > 1, "another connection is tried")
    valkey_proxy.release("replies")
    assert await heard.next() == ("deaf",)
    await listener.aclose()
    await topology.aclose()


async def test_listening_goes_on_trying(session: Session, listening: Session, valkey_proxy: TcpProxy) -> None:
    heard = Heard()
    valkey_proxy.refuse()
    with pytest.raises(ClusterUnavailableError):
        await listening.listen(heard)
    with pytest.raises(ClusterUnavailableError):
        await listening.subscribe(ANNA)
    valkey_proxy.refuse(False)
    assert await heard.next() == ("deaf",)
    assert (await session.publish(ANNA, b"1", KEEP)).workers == 0
    await listening.subscribe(ANNA)
    assert (await session.publish(ANNA, b"2", KEEP)).workers == 1
    assert await heard.next() == ("event", ANNA, 2, b"2")


async def test_a_subscription_that_is_cancelled_is_none(
    session: Session, listening: Session, valkey_proxy: TcpProxy, valkey_server: ValkeyServer
) -> None:
    heard = Heard()
    await listening.listen(heard)
    valkey_proxy.hold("replies")
    waiting = asyncio.create_task(listening.subscribe(ANNA))
    await valkey_proxy.until_held("replies")
    waiting.cancel()
    await asyncio.wait({waiting})
    valkey_proxy.release("replies")
    await listening.subscribe(BERT)
    await session.publish(ANNA, b"1", KEEP)
    await session.publish(BERT, b"2", KEEP)
    assert await heard.next() == ("event", BERT, 1, b"2")
    assert heard.said.empty()
    channel = f"{PREFIX}{{1}}:e:{ANNA.digest}"
    await asyncio.to_thread(
        wait_until, lambda: valkey_server.admin.pubsub_shardnumsub(channel)[0][1] == 0, "the server tells nobody"
    )


async def test_subscriptions_at_once_of_one_and_many(session: Session, listening: Session) -> None:
    heard = Heard()
    await listening.listen(heard)
    users = [user(number) for number in range(300)]
    await asyncio.gather(*(listening.subscribe(each) for each in users for _ in range(2)))
    for each in users:
        assert (await session.publish(each, b"1", KEEP)).workers == 1
    assert {(await heard.next())[1] for _ in users} == set(users)


async def test_a_mistake_of_the_hearer_does_not_end_the_hearing(session: Session, listening: Session) -> None:
    class Clumsy(Heard):
        def event(self, user: UserKey, place: Place, payload: bytes) -> None:
            super().event(user, place, payload)
            raise ZeroDivisionError

    heard, reported = Clumsy(), asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.set())
    await listening.listen(heard)
    await listening.subscribe(ANNA)
    for number in (1, 2):
        await session.publish(ANNA, b"1", KEEP)
        assert await heard.next() == ("event", ANNA, number, b"1")
    async with asyncio.timeout(PATIENCE):
        await reported.wait()
    await release(session)


async def test_a_flood_of_what_nobody_understands_is_a_line_in_the_log_and_hides_no_event(
    session: Session, listening: Session, valkey_server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    await listening.listen(heard)
    await listening.subscribe(ANNA)
    for _ in range(200):
        valkey_server.admin.execute_command("SPUBLISH", f"{PREFIX}{{{ANNA.bucket}}}:c", b"\xff")
        valkey_server.admin.execute_command(
            "SPUBLISH", f"{PREFIX}{{{ANNA.bucket}}}:e:{ANNA.digest}", b"epoch one payload"
        )
    await session.publish(ANNA, b"event", KEEP)
    assert await heard.next() == ("event", ANNA, 1, b"event")
    assert [record.message for record in caplog.records if "understood" in record.message] == [
        "1 messages on channels of this application were not understood"
    ]
