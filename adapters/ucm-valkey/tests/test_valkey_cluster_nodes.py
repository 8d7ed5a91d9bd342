"""A cluster of three nodes: each bucket on one of them, slots that move, and a replica that takes over."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from signal import SIGKILL

import pytest

from support.valkey import ADMIN, LibraryName, ValkeyServer
from support.valkey_cluster import (
    LEASE,
    PREFIX,
    Heard,
    forget_gone,
    node_id,
    order,
    owner_of,
    release,
    serving,
    session_at,
    slot,
    start_cluster,
    start_replica,
    url_of,
    user,
    wait_until_known,
)
from support.waiting import wait_until
from ucm_middleware.cluster.store import BUCKETS, Alive, Gone, Granted, Keep, Recovering, Refused, Renewal, Session
from ucm_valkey.cluster.faults import StoreError

KEEP = Keep(100, 10_000, 60)
GRANTED = Granted("", None)


@pytest.fixture(scope="module")
def running() -> Iterator[list[ValkeyServer]]:
    with start_cluster() as servers:
        yield servers


@pytest.fixture
def servers(running: list[ValkeyServer]) -> list[ValkeyServer]:
    """Three nodes, empty."""
    for server in running:
        server.admin.flushall()
    return running


def url(library: LibraryName, servers: list[ValkeyServer]) -> str:
    return url_of(library, servers[0].port, rest="?cluster=true")


@pytest.fixture
async def session(servers: list[ValkeyServer], library: LibraryName) -> AsyncIterator[Session]:
    """One that serves; it is told of one node only."""
    made = session_at(url(library, servers))
    await serving(made)
    yield made
    await made.aclose()


async def test_a_cluster_passes_the_inspection(servers: list[ValkeyServer], library: LibraryName) -> None:
    session = session_at(url(library, servers))
    assert await session.inspect() == 0
    assert await session.inspect() == 0
    await session.aclose()


async def test_each_bucket_stands_on_one_node_and_all_nodes_have_some(
    session: Session, servers: list[ValkeyServer]
) -> None:
    people = [user(number, bucket=number) for number in range(BUCKETS)]
    answers = await asyncio.gather(*(session.acquire(order(slot(each, each.bucket + 1))) for each in people))
    assert answers == [GRANTED] * BUCKETS
    assert await session.renew([Renewal(bucket, "w1-1", LEASE) for bucket in range(BUCKETS)]) == [Alive()] * BUCKETS
    assert await session.count() == (BUCKETS, BUCKETS)
    found = {server.port: set(server.admin.scan_iter(f"{PREFIX}*:u:*")) for server in servers}
    assert all(found.values())
    assert sum(map(len, found.values())) == BUCKETS
    await release(session, *(slot(each, each.bucket + 1) for each in people))
    assert await session.count() == (0, 0)
    assert (await session.renew([Renewal(5, "w1-1", LEASE), Renewal(5, "nobody-1", LEASE)])) == [Alive(), Gone()]


async def test_limits_events_and_notices_as_on_one_server(
    session: Session, servers: list[ValkeyServer], library: LibraryName
) -> None:
    other, heard = session_at(url(library, servers)), Heard()
    await other.listen(heard)
    for bucket in range(0, BUCKETS, 7):
        anna = user(bucket, bucket=bucket)
        assert await session.acquire(order(slot(anna, 1), per_user=1)) == GRANTED
        assert await other.acquire(order(slot(anna, 1, "w2-1"), per_user=1)) == Refused("user")
        assert await other.leases_of(anna) == [slot(anna, 1)]
        await other.subscribe(anna)
        published = await session.publish(anna, b"event", KEEP)
        assert (published.place.sequence, published.workers) == (1, 1)
        assert await heard.next() == ("event", anna, 1, b"event")
        assert (await other.history(anna, 0)).events == ((1, b"event"),)
        notified = await session.notify(anna, b"notice", forget_events=True)
        assert await heard.next() == ("nudged", bucket, ("w1-1",))
        assert await other.notices(anna, "") == [(notified.position, b"notice")]
        await other.unsubscribe(anna)
    assert heard.said.empty()
    await other.aclose()


async def test_200_at_once_get_exactly_their_limits(
    session: Session, servers: list[ValkeyServer], library: LibraryName
) -> None:
    sessions = [session, *(session_at(url(library, servers)) for _ in range(3))]
    people = [user(number, bucket=number * 13) for number in range(5)]
    answers = await asyncio.gather(
        *(
            each.acquire(order(slot(people[number % 5], number, f"w{worker}-1"), per_user=7))
            for number in range(1, 51)
            for worker, each in enumerate(sessions)
        )
    )
    assert sum(isinstance(answer, Granted) for answer in answers) == 35
    assert sum(answer == Refused("user") for answer in answers) == 165
    for each in sessions[1:]:
        await each.aclose()


async def test_a_node_that_keeps_silent_keeps_no_other_from_renewing(
    session: Session, servers: list[ValkeyServer], library: LibraryName
) -> None:
    hasty = session_at(url(library, servers), timeout=0.5)
    people = [user(number, bucket=number) for number in range(BUCKETS)]
    await asyncio.gather(*(hasty.acquire(order(slot(each, each.bucket + 1))) for each in people))
    renewals = [Renewal(bucket, "w1-1", LEASE) for bucket in range(BUCKETS)]
    there = {bucket for bucket in range(BUCKETS) if servers[0].admin.keys(f"{PREFIX}{{{bucket}}}:u:*")}
    servers[0].admin.execute_command("CLIENT", "PAUSE", 3000, "ALL")
    found = await hasty.renew(renewals)
    with pytest.raises(StoreError):
        await hasty.renew([renewals[bucket] for bucket in there])
    await asyncio.to_thread(servers[0].admin.ping)  # answered when that is over

    assert found == [None if bucket in there else Alive() for bucket in range(BUCKETS)]
    assert await hasty.renew(renewals) == [Alive()] * BUCKETS
    await hasty.aclose()


def steps_of_a_move(source: ValkeyServer, target: ValkeyServer, bucket: int) -> Iterator[None]:
    """Move a bucket's slot to another node as `valkey-cli --cluster reshard` does, one step after another."""
    at = source.admin.execute_command("CLUSTER KEYSLOT", str(bucket))
    target.admin.execute_command("CLUSTER SETSLOT", at, "IMPORTING", node_id(source))
    source.admin.execute_command("CLUSTER SETSLOT", at, "MIGRATING", node_id(target))
    yield
    keys = sorted(source.admin.execute_command("CLUSTER GETKEYSINSLOT", at, 1000))
    for key in keys:
        source.admin.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 10_000, "AUTH", ADMIN, "KEYS", key)
        yield
    for server in (target, source):
        server.admin.execute_command("CLUSTER SETSLOT", at, "NODE", node_id(target))
    yield


async def test_a_slot_that_moves_never_grants_too_many(
    session: Session, servers: list[ValkeyServer], library: LibraryName
) -> None:
    bucket = 11
    anna = user(1, bucket=bucket)
    other, heard = session_at(url(library, servers), timeout=2), Heard()
    await other.listen(heard)
    await other.subscribe(anna)
    source = owner_of(servers, bucket)
    target = next(server for server in servers if server is not source)
    for number in (1, 2):
        assert await session.acquire(order(slot(anna, number), per_user=2)) == GRANTED
    late = order(slot(anna, 9, "w2-1"), per_user=2)
    answers: list[object] = []
    seen: list[object] = []
    for _ in steps_of_a_move(source, target, bucket):
        # Refused, or it cannot be told at the moment; granted never.
        answers.append((await asyncio.gather(other.acquire(late), return_exceptions=True))[0])
        seen.append((await asyncio.gather(other.leases_of(anna), return_exceptions=True))[0])
    assert {type(answer) for answer in answers} <= {Refused, Recovering, StoreError}
    assert {type(answer) for answer in answers} >= {Recovering}
    # Before the last step all keys are on the other node, and the slot is not its own yet: the old one sends there.
    held = [slot(anna, 1), slot(anna, 2)]
    assert seen[-2] in (held, held[::-1])
    # Another run of a server answers for the bucket now: it recovers, and takes back what was held.
    (answer,) = await session.renew([Renewal(bucket, "w1-1", LEASE)])
    assert isinstance(answer, Recovering)
    assert await session.restore(bucket, "w1-1", LEASE, [slot(anna, 1), slot(anna, 2)])
    assert {each.number for each in await other.leases_of(anna)} == {1, 2}
    # Also the channels have moved, and their hearer knows that it may have missed something.
    assert await heard.next() == ("deaf",)
    channel = f"{PREFIX}{{{bucket}}}:e:{anna.digest}"
    await asyncio.to_thread(
        wait_until, lambda: target.admin.pubsub_shardnumsub(channel)[0][1] == 1, "it is heard on the new node"
    )
    published = await session.publish(anna, b"after", KEEP)
    assert published.workers == 1
    assert await heard.next_but_deaf() == ("event", anna, published.place.sequence, b"after")
    await other.aclose()
    for _ in steps_of_a_move(target, source, bucket):
        pass


async def test_a_replica_that_takes_over_is_found_and_recovers(
    session: Session, servers: list[ValkeyServer], library: LibraryName
) -> None:
    bucket = 3
    anna = user(1, bucket=bucket)
    primary = owner_of(servers, bucket)
    heard = Heard()
    with start_replica(primary) as replica:
        await session.listen(heard)
        await session.subscribe(anna)
        assert await session.acquire(order(slot(anna, 1), per_user=1)) == GRANTED
        await asyncio.to_thread(
            wait_until, lambda: replica.admin.info("replication")["slave_repl_offset"] > 0, "the replica follows"
        )
        primary.admin.execute_command("WAIT", 1, 10_000)
        replica.admin.execute_command("CLUSTER FAILOVER")
        await asyncio.to_thread(
            wait_until, lambda: replica.admin.info("replication")["role"] == "master", "the replica has taken over"
        )
        await asyncio.to_thread(
            wait_until, lambda: primary.admin.info("replication")["role"] == "slave", "the primary follows"
        )
        assert isinstance(await session.acquire(order(slot(anna, 2), per_user=1)), Recovering)
        assert await session.restore(bucket, "w1-1", LEASE, [slot(anna, 1)])
        assert await session.leases_of(anna) == [slot(anna, 1)]
        assert await heard.next() == ("deaf",)
        channel = f"{PREFIX}{{{bucket}}}:e:{anna.digest}"
        await asyncio.to_thread(
            wait_until, lambda: replica.admin.pubsub_shardnumsub(channel)[0][1] == 1, "it is heard on the new primary"
        )
        published = await session.publish(anna, b"after", KEEP)
        assert await heard.next_but_deaf() == ("event", anna, published.place.sequence, b"after")
        # As it was, for the tests that follow.
        await asyncio.to_thread(wait_until_known, replica)
        primary.admin.execute_command("CLUSTER FAILOVER")
        await asyncio.to_thread(
            wait_until, lambda: primary.admin.info("replication")["role"] == "master", "the primary is one again"
        )
        await asyncio.to_thread(
            wait_until, lambda: replica.admin.info("replication")["role"] == "slave", "the replica follows again"
        )
    forget_gone(servers)


async def test_a_node_without_memory_is_told_and_the_others_grant(
    session: Session, servers: list[ValkeyServer]
) -> None:
    there, elsewhere = (
        next(user(1, bucket=bucket) for bucket in range(BUCKETS) if owner_of(servers, bucket) is server)
        for server in servers[:2]
    )
    assert not await session.is_full()
    servers[0].admin.config_set("maxmemory", 1)
    try:
        assert await session.is_full()
        with pytest.raises(StoreError, match="maxmemory"):
            await session.acquire(order(slot(there, 1)))
        assert await session.acquire(order(slot(elsewhere, 1))) == GRANTED
    finally:
        servers[0].admin.config_set("maxmemory", 0)


@pytest.mark.parametrize(("needs_all", "goes_on"), [("yes", False), ("no", True)])
async def test_while_a_node_is_gone_the_others_serve_only_if_the_cluster_need_not_cover_all_keys(
    needs_all: str, goes_on: bool, library: LibraryName
) -> None:
    with start_cluster("--cluster-require-full-coverage", needs_all) as servers:
        session = session_at(url(library, servers))
        await serving(session)
        anna = next(user(1, bucket=bucket) for bucket in range(BUCKETS) if owner_of(servers, bucket) is servers[0])
        assert await session.acquire(order(slot(anna, 1))) == GRANTED
        servers[2].program.stop(SIGKILL)
        for server in servers[:2]:
            await asyncio.to_thread(wait_until_missed, server)
        asked = [session.renew([Renewal(anna.bucket, "w1-1", LEASE)]), session.acquire(order(slot(anna, 2)))]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if goes_on:
            assert answers == [[Alive()], GRANTED]
        else:
            assert [type(answer) for answer in answers] == [StoreError, StoreError]
        await session.aclose()


def wait_until_missed(server: ValkeyServer) -> None:
    """Until a node knows that another one is gone."""
    wait_until(lambda: int(server.admin.execute_command("CLUSTER INFO")["cluster_slots_fail"]) > 0, "it is missed")
