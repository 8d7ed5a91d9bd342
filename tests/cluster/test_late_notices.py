"""Revocations that meet a worker in the middle of something."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.clock import Clock
from support.events import connect
from support.members import SECRET
from support.memory_store import MemoryServer, MemoryStore
from support.shared_events import MakeShared, until, until_data, until_heard
from ucm_middleware import UserContextManager
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.links import Links
from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.store import Granted, Order, Session
from ucm_middleware.errors import ClusterUnavailableError, ContextClosedError

ROTATED = b"another secret, of those that have rotated by now"


def member_of(manager: UserContextManager) -> Member:
    assert manager.cluster is not None
    return manager.cluster


def links_of(manager: UserContextManager) -> Links:
    assert manager._links is not None
    return manager._links


def store_of(manager: UserContextManager) -> MemoryStore:
    store = member_of(manager).store
    assert isinstance(store, MemoryStore)
    return store


async def looked(*managers: UserContextManager) -> None:
    """Wait until each has looked at the store."""
    for manager in managers:
        member = member_of(manager)
        await asyncio.wrap_future(member.call(member.upkeep.settled()))


async def session_of(manager: UserContextManager) -> Session:
    """That of the cluster's thread."""
    member = member_of(manager)

    async def session() -> Session:
        return member.session

    return await asyncio.wrap_future(member.call(session()))


async def until_in_time(condition: Callable[[], bool], what: str, clock: Clock, *managers: UserContextManager) -> None:
    """Let time pass, a second at each look, until it is so."""

    def is_so() -> bool:
        if condition():
            return True
        clock.advance(1.0)
        for manager in managers:
            member_of(manager).thread_wakes()
        return False

    await until(is_so, what)


async def test_who_revokes_before_the_store_was_looked_at_in_a_rotation(make_shared: MakeShared) -> None:
    old = make_shared(secret=SECRET)
    await looked(old)
    there = old.create_isolated_context("alice")
    new = make_shared(secret=ROTATED, previous_secrets=[SECRET])
    assert await asyncio.to_thread(new.revoke, "alice", "stolen") == 1

    await until(lambda: there.lifetime.reason == "revoked", "it is closed")


async def test_a_grant_whose_answer_comes_after_the_notice(
    make_shared: MakeShared, store: MemoryServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_shared(), make_shared()
    await looked(first, second)
    second.create_isolated_context("alice")  # so that the tenancy stands
    session = member_of(second).session_here()
    acquire = session.acquire
    is_granted, go_on = asyncio.Event(), asyncio.Event()

    async def slow(order: Order) -> Any:
        answer = await acquire(order)
        assert isinstance(answer, Granted)
        is_granted.set()
        await go_on.wait()
        return answer

    monkeypatch.setattr(session, "acquire", slow)
    assert second._leasing is not None
    taking = asyncio.ensure_future(second._leasing.take("alice", is_connection=False))
    await is_granted.wait()
    assert await asyncio.to_thread(first.revoke, "alice", "stolen") == 2

    def is_told() -> bool:
        return not any(one.noticed for one in store.data.tenancies.values()) and not second.get_active_contexts()

    await until_in_time(is_told, "the worker needs no more telling", clock, first, second)
    go_on.set()
    lease = await taking
    reason: str | None
    try:
        context = second._open_for_connection("alice", None, None, False, lease)
    except ContextClosedError as error:  # so quickly that it was not even registered
        reason = error.reason
    else:
        await until_in_time(lambda: not context.is_open, "it is closed", clock, first, second)
        reason = context.lifetime.reason

    assert reason == "revoked"


async def test_a_store_that_comes_back_new_hears_of_a_notice_before_those_that_it_is_for(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    first, second = make_shared(), make_shared()
    await looked(first, second)
    there = second.create_isolated_context("alice")
    store_of(first).is_cut = store_of(second).is_cut = True
    with pytest.raises(ClusterUnavailableError):
        await asyncio.to_thread(first.revoke, "alice", "stolen")
    store.wipe()
    store_of(first).is_cut = False
    await until_in_time(lambda: links_of(first).notices.unsent == 0, "it is left", clock, first)
    store_of(second).is_cut = False
    await until_in_time(lambda: not there.is_open, "it is closed", clock, second)

    assert there.lifetime.reason == "revoked"


async def test_who_came_back_is_not_signed_out_by_a_failover(
    make_shared: MakeShared, store: MemoryServer, clock: Clock
) -> None:
    first, second = make_shared(), make_shared()
    await looked(first, second)
    await asyncio.to_thread(first.revoke, "alice", "stolen")
    clock.advance(member_of(first).policy.lease + 1)
    context, client, _ = connect(second, "alice")
    await until_heard(second)
    lease = context.lifetime.lease
    assert isinstance(lease, Lease)
    before = lease.tenancy.id
    store.fail_over(0)
    await until_in_time(lambda: lease.tenancy.id != before, "it is put back", clock, first, second)
    await until_in_time(lambda: not lease.is_restored, "notices were read", clock, first, second)
    await until_in_time(lambda: member_of(first).state == "up", "the store has recovered", clock, first, second)
    await first.send_event("alice", "message", 1)
    await until_data(client, [1])
    assert context.is_open

    await asyncio.to_thread(first.revoke, "alice", "again")
    await until_in_time(lambda: not context.is_open, "it is closed", clock, first, second)
    assert context.lifetime.reason == "revoked"


async def test_a_revocation_on_the_clusters_own_thread_waits_for_nothing(make_shared: MakeShared) -> None:
    first, second = make_shared(), make_shared()
    await looked(first, second)
    here, there = first.create_isolated_context("alice"), second.create_isolated_context("alice")

    async def revoke() -> int:
        return first.revoke("alice", "a plugin says so")

    assert await asyncio.wrap_future(member_of(first).call(revoke())) == 1
    assert not here.is_open
    await until(lambda: there.lifetime.reason == "revoked", "it reaches the other worker")


async def test_events_that_wait_when_the_thread_ends_are_told_so(
    make_shared: MakeShared, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_shared()
    await looked(manager)
    manager.create_isolated_context("alice")
    begun = threading.Event()

    async def never(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(await session_of(manager), "publish", never)
    sending = [asyncio.ensure_future(manager.send_event("alice", "message", number)) for number in range(3)]
    await until(begun.is_set, "one is under way")
    await member_of(manager).stop()
    outcomes = await asyncio.wait_for(asyncio.gather(*sending, return_exceptions=True), 10)

    assert [type(one) for one in outcomes] == [ClusterUnavailableError] * 3


async def test_who_is_granted_more_after_a_notice_is_no_reason_to_pass_over_what_was_about_to_live(
    make_shared: MakeShared, clock: Clock
) -> None:
    first, second = make_shared(), make_shared()
    await looked(first, second)
    assert second._leasing is not None
    older = await second._leasing.take("alice", is_connection=False)
    assert await asyncio.to_thread(first.revoke, "alice", "stolen") == 1
    newer = await second._leasing.take("alice", is_connection=False)
    contexts = []
    with contextlib.suppress(ContextClosedError):  # so quickly that it was not even registered
        contexts.append(second._open_for_connection("alice", None, None, False, older))
    stays = second._open_for_connection("alice", None, None, False, newer)
    await until_in_time(lambda: not any(one.is_open for one in contexts), "it is closed", clock, first, second)

    assert stays.is_open
