"""Members on one store in memory, without threads: the test takes their turns, on a clock of its own."""

from collections.abc import Iterator

import pytest

from support.clock import Clock
from support.members import Cluster
from support.memory_store import MemoryServer


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
