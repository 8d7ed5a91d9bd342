"""A server that is new to a bucket: restarted, emptied or failed over. Nothing is granted for a lease, what is held
comes back meanwhile, and afterwards it is too late.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from support.processes import HOST, held_port
from support.tcp_proxy import TcpProxy, start_tcp_proxy
from support.valkey import ADMIN, LibraryName, ValkeyServer, start_valkey
from support.valkey_cluster import LEASE, PREFIX, order, release, serving, session_at, slot, url_of, user
from support.waiting import wait_until
from ucm_middleware.cluster.store import Alive, Gone, Granted, Keep, Recovering, Refused, Renewal, Session
from ucm_middleware.errors import ClusterUnavailableError

GRANTED = Granted("", None)
ANNA = user(1)


@pytest.fixture
def proxy(valkey_server: ValkeyServer) -> Iterator[TcpProxy]:
    """In front of whichever server is the store now."""
    with start_tcp_proxy(HOST, valkey_server.port) as made:
        yield made


@pytest.fixture
async def session(proxy: TcpProxy, library: LibraryName) -> AsyncIterator[Session]:
    """One that serves, and follows the proxy."""
    made = session_at(url_of(library, proxy.port))
    await serving(made)
    yield made
    await made.aclose()


def change_to(proxy: TcpProxy, server: ValkeyServer) -> None:
    proxy.lead_to(server.port)
    proxy.cut()


async def until_answered(session: Session, lease: float) -> float:
    """The first answer after the connection was cut."""
    with contextlib.suppress(ClusterUnavailableError):  # it may not have been seen yet that it was cut
        return await session.enroll(lease)
    return await session.enroll(lease)


async def test_a_restarted_server_that_is_empty_recovers_for_one_lease(session: Session, proxy: TcpProxy) -> None:
    assert await session.acquire(order(slot(ANNA, 1), per_user=1)) == GRANTED
    with start_valkey() as empty:
        change_to(proxy, empty)
        assert LEASE - 1 < await until_answered(session, LEASE) <= LEASE
        (answer,) = await session.renew([Renewal(1, "w1-1", LEASE)])
        assert isinstance(answer, Recovering)
        assert isinstance(await session.acquire(order(slot(ANNA, 2, "w2-1"), per_user=1)), Recovering)
        assert await session.restore(1, "w1-1", LEASE, [slot(ANNA, 1)])
        assert await session.leases_of(ANNA) == [slot(ANNA, 1)]
        # Put back once, it is only renewed; what was not put back still recovers.
        assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Alive()]
        (other,) = await session.renew([Renewal(1, "w3-1", LEASE)])
        assert isinstance(other, Recovering)
        end_recovery(empty, 1)
        assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Alive()]
        assert await session.acquire(order(slot(ANNA, 2, "w2-1"), per_user=1)) == Refused("user")
        await session.aclose()


def end_recovery(server: ValkeyServer, bucket: int) -> None:
    """As if its time were over: what the server remembers of its beginning is moved back."""
    key = f"{PREFIX}{{{bucket}}}:engine"
    run, since, rest, longest, till = server.admin.get(key).decode().split()
    server.admin.set(key, f"{run} {int(since) - int(rest)} {rest} {longest} {till}")


async def test_who_restores_too_late_has_lost(session: Session, valkey_server: ValkeyServer) -> None:
    await session.acquire(order(slot(ANNA, 1), per_user=1))
    valkey_server.admin.flushall()
    assert isinstance((await session.renew([Renewal(1, "w1-1", LEASE)]))[0], Recovering)
    end_recovery(valkey_server, 1)
    assert not await session.restore(1, "w1-1", LEASE, [slot(ANNA, 1)])
    assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Gone()]
    assert await session.acquire(order(slot(ANNA, 2, "w2-1"), per_user=1)) == GRANTED


async def test_a_recovery_ends_by_itself(session: Session, valkey_server: ValkeyServer) -> None:
    valkey_server.admin.flushall()
    before = time.monotonic()
    answer = await session.acquire(order(slot(ANNA, 1), lease=1))
    assert isinstance(answer, Recovering)
    while isinstance(answer, Recovering):
        await asyncio.sleep(answer.seconds)
        answer = await session.acquire(order(slot(ANNA, 1), lease=1))
    assert answer == GRANTED
    assert time.monotonic() - before >= 0.99


async def test_a_replica_that_took_over_recovers_though_it_has_all_data(session: Session, proxy: TcpProxy) -> None:
    await session.acquire(order(slot(ANNA, 1), per_user=1))
    await session.publish(ANNA, b"before", Keep(10, 1000, 60))
    primary = proxy_target(proxy)
    with start_valkey("--replicaof", HOST, str(primary), "--masterauth", ADMIN) as replica:
        wait_until(lambda: replica.admin.exists(f"{PREFIX}{{1}}:t:w1-1") == 1, "the replica has what the primary has")
        replica.admin.execute_command("REPLICAOF NO ONE")
        change_to(proxy, replica)
        assert await until_answered(session, LEASE) > LEASE - 1
        assert isinstance(await session.acquire(order(slot(ANNA, 2), per_user=1)), Recovering)
        assert isinstance((await session.renew([Renewal(1, "w1-1", LEASE)]))[0], Recovering)
        assert await session.restore(1, "w1-1", LEASE, [slot(ANNA, 1)])
        end_recovery(replica, 1)
        assert await session.acquire(order(slot(ANNA, 2), per_user=1)) == Refused("user")
        # Events that the replica never got had sequences too: these must not be given again under that epoch.
        before = await session.history(ANNA, 0)
        after = await session.publish(ANNA, b"after", Keep(10, 1000, 60))
        assert before.newest is not None
        assert after.place.epoch != before.newest.epoch
        assert (await session.history(ANNA, 0)).events == ((1, b"after"),)
        await session.aclose()


def proxy_target(proxy: TcpProxy) -> int:
    return proxy.target[1]


async def test_several_sessions_agree_on_a_recovery(valkey_server: ValkeyServer, library: LibraryName) -> None:
    one, other = (session_at(url_of(library, valkey_server.port)) for _ in range(2))
    first = await one.enroll(LEASE)
    assert 0 < await other.enroll(LEASE) <= first
    end_recovery(valkey_server, 1)
    assert await one.acquire(order(slot(ANNA, 1))) == GRANTED
    assert await other.acquire(order(slot(ANNA, 2, "w2-1"))) == GRANTED
    assert isinstance(await other.acquire(order(slot(user(2), 3, "w2-2"))), Recovering)  # another bucket
    for each in (one, other):
        await each.aclose()


async def test_a_recovery_outlasts_the_longest_lease_of_all_workers(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    session = session_at(url_of(library, valkey_server.port))
    assert await session.enroll(2) <= 2
    # A worker with a longer lease turns up before it ends.
    assert 50 < await session.enroll(60) <= 60
    assert 50 < await session.enroll(2) <= 60
    key = f"{PREFIX}{{1}}:engine"
    for bucket in range(64):
        end_recovery(valkey_server, bucket)
    assert await session.enroll(60) == 0
    # The run before knew of leases of 60 seconds: one that has its data waits as long, whoever comes first.
    run, *rest = valkey_server.admin.get(key).decode().split()
    valkey_server.admin.set(key, " ".join(["f" * len(run), *rest]))
    answer = await session.acquire(order(slot(ANNA, 1), lease=2))
    assert isinstance(answer, Recovering)
    assert 50 < answer.seconds <= 60
    await session.aclose()


async def test_long_leases_that_nobody_has_any_more_are_forgotten(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    session = session_at(url_of(library, valkey_server.port))
    await session.enroll(3600)
    key = f"{PREFIX}{{1}}:engine"
    end_recovery(valkey_server, 1)
    run, since, rest, longest, till = valkey_server.admin.get(key).decode().split()
    assert longest == "3600000"
    valkey_server.admin.set(key, f"{run} {since} {rest} {longest} {int(till) - 3_601_000}")
    assert await session.acquire(order(slot(ANNA, 1), lease=2)) == GRANTED
    assert await session.renew([Renewal(1, "w1-1", 2)]) == [Alive()]
    assert valkey_server.admin.get(key).decode().split()[2:4] == ["0", "2000"]
    await session.aclose()


async def test_a_clock_that_was_set_back_does_not_draw_a_recovery_out(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    session = session_at(url_of(library, valkey_server.port))
    await session.enroll(LEASE)
    key = f"{PREFIX}{{1}}:engine"
    run, since, rest, longest, till = valkey_server.admin.get(key).decode().split()
    hour = 3_600_000
    valkey_server.admin.set(key, f"{run} {int(since) + hour} {rest} {longest} {int(till) + hour}")
    answer = await session.acquire(order(slot(ANNA, 1)))
    assert isinstance(answer, Recovering)
    assert answer.seconds <= LEASE
    await session.aclose()


async def test_a_server_restarted_on_its_port_is_found_again(library: LibraryName) -> None:
    with held_port() as port:
        session = session_at(url_of(library, port))
        with start_valkey(port=port):
            await serving(session)
            assert await session.acquire(order(slot(ANNA, 1))) == GRANTED
        with pytest.raises(ClusterUnavailableError, match="down"):
            await session.acquire(order(slot(ANNA, 2)))
        with start_valkey(port=port):
            assert isinstance(await session.acquire(order(slot(ANNA, 2))), Recovering)
            assert await session.restore(1, "w1-1", LEASE, [slot(ANNA, 1)])
            await release(session, slot(ANNA, 1))
        await session.aclose()


async def test_a_recovering_bucket_takes_back_many_leases(session: Session, valkey_server: ValkeyServer) -> None:
    held = [slot(user(number, bucket=7), number, is_connection=number % 2 == 0) for number in range(700)]
    valkey_server.admin.flushall()
    assert isinstance((await session.renew([Renewal(7, "w1-1", LEASE)]))[0], Recovering)
    assert await session.restore(7, "w1-1", LEASE, held)
    assert await session.count() == (700, 700)
    assert await session.leases_of(held[4].user) == [held[4]]
    assert await session.restore(7, "w1-1", LEASE, [])


async def test_who_is_restored_is_told_of_what_was_noticed_before(
    session: Session, valkey_server: ValkeyServer
) -> None:
    bob = user(2)
    await session.acquire(order(slot(ANNA, 1)))
    valkey_server.admin.flushall()
    noticed = await session.notify(ANNA, b"sealed", forget_events=True)
    assert noticed.leases == 0
    assert await session.restore(1, "w1-2", LEASE, [slot(ANNA, 1, "w1-2"), slot(bob, 2, "w1-2")])
    end_recovery(valkey_server, 1)

    assert await session.renew([Renewal(1, "w1-2", LEASE)]) == [Alive(((ANNA.digest, noticed.position),))]


async def test_a_server_that_is_back_without_what_another_was_told_meanwhile_is_not_seen(
    session: Session, proxy: TcpProxy
) -> None:
    """Two servers that take turns behind one address, neither having the other's data: what the README warns of."""
    assert await session.acquire(order(slot(ANNA, 1))) == GRANTED
    first = proxy_target(proxy)
    with start_valkey() as other:
        change_to(proxy, other)
        assert await until_answered(session, LEASE) > LEASE - 1
        assert isinstance(await session.acquire(order(slot(ANNA, 2))), Recovering)
        revoked = await session.notify(ANNA, b"revoked", forget_events=True)
        assert [at for at, _ in await session.notices(ANNA, "")] == [revoked.position]
        proxy.lead_to(first)
        proxy.cut()
        assert await until_answered(session, LEASE) == 0
        assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Alive()]
        assert await session.notices(ANNA, "") == []
