"""One connection that many ask on: pipelines, cancellations, servers that are slow, full or forgetful."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from support.processes import HOST, held_port
from support.tcp_proxy import TcpProxy
from support.valkey import ADMIN, LibraryName, ValkeyServer, start_valkey
from support.valkey_cluster import LEASE, PREFIX, order, release, serving, session_at, slot, url_of, user
from support.waiting import wait_until
from ucm_middleware.cluster.store import Alive, Granted, Keep, Release, Renewal, Session
from ucm_middleware.errors import ClusterUnavailableError
from ucm_valkey.cluster.clients import Client
from ucm_valkey.cluster.lines import Line
from ucm_valkey.cluster.urls import target_of

GRANTED = Granted("", None)
SHORT = 0.2
"""Seconds of a timeout that is to be seen."""


@pytest.fixture
async def session(valkey_server: ValkeyServer, valkey_proxy: TcpProxy, library: LibraryName) -> AsyncIterator[Session]:
    """One that serves, through the proxy."""
    made = session_at(url_of(library, valkey_proxy.port))
    await serving(made)
    await made.acquire(order(slot(user(1), 0)))  # the server knows the script now
    await release(made, slot(user(1), 0))
    yield made
    await made.aclose()


@pytest.fixture
async def hasty(session: Session, valkey_proxy: TcpProxy, library: LibraryName) -> AsyncIterator[Session]:
    """Another, which does not wait for long; it is connected."""
    made = session_at(url_of(library, valkey_proxy.port), timeout=SHORT)
    await made.leases_of(user(1))
    yield made
    await made.aclose()


@pytest.fixture
async def line(valkey_proxy: TcpProxy, library: LibraryName) -> AsyncIterator[Line]:
    """A line by itself."""
    made = Line(Client(target_of(url_of(library, valkey_proxy.port)), 10.0), HOST, valkey_proxy.port)
    yield made
    await made.aclose()


async def test_what_is_asked_while_a_round_trip_is_under_way_goes_with_the_next(
    line: Line, valkey_proxy: TcpProxy
) -> None:
    assert await line.ask(("ECHO", "first")) == b"first"
    before = valkey_proxy.round_trips
    answers = await asyncio.gather(*(line.ask(("ECHO", str(number))) for number in range(200)))
    assert answers == [str(number).encode() for number in range(200)]
    assert valkey_proxy.round_trips - before == 2
    assert valkey_proxy.accepted == 1


async def test_a_caller_that_finds_the_line_idle_starts_no_task(line: Line) -> None:
    await line.ask(("ECHO", "first"))
    tasks = asyncio.all_tasks()
    asking = line.ask(("ECHO", "second"))
    waited_for = asking.send(None)
    assert asyncio.all_tasks() == tasks
    assert waited_for is not None
    await asyncio.wait({waited_for})
    with pytest.raises(StopIteration) as ended:
        asking.send(None)
    assert ended.value.value == b"second"


async def test_more_than_one_pipeline_holds_keeps_its_order(line: Line) -> None:
    answers = await line.ask_all([("ECHO", str(number)) for number in range(1000)])
    assert answers == [str(number).encode() for number in range(1000)]


async def test_large_payloads_between_small_ones(line: Line) -> None:
    words = [bytes([65 + number % 26]) * (300_000 if number % 7 == 0 else 5) for number in range(60)]
    assert await asyncio.gather(*(line.ask(("ECHO", word)) for word in words)) == words
    assert await line.ask(("ECHO", words[0])) == words[0]


@pytest.mark.parametrize("turns", range(12))
async def test_cancellations_at_every_turn_put_nothing_out_of_step(line: Line, turns: int) -> None:
    await line.ask(("ECHO", "first"))
    for leader in range(8):
        tasks = [asyncio.create_task(line.ask(("ECHO", f"{leader} {number}"))) for number in range(8)]
        for _ in range(turns):
            await asyncio.sleep(0)
        gone = [task for number, task in enumerate(tasks) if number in (0, leader)]
        for task in gone:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            assert answer == f"{leader} {number}".encode() or (
                tasks[number] in gone and isinstance(answer, asyncio.CancelledError)
            )
    assert await line.ask(("ECHO", "last")) == b"last"


async def test_a_waiter_that_is_cancelled_while_its_answer_is_on_the_way_breaks_nobody(
    line: Line, valkey_proxy: TcpProxy
) -> None:
    await line.ask(("ECHO", "first"))
    valkey_proxy.hold("replies")
    leader = asyncio.create_task(line.ask(("ECHO", "leader")))
    await valkey_proxy.until_held("replies")
    others = [asyncio.create_task(line.ask(("ECHO", f"{number}"))) for number in range(3)]
    await asyncio.sleep(0)
    leader.cancel()
    others[1].cancel()
    valkey_proxy.release("replies")
    assert await others[0] == b"0"
    assert await others[2] == b"2"
    assert valkey_proxy.accepted == 1


async def test_a_cancelled_connect_leaves_the_others_connected(line: Line, valkey_proxy: TcpProxy) -> None:
    valkey_proxy.hold("requests")
    tasks = [asyncio.create_task(line.ask(("ECHO", f"{number}"))) for number in range(3)]
    await valkey_proxy.until_held("requests")
    tasks[0].cancel()
    valkey_proxy.release("requests")
    assert await asyncio.gather(*tasks[1:]) == [b"1", b"2"]
    assert valkey_proxy.accepted == 1


async def test_an_answer_that_nobody_asked_for_ends_the_connection(
    line: Line, valkey_server: ValkeyServer, valkey_proxy: TcpProxy
) -> None:
    assert await line.ask(("ECHO", "first")) == b"first"
    await line.ask(("SUBSCRIBE", "anything"))
    valkey_server.admin.publish("anything", "for somebody else")
    await asyncio.to_thread(wait_until, lambda: valkey_proxy.open == 0, "the connection is given up")
    assert await line.ask(("ECHO", "second")) == b"second"
    assert valkey_proxy.accepted == 2


async def test_a_script_that_the_server_forgot_is_sent_once_more(session: Session, valkey_server: ValkeyServer) -> None:
    anna = user(1)
    for number in range(1, 4):
        valkey_server.admin.script_flush()
        assert await session.acquire(order(slot(anna, number))) == GRANTED
        valkey_server.admin.script_flush()
        assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Alive()]
    assert len(await session.leases_of(anna)) == 3


async def test_no_answer_in_time_is_an_unknown_outcome_for_all_that_were_sent(
    hasty: Session, valkey_server: ValkeyServer, valkey_proxy: TcpProxy
) -> None:
    anna = user(1)
    valkey_proxy.hold("replies")
    sent = asyncio.create_task(hasty.acquire(order(slot(anna, 1))))
    await valkey_proxy.until_held("replies")
    waiting = asyncio.create_task(hasty.acquire(order(slot(anna, 2))))
    errors = await asyncio.gather(sent, waiting, return_exceptions=True)
    assert [(error.reason, error.is_unknown) for error in errors] == [("timeout", True), ("timeout", False)]  # type: ignore[union-attr]
    valkey_proxy.release("replies")
    # It was done, and no late answer becomes another's.
    assert [each.number for each in await hasty.leases_of(anna)] == [1]
    await release(hasty, slot(anna, 1), fence=True)
    assert await hasty.leases_of(anna) == []


async def test_a_loop_that_was_busy_itself_takes_no_server_for_slow(hasty: Session) -> None:
    asking = asyncio.create_task(hasty.leases_of(user(1)))
    await asyncio.sleep(0)  # it is sent
    asyncio.get_running_loop().call_soon(time.sleep, 2 * SHORT)
    assert await asking == []


async def test_a_server_that_pauses_is_slow_and_then_serves_again(hasty: Session, valkey_server: ValkeyServer) -> None:
    valkey_server.admin.execute_command("CLIENT PAUSE", 600, "ALL")
    with pytest.raises(ClusterUnavailableError) as caught:
        await hasty.acquire(order(slot(user(1), 1)))
    assert caught.value.reason == "timeout"
    valkey_server.admin.ping()  # waits until it is over
    assert await hasty.acquire(order(slot(user(1), 2))) == GRANTED


async def test_a_connection_that_is_cut_is_an_unknown_outcome(session: Session, valkey_proxy: TcpProxy) -> None:
    valkey_proxy.hold("replies")
    sent = asyncio.create_task(session.acquire(order(slot(user(1), 1))))
    await valkey_proxy.until_held("replies")
    waiting = asyncio.create_task(session.acquire(order(slot(user(1), 2))))
    await asyncio.sleep(0)
    valkey_proxy.cut()
    valkey_proxy.release("replies")
    with pytest.raises(ClusterUnavailableError) as caught:
        await sent
    assert (caught.value.reason, caught.value.is_unknown) == ("down", True)
    assert await waiting == GRANTED  # it had not been sent, and goes on a new connection


async def test_a_server_that_is_down_is_told_at_once(library: LibraryName) -> None:
    with held_port() as port:
        session = session_at(url_of(library, port))
        errors: list[Any] = await asyncio.gather(
            *(session.acquire(order(slot(user(number), 1))) for number in range(5)), return_exceptions=True
        )
        assert {(error.reason, error.is_unknown) for error in errors} == {("down", False)}
        await session.aclose()


async def test_an_idle_connection_that_was_lost_is_not_used(line: Line, valkey_proxy: TcpProxy) -> None:
    before = asyncio.all_tasks()
    assert await line.ask(("ECHO", "first")) == b"first"
    valkey_proxy.cut()
    await asyncio.wait(asyncio.all_tasks() - before)  # whoever reads has seen it
    assert await line.ask(("ECHO", "second")) == b"second"


async def test_closing_tells_those_that_wait(session: Session, valkey_proxy: TcpProxy) -> None:
    valkey_proxy.hold("replies")
    waiting = asyncio.create_task(session.leases_of(user(1)))
    await valkey_proxy.until_held("replies")
    await session.aclose()
    with pytest.raises(ClusterUnavailableError):
        await waiting
    valkey_proxy.release("replies")


@pytest.fixture
def full(valkey_server: ValkeyServer) -> Iterator[ValkeyServer]:
    """A server that can be filled, and has memory again afterwards."""
    yield valkey_server
    valkey_server.admin.config_set("maxmemory", 0)


async def test_a_full_server_grants_nothing_and_still_renews_releases_and_revokes(
    session: Session, full: ValkeyServer
) -> None:
    anna = user(1)
    for number in (1, 2):
        await session.acquire(order(slot(anna, number)))
    assert not await session.is_full()
    full.admin.config_set("maxmemory", 1)
    assert await session.is_full()
    for attempt in (session.acquire(order(slot(anna, 3))), session.publish(anna, b"event", Keep(10, 1000, 60))):
        with pytest.raises(ClusterUnavailableError) as caught:
            await attempt
        assert (caught.value.reason, caught.value.is_unknown) == ("memory", False)
    assert await session.renew([Renewal(1, "w1-1", LEASE, touch=(anna,))]) == [Alive()]
    await release(session, slot(anna, 1), fence=True)
    assert [each.number for each in await session.leases_of(anna)] == [2]
    told = await session.notify(anna, b"revoked", forget_events=True)
    assert told.leases == 1
    assert await session.renew([Renewal(1, "w1-1", LEASE)]) == [Alive(((anna.digest, told.position),))]
    assert await session.notices(anna, "") == [(told.position, b"revoked")]
    assert await session.enroll(LEASE) == 0
    # Also what it held when it was full comes back to a server that took over.
    key = f"{PREFIX}{{1}}:engine"
    run, *rest = full.admin.get(key).decode().split()
    full.admin.config_set("maxmemory", 0)
    full.admin.set(key, " ".join(["f" * len(run), *rest]))
    full.admin.config_set("maxmemory", 1)
    await session.renew([Renewal(1, "w1-1", LEASE)])
    assert await session.restore(1, "w1-1", LEASE, [slot(anna, 2)])


async def test_a_replica_takes_no_orders(valkey_server: ValkeyServer, library: LibraryName) -> None:
    options = ("--replicaof", HOST, str(valkey_server.port), "--masterauth", ADMIN)
    with start_valkey(*options) as replica:
        wait_until(lambda: replica.admin.info("replication")["master_link_status"] == "up", "the replica follows")
        session = session_at(url_of(library, replica.port))
        with pytest.raises(ClusterUnavailableError) as caught:
            await session.acquire(order(slot(user(1), 1)))
        assert (caught.value.reason, caught.value.is_unknown) == ("read-only", False)
        await session.aclose()


async def test_many_releases_at_once_are_few_round_trips(session: Session, valkey_proxy: TcpProxy) -> None:
    slots = [slot(user(number), number) for number in range(500)]
    await asyncio.gather(*(session.acquire(order(each)) for each in slots))
    await release(session, slots[0])
    before = valkey_proxy.round_trips
    await session.release([Release(each) for each in slots])
    assert valkey_proxy.round_trips - before <= 2
    assert await session.count() == (0, 0)
