"""Members on one store in memory: bare ones, whose turns a test takes on a clock of its own, and those of managers."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import Clock
from support.distributions import Shelf
from support.members import SECRET, Cluster
from support.memory_cluster import SERVERS
from support.memory_store import MemoryServer
from ucm_middleware import ClusterPolicy, UserContextManager
from ucm_middleware.testing import closing_contexts
from ucm_middleware.testing.waiting import wait_until

MakeShared = Callable[..., UserContextManager]
"""Makes managers that share their users."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> MemoryServer:
    return MemoryServer(clock)


@pytest.fixture
def cluster(server: MemoryServer, clock: Clock) -> Iterator[Cluster]:
    cluster = Cluster(server, clock)
    yield cluster
    cluster.close()


@pytest.fixture
def memory_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """An installed adapter that serves ``memory://``."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    shelf = Shelf(folder)
    shelf.install(
        "ucm-memory-store",
        "from support.memory_cluster import open_store",
        entry_points={"memory": "ucm_memory_store:open_store"},
        group="ucm_middleware.cluster",
    )
    monkeypatch.setitem(sys.modules, "ucm_memory_store", None)  # as another test may have left one
    monkeypatch.delitem(sys.modules, "ucm_memory_store")
    return shelf


@pytest.fixture
def store(memory_scheme: Shelf, clock: Clock) -> Iterator[MemoryServer]:
    """The server behind ``memory://shared``, which has seen every bucket long ago."""
    SERVERS["shared"] = server = MemoryServer(clock)
    server.enroll(1.0)
    clock.advance(3600)
    yield server
    del SERVERS["shared"]


@pytest.fixture
def make_shared(store: MemoryServer, clock: Clock) -> Iterator[MakeShared]:
    """Managers on that store, with settings of the test's own; their cluster's threads end with the test."""
    made: list[UserContextManager] = []

    def make(when_unavailable: Any = "closed", **settings: Any) -> UserContextManager:
        policy = ClusterPolicy(url="memory://shared", when_unavailable=when_unavailable)
        manager = UserContextManager(
            **{"cluster": policy, "secret": SECRET, "clock": clock, "max_contexts_per_user": 2, **settings}
        )
        made.append(manager)
        return manager

    yield make
    store.is_down = False
    store.let_go()
    for manager in made:
        with closing_contexts(manager):
            pass
        if manager.cluster is not None:
            asyncio.run(manager.cluster.stop())


def until_given_back(store: MemoryServer) -> None:
    """Wait until no lease is live."""
    wait_until(lambda: store.live() == {}, "all leases are given back")
