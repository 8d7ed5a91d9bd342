"""Events reach a user's sockets on any worker: in order, with what was missed, and nobody else's worker."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
from websockets.sync.client import ClientConnection

from support.fleet import PREFIX, Fleet, start_fleet
from support.restarts import Restarts
from support.waiting import wait_until
from support.witness import Witness, wait_until_free

COUNT = 100
LEASE = 5.0


@pytest.fixture
def fleet(store: Restarts) -> Iterator[Fleet]:
    with start_fleet(store.port, proxied=False, lease=LEASE) as made:
        yield made


def receive(connection: ClientConnection, count: int) -> list[dict[str, Any]]:
    return [json.loads(connection.recv()) for _ in range(count)]


def subscribers(store: Restarts) -> dict[str, int]:
    """How many sessions listen to each user's events."""
    admin = store.server.admin
    channels = list(admin.execute_command("PUBSUB", "SHARDCHANNELS", f"{PREFIX}*:e:*"))
    counted = admin.execute_command("PUBSUB", "SHARDNUMSUB", *channels) if channels else []
    return {counted[at].decode(): counted[at + 1] for at in range(0, len(counted), 2)}


def send_from_all(fleet: Fleet, user: str, count: int) -> list[list[int]]:
    """Every worker sends at the same time; the sequences that each got."""
    with ThreadPoolExecutor(len(fleet.workers)) as pool:
        sending = [
            pool.submit(worker.tell, f"send?user={user}&by={number}&count={count}")
            for number, worker in enumerate(fleet.workers)
        ]
        return [each.result() for each in sending]


def test_they_reach_the_sockets_in_other_workers_in_one_order(fleet: Fleet, store: Restarts, witness: Witness) -> None:
    with ExitStack() as stack:
        sockets = [stack.enter_context(worker.connect("alice")) for worker in fleet.workers[:2]]
        bob = stack.enter_context(fleet.workers[3].connect("bob"))
        for connection in (*sockets, bob):  # they have joined when they are answered
            connection.send("?")
            connection.recv()
        wait_until(lambda: sorted(subscribers(store).values()) == [1, 2], "two workers listen for alice, one for bob")
        sent = send_from_all(fleet, "alice", COUNT)
        total = COUNT * len(fleet.workers)
        received = [receive(connection, total) for connection in sockets]
        assert received[0] == received[1]
        assert [event["sequence"] for event in received[0]] == list(range(1, total + 1))
        assert {event["user_id"] for event in received[0]} == {"alice"}
        for number, sequences in enumerate(sent):
            assert all(earlier < later for earlier, later in pairwise(sequences))
            own = [event for event in received[0] if event["data"]["by"] == str(number)]
            assert [event["data"]["n"] for event in own] == list(range(COUNT))
            assert [event["sequence"] for event in own] == sequences
        bob.send("?")
        assert json.loads(bob.recv())["type"] == "told"
    wait_until(lambda: not subscribers(store), "nobody listens any more")
    wait_until_free(store.server)
    told = [line for line in witness.lines() if line.command == "spublish" and ":e:" in line.words[1]]
    assert len(told) == total


def test_who_comes_back_to_another_worker_gets_what_it_missed(fleet: Fleet, store: Restarts) -> None:
    first, second, third, _ = fleet.workers
    with first.connect("alice") as connection:
        connection.send("?")
        connection.recv()
        third.tell(f"send?user=alice&by=a&count={COUNT}")
        last = receive(connection, COUNT)[-1]
    third.tell(f"send?user=alice&by=b&count={COUNT}")
    with second.connect("alice", f"?epoch={last['epoch']}&last_sequence={last['sequence']}") as back:
        missed = receive(back, COUNT)
        assert [event["sequence"] for event in missed] == list(range(COUNT + 1, 2 * COUNT + 1))
        assert {event["data"]["by"] for event in missed} == {"b"}
        third.tell("send?user=alice&by=c&count=1")
        (live,) = receive(back, 1)
        assert (live["sequence"], live["data"]["by"]) == (2 * COUNT + 1, "c")
    wait_until_free(store.server)


def test_what_was_said_in_an_epoch_that_the_store_lost_is_told_as_missed(store: Restarts, witness: Witness) -> None:
    with start_fleet(store.port, 2, proxied=False, lease=1.0) as fleet:
        first, second = fleet.workers
        with first.connect("alice") as connection:
            connection.send("?")
            connection.recv()
            second.tell("send?user=alice&by=a&count=5")
            last = receive(connection, 5)[-1]
        witness.kill()
        witness.restart()
        for worker in fleet.workers:
            wait_until(lambda: worker.request("bob").status_code == 200, "the worker serves again")  # noqa: B023
        second.tell("send?user=alice&by=b&count=1")
        with first.connect("alice", f"?epoch={last['epoch']}&last_sequence={last['sequence']}") as back:
            (told,) = receive(back, 1)
            assert told["type"] == "events_missed"
            assert told["epoch"] != last["epoch"]
    wait_until_free(store.server)
