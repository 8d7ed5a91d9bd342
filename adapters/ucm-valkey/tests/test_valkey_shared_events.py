"""Managers that share their users over a real server: what is sent, revoked and cleared in one reaches the others."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.shared_events import TestClear, TestEvents, TestRevocation
from support.valkey import SECRET, LibraryName, ValkeyServer
from support.valkey_cluster import url_of
from ucm_middleware import ClusterPolicy, UserContextManager
from ucm_middleware.testing import closing_contexts

__all__ = ["TestClear", "TestEvents", "TestRevocation"]


@pytest.fixture
def make_shared(valkey_server: ValkeyServer, library: LibraryName) -> Iterator[Callable[..., UserContextManager]]:
    """Managers on the server, which has recovered; their cluster's threads end with the test."""
    made: list[UserContextManager] = []

    def make(**settings: Any) -> UserContextManager:
        policy = ClusterPolicy(url=url_of(library, valkey_server.port), lease=3.0)
        manager = UserContextManager(**{"cluster": policy, "secret": SECRET, "max_contexts_per_user": 2, **settings})
        assert manager.cluster is not None
        manager.cluster.call(manager.cluster.upkeep.settled()).result(30)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        with closing_contexts(manager):
            pass
        if manager.cluster is not None:
            asyncio.run(manager.cluster.stop())
