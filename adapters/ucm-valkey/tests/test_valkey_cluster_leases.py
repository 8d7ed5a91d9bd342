"""Leases on a real server: limits that hold at once and exactly, tenancies that end, and orders that come too late."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.tcp_proxy import TcpProxy
from support.valkey import LibraryName, ValkeyServer
from support.valkey_cluster import LEASE, PREFIX, order, release, serving, session_at, slot, url_of, user
from support.waiting import PATIENCE, wait_until
from ucm_middleware.cluster.store import (
    Alive,
    Gone,
    Granted,
    Late,
    Recovering,
    Refused,
    Release,
    Renewal,
    Session,
    UserKey,
)

GRANTED = Granted("", None)


@pytest.fixture
async def session(valkey_server: ValkeyServer, library: LibraryName) -> AsyncIterator[Session]:
    """One on an empty server that serves."""
    made = session_at(url_of(library, valkey_server.port))
    await serving(made)
    yield made
    await made.aclose()


async def numbers(session: Session, of: UserKey) -> set[int]:
    return {each.number for each in await session.leases_of(of)}


async def test_a_user_has_as_many_leases_as_its_limit(session: Session) -> None:
    anna, bert = user(1), user(2)
    for number in range(1, 4):
        assert await session.acquire(order(slot(anna, number), per_user=3)) == GRANTED
    assert await session.acquire(order(slot(anna, 4), per_user=3)) == Refused("user")
    assert await session.acquire(order(slot(bert, 5), per_user=3)) == GRANTED
    await release(session, slot(anna, 2))
    assert await session.acquire(order(slot(anna, 6), per_user=3)) == GRANTED
    assert await numbers(session, anna) == {1, 3, 6}
    assert await session.count() == (4, 2)


async def test_connections_have_a_limit_of_their_own(session: Session) -> None:
    anna = user(1)

    async def attempt(number: int, *, is_connection: bool) -> object:
        return await session.acquire(order(slot(anna, number, is_connection=is_connection), per_user=4, connections=2))

    assert await attempt(1, is_connection=True) == GRANTED
    assert await attempt(2, is_connection=True) == GRANTED
    assert await attempt(3, is_connection=True) == Refused("connections")
    assert await attempt(4, is_connection=False) == GRANTED
    assert await attempt(5, is_connection=False) == GRANTED
    assert await attempt(6, is_connection=False) == Refused("user")
    assert sorted(each.is_connection for each in await session.leases_of(anna)) == [False, False, True, True]


async def test_the_same_order_twice_takes_one_slot(session: Session) -> None:
    anna = user(1)
    for _ in range(3):
        assert await session.acquire(order(slot(anna, 1, is_connection=True), per_user=1, connections=1)) == GRANTED
    assert await numbers(session, anna) == {1}
    assert await session.acquire(order(slot(anna, 2), per_user=1)) == Refused("user")


def test_200_at_once_from_four_loops_get_exactly_their_limits(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    users = [user(number) for number in range(5)]
    url = url_of(library, valkey_server.port)
    granted: list[UserKey] = []
    together = threading.Barrier(4)

    async def crowd(worker: int) -> None:
        session = session_at(url)
        try:
            await serving(session)
            together.wait(PATIENCE)  # this loop has nothing else to do
            orders = [order(slot(users[number % 5], number, f"w{worker}-1"), per_user=7) for number in range(1, 51)]
            answers = await asyncio.gather(*(session.acquire(each) for each in orders))
            granted.extend(
                each.slot.user for each, answer in zip(orders, answers, strict=True) if isinstance(answer, Granted)
            )
            assert {type(answer) for answer in answers} <= {Granted, Refused}
        finally:
            await session.aclose()

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(asyncio.run, crowd(worker)) for worker in range(4)]
    for job in jobs:
        job.result()
    assert {each: granted.count(each) for each in users} == dict.fromkeys(users, 7)


async def test_what_a_worker_held_is_free_when_its_lease_ends(session: Session, valkey_server: ValkeyServer) -> None:
    anna = user(1)
    short = order(slot(anna, 1, "dead-1"), per_user=1, lease=0.3)
    assert await session.acquire(short) == GRANTED
    assert await session.acquire(order(slot(anna, 2), per_user=1)) == Refused("user")
    key = f"{PREFIX}{{1}}:t:dead-1"
    wait_until(lambda: not valkey_server.admin.exists(key), "the tenancy has expired")
    assert await numbers(session, anna) == set()
    assert await session.count() == (0, 0)
    assert await session.acquire(order(slot(anna, 2), per_user=1)) == GRANTED
    # What is void was cleaned away on the occasion.
    assert set(valkey_server.admin.hkeys(f"{PREFIX}{{1}}:u:{anna.digest}")) == {b"l:w1-1.2"}


async def test_a_renewal_keeps_a_tenancy_and_all_under_it(session: Session, valkey_server: ValkeyServer) -> None:
    anna = user(1)
    await session.acquire(order(slot(anna, 1), lease=5))
    assert await session.renew([Renewal(1, "w1-1", 60)]) == [Alive()]
    assert valkey_server.admin.pttl(f"{PREFIX}{{1}}:t:w1-1") > 30_000


async def test_a_tenancy_that_is_gone_stays_gone(session: Session, valkey_server: ValkeyServer) -> None:
    anna = user(1)
    await session.acquire(order(slot(anna, 1), lease=0.3))
    wait_until(lambda: not valkey_server.admin.exists(f"{PREFIX}{{1}}:t:w1-1"), "the tenancy has expired")
    assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Gone()]
    assert await session.acquire(order(slot(anna, 2), begins=False)) == Gone()
    assert not await session.restore(1, "w1-1", LEASE, [slot(anna, 1)])
    await release(session, slot(anna, 1), fence=True)
    assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Gone()]


async def test_leases_of_a_tenancy_that_ended_do_not_come_back_with_its_name(
    session: Session, valkey_server: ValkeyServer
) -> None:
    anna = user(1)
    await session.acquire(order(slot(anna, 1), lease=0.3))
    wait_until(lambda: not valkey_server.admin.exists(f"{PREFIX}{{1}}:t:w1-1"), "the tenancy has expired")
    assert await session.acquire(order(slot(anna, 2))) == GRANTED
    assert await numbers(session, anna) == {2}


async def test_renewals_are_answered_in_order_by_one_command(
    session: Session, valkey_server: ValkeyServer, valkey_proxy: TcpProxy, library: LibraryName
) -> None:
    held = [user(number, bucket=number) for number in range(64)]
    for number, each in enumerate(held):
        if number % 2:
            await session.acquire(order(slot(each, number)))
    proxied = session_at(url_of(library, valkey_proxy.port))
    await proxied.enroll(0.05)
    before, commands = valkey_proxy.round_trips, calls(valkey_server)
    answers = await proxied.renew([Renewal(number, "w1-1", LEASE, touch=(held[number],)) for number in range(64)])
    assert answers == [Alive() if number % 2 else Gone() for number in range(64)]
    after = calls(valkey_server)
    assert valkey_proxy.round_trips - before <= 2  # the second for a script that this server did not know yet
    assert after.get("cmdstat_evalsha", 0) + after.get("cmdstat_eval", 0) - sum(
        commands.get(name, 0) for name in ("cmdstat_evalsha", "cmdstat_eval")
    ) in (1, 2)
    before = valkey_proxy.round_trips
    await proxied.renew([Renewal(number, "w1-1", LEASE) for number in range(64)])
    assert valkey_proxy.round_trips - before == 1
    await proxied.aclose()


def calls(server: ValkeyServer) -> dict[str, int]:
    return {name: about["calls"] for name, about in server.admin.info("commandstats").items()}


async def test_more_keys_than_one_script_takes_are_renewed_all_the_same(session: Session) -> None:
    held = [user(number, bucket=number % 64) for number in range(700)]
    for number, each in enumerate(held, 1):
        assert await session.acquire(order(slot(each, number))) == GRANTED
    renewals = [Renewal(bucket, "w1-1", LEASE, touch=tuple(held[bucket::64])) for bucket in range(64)]
    assert await session.renew(renewals) == [Alive()] * 64
    await session.release([Release(slot(each, number)) for number, each in enumerate(held, 1)])
    assert await session.count() == (0, 0)


async def test_touching_lengthens_the_life_of_what_is_kept_of_a_user(
    session: Session, valkey_server: ValkeyServer
) -> None:
    anna = user(1)
    key = f"{PREFIX}{{1}}:u:{anna.digest}"
    await session.acquire(order(slot(anna, 1)))
    assert 0 < valkey_server.admin.ttl(key) <= 3600
    valkey_server.admin.expire(key, 100)
    await session.renew([Renewal(1, "w1-1", LEASE)])
    assert valkey_server.admin.ttl(key) <= 100
    await session.renew([Renewal(1, "w1-1", LEASE, touch=(anna,))])
    assert valkey_server.admin.ttl(key) > 3000


async def test_an_order_that_was_given_up_does_nothing_when_it_comes(
    session: Session, valkey_proxy: TcpProxy, library: LibraryName
) -> None:
    anna, bert = user(1), user(1 + 64)  # of one bucket
    slow = session_at(url_of(library, valkey_proxy.port))
    await slow.enroll(0.05)
    # Of a tenancy that stands, and of one that would begin with it.
    await session.acquire(order(slot(bert, 1)))
    for tenancy in ("w1-1", "w2-1"):
        valkey_proxy.hold("requests")
        late = asyncio.create_task(slow.acquire(order(slot(anna, 5, tenancy))))
        await valkey_proxy.until_held("requests")
        await release(session, slot(anna, 5, tenancy), fence=True)
        valkey_proxy.release("requests")
        assert await late == Late()
        assert await numbers(session, anna) == set()
        assert await session.acquire(order(slot(anna, 6, tenancy))) == GRANTED  # a number above the fence
        await release(session, slot(anna, 6, tenancy))
    await slow.aclose()


async def test_a_fence_never_goes_down(session: Session) -> None:
    anna = user(1)
    await session.acquire(order(slot(anna, 1)))
    await release(session, slot(anna, 9), fence=True)
    await release(session, slot(anna, 3), fence=True)
    assert await session.acquire(order(slot(anna, 9))) == Late()
    assert await session.acquire(order(slot(anna, 10))) == GRANTED


async def test_a_fence_for_a_tenancy_that_has_not_begun_starts_none(session: Session) -> None:
    await release(session, slot(user(1), 5, "w9-1"), fence=True)
    assert await session.renew([Renewal(1, "w9-1", LEASE)]) == [Gone()]
    assert await session.acquire(order(slot(user(1), 6, "w9-1"), begins=False)) == Gone()


async def test_what_is_not_there_is_passed_over(session: Session) -> None:
    await release(session, slot(user(1), 1), slot(user(2), 2))
    await session.release([])
    assert await session.renew([]) == []
    assert await session.leases_of(user(1)) == []


async def test_an_empty_server_grants_nothing_for_a_lease(valkey_server: ValkeyServer, library: LibraryName) -> None:
    session = session_at(url_of(library, valkey_server.port))
    anna = user(1)
    answer = await session.acquire(order(slot(anna, 1), lease=LEASE))
    assert isinstance(answer, Recovering)
    assert LEASE - 1 < answer.seconds <= LEASE
    again = await session.acquire(order(slot(anna, 1), lease=LEASE))
    assert isinstance(again, Recovering)
    assert again.seconds <= answer.seconds
    assert await session.leases_of(anna) == []
    await session.aclose()
