"""The same on a store in memory, and what is seen there."""

import asyncio

import pytest

from support.clock import Clock
from support.events import connect
from support.memory_store import MemoryServer
from support.shared_events import TestClear, TestEvents, TestRevocation, revocations, until
from support.waiting import wait_until
from ucm_middleware import ClusterUnavailableError, EgressPolicy

from .conftest import MakeShared

__all__ = ["TestClear", "TestEvents", "TestRevocation"]


class TestInMemory:
    async def test_events_of_anonymous_users_stay_here(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        context, client, _ = connect(manager, None)
        said = await manager.send_event(context.user_id, "message", 1)

        assert (said.delivered, client.data) == (1, [1])
        assert "publish" not in store.commands

    async def test_what_is_held_back_where_it_is_sent_goes_nowhere(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        secret = "s3cr3t-Token-9f8e7d6c5b4a39281706"
        manager = make_shared(egress=EgressPolicy(block=True))
        assert manager.egress is not None
        manager.egress.protect(manager.create_isolated_context("bob"), secret)
        connect(manager, "alice")
        said = await manager.send_event("alice", "message", {"token": secret})

        assert [lost.why for lost in said.dropped] == ["guarded"]
        assert "publish" not in store.commands

    async def test_nothing_in_the_store_says_who_or_what(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        connect(manager, "alice")
        await manager.send_event("alice", "message", "confidential")
        manager.revoke("alice", "confidential")
        kept = repr(store.data.users)

        assert "alice" not in kept
        assert "confidential" not in kept

    def test_a_thread_without_a_loop_sends_too(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager, other = make_shared(), make_shared()
        context = other.create_isolated_context("alice")
        assert manager.post_event("alice", "message", 1).dropped == ()
        wait_until(lambda: "publish" in store.commands, "it is sent")
        context.close()

    async def test_who_comes_back_after_it_stays(self, make_shared: MakeShared, store: MemoryServer) -> None:
        first, second = make_shared(), make_shared()
        old = second.create_isolated_context("alice")
        first.revoke("alice", "stolen")
        new = second.create_isolated_context("alice")
        await until(lambda: not old.is_open, "the old one is closed")
        await asyncio.to_thread(wait_until, lambda: store.commands.count("notices") >= 1, "notices were read")

        assert new.is_open

    async def test_without_the_store_all_that_is_here_is_closed_and_the_others_are_told_later(
        self, make_shared: MakeShared, store: MemoryServer, clock: Clock
    ) -> None:
        first, second = make_shared(), make_shared()
        here, there = first.create_isolated_context("alice"), second.create_isolated_context("alice")
        store.is_down = True
        with pytest.raises(ClusterUnavailableError):
            first.revoke("alice", "stolen")
        assert not here.is_open
        assert there.is_open
        [record] = revocations(first)
        assert record["contexts"] == 1
        store.is_down = False
        clock.advance(5.0)  # it is looked at again
        for manager in (first, second):
            assert manager.cluster is not None
            manager.cluster.thread_wakes()

        await until(lambda: there.lifetime.reason == "revoked", "the other worker is told")

    async def test_who_is_served_again_has_what_was_missed_applied_first(
        self, make_shared: MakeShared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = make_shared(), make_shared()
        assert second.cluster is not None
        old = second.create_isolated_context("alice")
        monkeypatch.setattr(second.cluster.upkeep, "nudged", lambda *_: None)  # and no renewal is due
        first.revoke("alice", "stolen")
        assert old.is_open
        new = second.create_isolated_context("alice")

        assert old.lifetime.reason == "revoked"
        assert new.is_open
