"""Managers that share their users: each way to open and close a context takes and gives back a lease."""

import asyncio
import gc
import io
import os
import weakref
from typing import Any

import pytest

from support.clock import Clock
from support.members import LEASE, SECRET
from support.memory_store import MemoryServer
from support.waiting import wait_until
from ucm_middleware import (
    ClusterPolicy,
    ClusterUnavailableError,
    ConfigurationError,
    ContextClosedError,
    ContextLimitError,
    UserContextManager,
    UserExecutionContext,
    managed_user_context,
)
from ucm_middleware.cluster.leases import Lease
from ucm_middleware.cluster.member import Member

from .conftest import MakeShared, until_given_back


def member_of(manager: UserContextManager) -> Member:
    assert manager.cluster is not None
    return manager.cluster


def lease_of(context: UserExecutionContext) -> Lease:
    lease = context.lifetime.lease
    assert isinstance(lease, Lease)
    return lease


def slots(store: MemoryServer, manager: UserContextManager, user_id: str = "alice") -> int:
    return len(store.live_of(member_of(manager).key_of(user_id)))


def anonymous(manager: UserContextManager) -> UserExecutionContext:
    return manager._open_for_connection(None, None, None, False)  # pyright: ignore[reportPrivateUsage]


def turn_by_hand(manager: UserContextManager) -> None:
    """Have the cluster's thread look at the clock, and wait until it has."""
    upkeep = member_of(manager).upkeep
    member_of(manager).call(upkeep.turn()).result(10)


class TestOneLimit:
    """Two managers, as two workers would be."""

    def test_created_contexts_count_together(self, make_shared: MakeShared, store: MemoryServer) -> None:
        first, second = make_shared(), make_shared()
        context = first.create_isolated_context("alice")
        second.create_isolated_context("alice")

        with pytest.raises(ContextLimitError):
            first.create_isolated_context("alice")

        context.close()
        first.create_isolated_context("alice")
        assert slots(store, first) == 2

    def test_a_context_that_closes_frees_its_place_for_the_other(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        first, second = make_shared(max_contexts_per_user=1), make_shared(max_contexts_per_user=1)
        first.create_isolated_context("alice").close()
        until_given_back(store)

        assert second.create_isolated_context("alice").is_open

    def test_a_refusal_is_on_record(self, make_shared: MakeShared) -> None:
        first, second = make_shared(max_contexts_per_user=1), make_shared(max_contexts_per_user=1)
        first.create_isolated_context("alice")
        with pytest.raises(ContextLimitError):
            second.create_isolated_context("alice")

        trail = second.get_audit_trail("alice")
        assert trail is not None
        assert [(event["event"], event["reason"]) for event in trail["events"]] == [("refused", "limit")]

    def test_late_binding_takes_a_lease_first(self, make_shared: MakeShared, store: MemoryServer) -> None:
        first, second = make_shared(max_contexts_per_user=1), make_shared(max_contexts_per_user=1)
        bound, refused = anonymous(first), anonymous(second)
        assert store.live() == {}

        bound.bind("alice")
        with pytest.raises(ContextLimitError):
            refused.bind("alice")

        assert lease_of(bound).is_held
        assert refused.is_anonymous
        assert slots(store, first) == 1
        refused.close()
        bound.close()
        until_given_back(store)

    def test_a_context_put_under_a_key_takes_one(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        context = UserExecutionContext(user_id="alice", thread_id="thread-1", run_id="run-1")
        manager.set_context("alice", context)
        manager.set_context("another-key", context)

        assert slots(store, manager) == 1
        manager.clear_context("alice")
        until_given_back(store)

    def test_replacing_at_the_limit_takes_over_the_lease(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared(max_contexts_per_user=1)
        first, second = (
            UserExecutionContext(user_id="alice", thread_id=f"thread-{n}", run_id=f"run-{n}") for n in (1, 2)
        )
        manager.set_context("alice", first)
        lease = lease_of(first)
        store.commands.clear()

        manager.set_context("alice", second)

        assert not first.is_open
        assert lease_of(second) is lease
        assert lease.context is second
        assert "acquire" not in store.commands
        assert slots(store, manager) == 1
        second.close()
        until_given_back(store)

    def test_the_same_request_again_takes_over_the_lease(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared(max_contexts_per_user=1)
        first = manager.create_isolated_context("alice", "request-1")

        second = manager.create_isolated_context("alice", "request-1")

        assert not first.is_open
        assert second.is_open
        assert slots(store, manager) == 1

    def test_a_refused_replacement_leaves_the_lease_where_it_was(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        manager = make_shared()
        first = manager.create_isolated_context("alice", "request-1")
        closed = UserExecutionContext(user_id="alice", thread_id="thread-1", run_id="run-1", request_id="request-1")
        lease = lease_of(first)

        def close_meanwhile() -> bool:
            closed.close()
            return True

        closed.verify_isolation = close_meanwhile  # type: ignore[method-assign]

        with pytest.raises(ContextClosedError):
            manager.set_context(("alice", "request-1"), closed)

        assert first.is_open
        assert lease_of(first) is lease
        assert lease.is_held
        assert slots(store, manager) == 1

    def test_an_expired_context_makes_room(self, make_shared: MakeShared, store: MemoryServer, clock: Clock) -> None:
        manager = make_shared(max_contexts_per_user=1)
        expired = manager.create_isolated_context("alice", ttl_seconds=1)
        clock.advance(2)

        fresh = manager.create_isolated_context("alice")

        assert fresh.is_open
        assert not expired.is_open
        assert slots(store, manager) == 1

    def test_children_take_none(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        context = manager.create_isolated_context("alice")

        context.create_child_context("work").create_child_context("more")

        assert slots(store, manager) == 1

    async def test_an_agents_run_has_a_lease(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()

        async def agent() -> int:
            return slots(store, manager)

        manager.register_agent("counting", lambda context: agent)

        assert await manager.execute_with_agent("alice", "counting") == 1
        await asyncio.to_thread(until_given_back, store)


class TestLost:
    """What lives under a lease that is lost."""

    def lose(self, manager: UserContextManager, clock: Clock) -> None:
        clock.advance(2 * LEASE)

    async def test_nothing_in_it_can_be_used(self, make_shared: MakeShared, clock: Clock) -> None:
        manager = make_shared()
        context = await asyncio.to_thread(manager.create_isolated_context, "alice")
        child = context.create_child_context("work")
        handle = context.own(io.StringIO())
        clock.advance(2 * LEASE)

        for use in (lambda: context.agent_context, lambda: child.agent_context, lambda: handle.getvalue()):
            with pytest.raises(ContextClosedError) as lost:
                use()
            assert lost.value.reason == "lost"

    async def test_it_is_closed_and_its_handler_cut_off(self, make_shared: MakeShared, clock: Clock) -> None:
        manager = make_shared()
        context = await asyncio.to_thread(manager.create_isolated_context, "alice")
        begun = asyncio.Event()

        async def work() -> None:
            async with managed_user_context(context):
                begun.set()
                await asyncio.Event().wait()

        working = asyncio.ensure_future(work())
        await begun.wait()
        clock.advance(2 * LEASE)
        await asyncio.to_thread(turn_by_hand, manager)

        with pytest.raises(ContextClosedError) as lost:
            await working
        assert lost.value.reason == "lost"
        trail = manager.get_audit_trail("alice")
        assert trail is not None
        [closed] = [event for event in trail["events"] if event["event"] == "closed"]
        assert closed["reason"] == "lost"
        assert closed["outcome"] == "failed"

    async def test_it_ends_as_lost_also_where_its_end_comes_first(self, make_shared: MakeShared, clock: Clock) -> None:
        """Whoever has its place since may have changed the same: a transaction must not be committed."""
        manager = make_shared()
        seen: list[BaseException | None] = []

        class Transaction:
            def __enter__(self) -> None:
                """It begins."""

            def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
                seen.append(error)

        async with managed_user_context(await asyncio.to_thread(manager.create_isolated_context, "alice")) as context:
            context.enter_context(Transaction())
            clock.advance(2 * LEASE)

        [error] = seen
        assert isinstance(error, ContextClosedError)
        assert error.reason == "lost"

    async def test_it_ends_as_lost_also_by_the_error_that_its_code_got(
        self, make_shared: MakeShared, clock: Clock
    ) -> None:
        manager = make_shared()
        context = await asyncio.to_thread(manager.create_isolated_context, "alice")
        with pytest.raises(ContextClosedError):
            async with managed_user_context(context):
                clock.advance(2 * LEASE)
                _ = context.agent_context
        assert context.lifetime.reason == "lost"

    def test_it_does_not_end_the_short_way(self, make_shared: MakeShared, clock: Clock) -> None:
        context = make_shared().create_isolated_context("alice")
        clock.advance(2 * LEASE)
        assert not context.end("finished")
        context.close("finished")
        assert context.lifetime.reason == "lost"

    def test_it_is_counted(self, make_shared: MakeShared, clock: Clock) -> None:
        manager = make_shared()
        manager.create_isolated_context("alice")
        clock.advance(2 * LEASE)
        turn_by_hand(manager)

        figures = member_of(manager).figures()
        assert (figures.held, figures.lost) == (0, 1)


class TestViews:
    """What can be seen of a cluster."""

    def test_active_contexts_of_all_workers(self, make_shared: MakeShared) -> None:
        first, second = make_shared(), make_shared()
        context = first.create_isolated_context("alice")
        second.create_isolated_context("alice")
        second.create_isolated_context("bob")

        shown = first.get_active_contexts(cluster=True)

        assert sorted((one["user_id"], one["is_here"]) for one in shown.values()) == [
            ("alice", False),
            ("alice", True),
        ]
        assert len({one["worker"] for one in shown.values()}) == 2
        assert context.is_open

    def test_the_clusters_own_thread_does_not_wait_for_itself(self, make_shared: MakeShared) -> None:
        manager = make_shared()

        async def look() -> None:
            manager.get_active_contexts(cluster=True)

        with pytest.raises(ConfigurationError, match="own thread"):
            member_of(manager).call(look()).result(10)

    async def test_from_inside_a_context_that_users_only(self, make_shared: MakeShared) -> None:
        manager = make_shared(guard="closed")
        manager.create_isolated_context("bob")
        async with managed_user_context(manager.create_isolated_context("alice")):
            shown = manager.get_active_contexts(cluster=True)

        assert [one["user_id"] for one in shown.values()] == ["alice"]

    def test_without_a_cluster_there_is_none_to_ask(self) -> None:
        with pytest.raises(ConfigurationError, match="UCM_CLUSTER_URL"):
            UserContextManager().get_active_contexts(cluster=True)

    def test_health_says_how_it_stands(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        manager.create_isolated_context("alice")
        assert manager.health().cluster == "up"
        assert manager.is_healthy()

        store.is_down = True
        with pytest.raises(ClusterUnavailableError):
            manager.create_isolated_context("alice")
        wait_until(lambda: manager.health().cluster == "down", "it is found out")

        assert not manager.is_healthy()
        assert [
            (record["state"], record["outcome"], record.get("reason"))
            for record in manager.get_system_trail()
            if record["event"] == "cluster"
        ] == [("up", "ok", None), ("down", "failed", "down")]

    def test_a_worker_that_carries_on_is_healthy(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared("local")
        store.is_down = True

        assert manager.create_isolated_context("alice").is_open
        assert manager.health().cluster == "local"
        assert manager.is_healthy()

    def test_a_manager_alone_has_no_cluster(self) -> None:
        manager = UserContextManager()

        assert manager.cluster is None
        assert manager.health().cluster is None
        assert manager.is_healthy()


class TestEnds:
    """Draining, forks, and owners that are gone."""

    async def test_what_is_still_open_when_the_places_are_given_back_is_lost(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        manager = make_shared()
        context = await asyncio.to_thread(manager.create_isolated_context, "alice")

        await member_of(manager).stop()

        assert store.live() == {}
        with pytest.raises(ContextClosedError) as lost:
            context.require_usable()
        assert lost.value.reason == "lost"

    async def test_a_drain_gives_everything_back_and_ends_the_thread(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        manager = make_shared()
        await asyncio.to_thread(manager.create_isolated_context, "alice")
        thread = member_of(manager).thread

        await manager.drain(0)

        assert store.live() == {}
        assert store.sessions == []
        assert thread.ended.done()

    async def test_who_drains_keeps_the_lease_that_it_answers_under(
        self, make_shared: MakeShared, store: MemoryServer
    ) -> None:
        manager = make_shared()
        context = await asyncio.to_thread(manager.create_isolated_context, "alice")
        thread = member_of(manager).thread

        async with managed_user_context(context):
            assert await manager.drain(0) == 0
            context.require_usable()
            assert not thread.ended.done()
        await manager.drain(0)

        assert store.live() == {}
        assert thread.ended.done()

    def test_it_may_serve_again_after_that(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared(guard="open")
        asyncio.run(manager.drain(0))
        manager.serve()

        manager.create_isolated_context("alice")

        assert slots(store, manager) == 1

    @pytest.mark.ucm_leaks("the context is dropped with its manager")
    def test_the_thread_does_not_keep_a_manager_alive(self, make_shared: MakeShared, store: MemoryServer) -> None:
        policy = ClusterPolicy(url="memory://shared")
        manager = UserContextManager(cluster=policy, secret=SECRET)
        manager.create_isolated_context("alice")
        thread, gone = member_of(manager).thread, weakref.ref(manager)

        del manager
        wait_until(lambda: gc.collect() >= 0 and gone() is None, "the manager is gone")

        thread.ended.result(10)
        assert store.live() == {}

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_child_is_another_worker(self, make_shared: MakeShared, store: MemoryServer) -> None:
        manager = make_shared()
        manager.create_isolated_context("alice")
        member = member_of(manager)
        parent, reading = member.book.worker, os.pipe()
        child = os.fork()
        if child == 0:
            found = [member.book.worker != parent, len(member.book) == 0, member.state == "starting"]
            found.append(manager.create_isolated_context("bob").is_open)  # on the child's copy of the store
            os.write(reading[1], repr(all(found)).encode())
            os._exit(0)
        os.close(reading[1])
        with os.fdopen(reading[0]) as answer:
            assert answer.read() == "True"
        os.waitpid(child, 0)
        assert member.book.worker == parent
        assert slots(store, manager) == 1


class TestSettings:
    """From a setting to a store."""

    @pytest.mark.parametrize(
        ("cluster", "message"),
        [
            ("memory", "must be text such as"),
            ("carrier-pigeon://loft", "serves URLs that begin with carrier-pigeon"),
            (ClusterPolicy(), "UCM_CLUSTER_URL is not set"),
            (7, "a ClusterPolicy or a URL"),
        ],
    )
    def test_what_cannot_be_served_is_refused(self, store: MemoryServer, cluster: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            UserContextManager(cluster=cluster)

    def test_the_variable_alone_is_enough(self, store: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCM_CLUSTER_URL", "memory://shared")

        assert UserContextManager().cluster is not None
        assert UserContextManager(cluster=ClusterPolicy(when_unavailable="local")).cluster is not None

    def test_production_needs_the_secret(self, store: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCM_ENVIRONMENT", "production")

        with pytest.raises(ConfigurationError, match="UCM_SECRET"):
            UserContextManager(cluster="memory://shared")

    def test_an_adapter_that_cannot_be_imported_says_so(self, memory_scheme: Any) -> None:
        memory_scheme.install(
            "ucm-broken-store",
            "import no_such_module_at_all",
            entry_points={"broken": "ucm_broken_store:open_store"},
            group="ucm_middleware.cluster",
        )

        with pytest.raises(ConfigurationError, match="no_such_module_at_all"):
            UserContextManager(cluster="broken://")
