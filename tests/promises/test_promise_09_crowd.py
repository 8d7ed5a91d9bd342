"""Promise 9, with many at once: what is sent while connections drop, come back and stall is at its user's, in order.

The numbers are small here; `tox run -e events` runs it with 500 users and 100,000 events.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from support.crowd import Crowd, ask_driver, run_crowd
from support.raw_websocket import SMALL, RawWebSocket
from support.servers import Server, start_crowd_server

USERS = int(os.environ.get("UCM_TEST_USERS", "50"))
EVENTS = int(os.environ.get("UCM_TEST_EVENTS", "5000"))
EACH = 2
"""Connections of a user."""

HOT = max(2, USERS // 50)
"""Users who get a share of the events to themselves, and bigger ones, so that their stalled connections fill up."""

TASKS, THREADS = 16, 4
APPS = Path(__file__).parent / "apps"

MEGABYTE = 1024 * 1024
STALLED = max(10, USERS // 10)
FLOOD, FLOOD_SIZE = 300, 32_000
"""Events for each of them, and their bytes: several times of what may wait and of what the kernel takes."""

KEPT = MEGABYTE // 4
"""Bytes for each user."""

OF_EACH = MEGABYTE + KEPT + MEGABYTE // 2
"""What may wait for one, what is kept for its user, and what the server has in hand."""

OF_ALL = 32 * MEGABYTE
"""What a server takes besides while it is busy."""


@pytest.fixture(params=["uvicorn", "websockets"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def closing(kind: str) -> Iterator[Server]:
    with start_crowd_server(kind, APPS, {"WHEN_FULL": "close", "KEEP_BYTES": str(4 * MEGABYTE)}) as server:
        yield server


@pytest.fixture(params=["close", "drop_oldest"])
def flooded(kind: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    with start_crowd_server(kind, APPS, {"WHEN_FULL": request.param, "KEEP_BYTES": str(KEPT)}) as server:
        yield server


def memory_of(server: Server, field: str) -> int:
    """Bytes, now (VmRSS) or at most (VmHWM)."""
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{server.pid}/status has no {field}")


def assert_each_sender_in_order(crowd: Crowd) -> None:
    """Each user's events are in one order for all; those of one sender are in the order in which it sent them."""
    by_sender: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for (user, sequence), (by, number) in crowd.said.items():
        by_sender.setdefault((user, by), []).append((sequence, number))
    for sent in by_sender.values():
        assert all(earlier[1] < later[1] for earlier, later in pairwise(sorted(sent)))


@pytest.mark.timeout(600)
def test_what_is_sent_to_a_crowd_that_comes_and_goes_is_all_there_and_nowhere_else(closing: Server) -> None:
    users = [f"user{number}" for number in range(USERS)]
    order = {
        "users": users,
        "events": EVENTS,
        "tasks": TASKS,
        "threads": THREADS,
        "hot": HOT,
        "hot_size": 8000,
    }
    before = memory_of(closing, "VmRSS")
    crowd = asyncio.run(run_crowd(closing, users, EACH, order))
    assert crowd.last is not None
    sent = sum(crowd.last.values())
    assert sent == EVENTS
    assert crowd.counts["events"] + crowd.counts["missed"] == sum(crowd.last.values()) * EACH
    assert_each_sender_in_order(crowd)
    print(f"{closing.kind}: {json.dumps(crowd.counts)}")
    print(f"memory: {before / MEGABYTE:.0f} MB before, {memory_of(closing, 'VmHWM') / MEGABYTE:.0f} MB at most")


@pytest.mark.timeout(600)
def test_what_connections_take_that_do_not_read_is_bounded(flooded: Server) -> None:
    users = [f"stalled{number}" for number in range(STALLED)]
    with ExitStack() as stack:
        for user in users:
            stack.enter_context(RawWebSocket(flooded, user, "/", SMALL))
        before = memory_of(flooded, "VmRSS")
        dropped = asyncio.run(ask_driver(flooded, {"flood": {"users": users, "count": FLOOD, "size": FLOOD_SIZE}}))
        most = memory_of(flooded, "VmHWM") - before
    offered = STALLED * FLOOD * FLOOD_SIZE
    print(
        f"{flooded.kind}: {STALLED} stalled, {offered / MEGABYTE:.0f} MB sent to them, {most / MEGABYTE:.0f} MB taken, "
        f"dropped {dropped}"
    )
    assert dropped.keys() <= {"full", "oldest", "gone"}
    assert sum(dropped.values()) >= STALLED
    assert most < STALLED * OF_EACH + OF_ALL < offered
