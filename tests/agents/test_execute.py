"""Running an agent as a user: whose it is, in which context, until when, and what is on record."""

import asyncio
from collections.abc import Awaitable, Mapping
from contextvars import ContextVar
from typing import Any

import pytest

from support.agents import Waiting, always, phases, stateless
from support.asgi import exchange, http_scope, status_of
from support.contexts import MakeManager, running_as
from ucm_middleware import (
    AgentError,
    AgentPolicy,
    AgentRun,
    AgentTimeoutError,
    ConfigurationError,
    ContextClosedError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    LedgerUnavailableError,
    ManagerDrainingError,
    PluginError,
    UserContextManager,
    UserContextMiddleware,
    UserExecutionContext,
    current_context,
    current_run,
    hookimpl,
    managed_user_context,
)
from ucm_middleware.audit import Row
from ucm_middleware.testing import RecordingLedger
from ucm_middleware.types import Receive, Scope, Send

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def whoami(**given: Any) -> tuple[str, Mapping[str, Any]]:
    return current_context().user_id, given


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


class TestWhoRuns:
    async def test_in_a_child_of_the_context_that_asks(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent(prompt: str) -> tuple[str, UserExecutionContext]:
            return prompt, current_context()

        stateless(manager, agent=agent)
        with running_as(manager, "alice") as alice:
            prompt, run = await manager.execute_with_agent("alice", "agent", {"prompt": "hello"})
            assert current_context() is alice
        assert prompt == "hello"
        assert (run.user_id, run.parent_request_id, run.operation_depth) == ("alice", alice.request_id, 1)
        assert not run.is_open
        assert phases(ledger) == [("agent_started", "agent"), ("agent_completed", "agent")]
        started, ended = ledger.select("agent_run")
        assert dict(started.data)["parameters"] == ["prompt"]
        assert ended.seconds is not None
        assert started.context_id == run.context_id

    async def test_in_a_context_of_its_own_for_code_that_runs_in_none(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        stateless(manager, agent=whoami)
        assert await manager.execute_with_agent("alice", "agent", {"x": 1}) == ("alice", {"x": 1})
        assert manager.get_active_contexts() == {}
        assert [record.event for record in ledger.select("closed")] == ["closed", "closed"]

    async def test_another_user_s_run_is_refused(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        stateless(manager, agent=whoami)
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError, match="execute_with_agent"):
            await manager.execute_with_agent("alice", "agent")
        [denied] = ledger.select("denied")
        assert (denied.user_id, dict(denied.data)["action"]) == ("bob", "execute_with_agent")
        assert ledger.select("agent_run") == []

    async def test_no_name_of_an_agent_is_told_to_who_may_not_run_it(self, manager: UserContextManager) -> None:
        with running_as(manager, "bob"), pytest.raises(CrossUserAccessError):
            await manager.execute_with_agent("alice", "no such agent")

    async def test_a_run_across_users_takes_nothing_along(self, manager: UserContextManager) -> None:
        async def agent() -> tuple[str, str]:
            with pytest.raises(CrossUserAccessError):  # the grant is the asker's, and not the run's
                manager.get_context("bob")
            return current_context().user_id, variable.get()

        stateless(manager, agent=agent)
        with running_as(manager, "bob"), manager.privileged(reason="support", users=["alice"]):
            variable.set("bob's")
            assert await manager.execute_with_agent("alice", "agent") == ("alice", "unset")

    async def test_what_is_set_in_a_run_is_not_seen_outside(self, manager: UserContextManager) -> None:
        async def agent() -> str:
            before = variable.get()
            variable.set("the run's")
            return before

        stateless(manager, agent=agent)
        with running_as(manager, "alice"):
            variable.set("the request's")
            assert await manager.execute_with_agent("alice", "agent") == "the request's"
            assert variable.get() == "the request's"

    async def test_a_served_manager_trusts_no_code_outside(self, make_manager: MakeManager) -> None:
        manager = make_manager()
        stateless(manager, agent=whoami)
        manager.serve()
        with pytest.raises(CrossUserAccessError):
            await manager.execute_with_agent("alice", "agent")
        with manager.privileged(reason="nightly job", users=["alice"]):
            assert (await manager.execute_with_agent("alice", "agent"))[0] == "alice"

    async def test_parameters_are_copied(self, manager: UserContextManager) -> None:
        async def agent(names: list[str]) -> None:
            names.append("changed")

        stateless(manager, agent=agent)
        names = ["given"]
        await manager.execute_with_agent("alice", "agent", {"names": names})
        assert names == ["given"]


class TestItsEnd:
    async def test_what_the_agent_raises_goes_its_way_with_a_note(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            raise OSError("the disk is full of secrets")

        stateless(manager, agent=agent)
        with pytest.raises(OSError, match="full of secrets") as raised:
            await manager.execute_with_agent("alice", "agent")
        [note] = raised.value.__notes__
        assert note.endswith("of agent 'agent'")
        assert phases(ledger) == [("agent_started", "agent"), ("agent_failed", "agent", "failed")]
        assert dict(ledger.select("agent_run")[-1].data)["error"] == "OSError"
        assert "secrets" not in repr([tuple(record) for record in ledger.records])

    async def test_one_that_never_ends_is_cut_off_and_the_others_go_on(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        waiting = Waiting()
        manager.register_agent("endless", always(waiting), stateless=True, timeout=0.05)
        stateless(manager, other=whoami)
        endless = asyncio.ensure_future(manager.execute_with_agent("alice", "endless"))
        await waiting.started.acquire()
        assert (await manager.execute_with_agent("bob", "other"))[0] == "bob"
        with pytest.raises(AgentTimeoutError, match=r"agent 'endless': did not end within 0\.05 seconds; .*timeout"):
            await endless
        assert phases(ledger) == [("agent_started", "endless"), ("agent_failed", "endless", "expired")]
        assert manager.get_active_contexts() == {}

    async def test_the_call_s_own_timeout_goes_first(self, make_manager: MakeManager) -> None:
        manager = make_manager(agents=AgentPolicy(timeout=3600.0))
        manager.register_agent("agent", always(Waiting()), stateless=True, timeout=1800.0)
        with pytest.raises(AgentTimeoutError, match=r"0\.02 seconds"):
            await manager.execute_with_agent("alice", "agent", timeout=0.02)

    async def test_the_policy_s_timeout_is_the_last(self, make_manager: MakeManager) -> None:
        manager = make_manager(agents=AgentPolicy(timeout=0.03))
        stateless(manager, agent=Waiting())
        with pytest.raises(AgentTimeoutError, match=r"0\.03 seconds"):
            await manager.execute_with_agent("alice", "agent")

    async def test_a_timeout_of_the_agent_s_own_is_its_error(self, manager: UserContextManager) -> None:
        async def agent() -> None:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()

        stateless(manager, agent=agent)
        with pytest.raises(TimeoutError) as raised:
            await manager.execute_with_agent("alice", "agent")
        assert not isinstance(raised.value, AgentTimeoutError)

    async def test_past_its_deadline_nothing_is_of_use_even_before_anybody_noticed(
        self, manager: UserContextManager
    ) -> None:
        found: list[Exception] = []

        async def agent() -> None:
            context = current_context()
            while context.lifetime.permits_use:  # the loop gets no turn, so no timer fires
                pass
            try:
                current_run().thinking()
            except ContextClosedError as error:
                found.append(error)

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent", timeout=0.05)
        assert len(found) == 1

    async def test_whoever_is_cancelled_cancels_the_run_and_waits_for_its_end(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        journal: list[str] = []
        started, ending, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def agent() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ending.set()
                await may_end.wait()
                journal.append("ended")

        stateless(manager, agent=agent)
        task = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await started.wait()
        task.cancel()
        await ending.wait()
        task.cancel()  # once more, while it waits
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert journal == ["ended"]
        assert phases(ledger)[-1] == ("agent_failed", "agent", "cancelled")
        assert manager.get_active_contexts() == {}

    async def test_a_run_ends_with_the_context_that_it_was_started_in(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        waiting = Waiting()
        stateless(manager, agent=waiting)
        async with managed_user_context(manager.create_isolated_context("alice")):
            forgotten = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
            await waiting.started.acquire()
        with pytest.raises(ContextClosedError):
            await forgotten
        assert phases(ledger)[-1] == ("agent_failed", "agent", "finished")
        assert ledger.records[-1].event == "closed"

    async def test_a_revoked_user_s_runs_are_cut_off(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        waiting = Waiting()
        stateless(manager, agent=waiting)
        hers = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        his = asyncio.ensure_future(manager.execute_with_agent("bob", "agent"))
        await waiting.started.acquire()
        await waiting.started.acquire()
        manager.revoke("alice", "signed out")
        with pytest.raises(ContextClosedError, match="revoked"):
            await hers
        waiting.go_on.set()
        assert await his == "done"

    async def test_one_that_cancels_itself_does_not_cancel_who_waits(self, manager: UserContextManager) -> None:
        async def agent() -> None:
            raise asyncio.CancelledError

        stateless(manager, agent=agent)
        with pytest.raises(AgentError, match="agent 'agent': cancelled itself"):
            await manager.execute_with_agent("alice", "agent")

    async def test_one_cancelled_before_its_first_step_leaves_nothing(
        self, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        manager = make_manager(agents=AgentPolicy(max_runs_per_user=1), ledger=ledger)
        stateless(manager, agent=whoami)
        task = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await asyncio.sleep(0)  # the run is started, and has not had its turn
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert manager.get_active_contexts() == {}
        assert (await manager.execute_with_agent("alice", "agent"))[0] == "alice"

    async def test_a_draining_manager_starts_none(self, manager: UserContextManager) -> None:
        stateless(manager, agent=whoami)
        await manager.drain(0)
        with pytest.raises(ManagerDrainingError):
            await manager.execute_with_agent("alice", "agent")


class TestHowManyAtOnce:
    async def test_a_user_has_so_many_and_others_have_theirs(
        self, make_manager: MakeManager, ledger: RecordingLedger
    ) -> None:
        manager = make_manager(agents=AgentPolicy(max_runs_per_user=2), ledger=ledger)
        waiting = Waiting()
        stateless(manager, agent=waiting, other=whoami)
        runs = [asyncio.ensure_future(manager.execute_with_agent("alice", "agent")) for _ in range(2)]
        for _ in runs:
            await waiting.started.acquire()
        with pytest.raises(ContextLimitError, match=r"limit of 2 runs of agents at once.*agent 'other'") as raised:
            await manager.execute_with_agent("alice", "other")
        assert raised.value.scope == "agent runs"
        [refused] = ledger.select("refused", user="alice")
        assert refused.reason == "limit"
        assert (await manager.execute_with_agent("bob", "other"))[0] == "bob"
        waiting.go_on.set()
        assert await asyncio.gather(*runs) == ["done", "done"]
        assert (await manager.execute_with_agent("alice", "other"))[0] == "alice"

    async def test_one_too_many_is_answered_with_429(self, make_manager: MakeManager) -> None:
        manager = make_manager(agents=AgentPolicy(max_runs_per_user=1))
        waiting = Waiting()
        stateless(manager, agent=waiting)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await manager.execute_with_agent("alice", "agent")
            await answering(scope, receive, send)

        served = UserContextMiddleware(app, manager=manager, identify=lambda _: "alice")
        first = asyncio.ensure_future(exchange(served, http_scope()))
        await waiting.started.acquire()
        assert status_of(await exchange(served, http_scope())) == 429
        waiting.go_on.set()
        assert status_of(await first) == 200

    @pytest.mark.parametrize("failing", ["raises", "expires", "no context"])
    async def test_one_that_did_not_go_well_leaves_its_place(self, make_manager: MakeManager, failing: str) -> None:
        manager = make_manager(agents=AgentPolicy(max_runs_per_user=1), max_contexts_per_user=1)

        async def agent() -> None:
            if failing == "raises":
                raise OSError
            await asyncio.Event().wait()

        stateless(manager, agent=agent, other=whoami)
        with pytest.raises((OSError, TimeoutError, ContextLimitError)):
            if failing == "no context":
                manager.create_isolated_context("alice")
            await manager.execute_with_agent("alice", "agent", timeout=0.02)
        if failing == "no context":
            manager.cleanup_all_contexts()
        assert (await manager.execute_with_agent("alice", "other"))[0] == "alice"

    async def test_those_inside_of_a_run_are_not_counted(self, make_manager: MakeManager) -> None:
        manager = make_manager(agents=AgentPolicy(max_runs_per_user=1))

        async def outer() -> list[Any]:
            return await asyncio.gather(*(manager.execute_with_agent("alice", "inner") for _ in range(3)))

        stateless(manager, outer=outer, inner=whoami)
        assert len(await manager.execute_with_agent("alice", "outer")) == 3


class TestTheTrail:
    async def test_what_cannot_be_recorded_does_not_run(self, make_manager: MakeManager) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "agent_run":
                    raise LedgerUnavailableError("the disk is full")
                super().append(row)

        manager = make_manager(ledger=Full())
        ran: list[bool] = []

        async def agent() -> None:
            ran.append(True)

        stateless(manager, agent=agent)
        with pytest.raises(LedgerUnavailableError):
            await manager.execute_with_agent("alice", "agent")
        assert ran == []
        assert manager.get_active_contexts() == {}


class TestPlugins:
    async def test_the_first_that_knows_the_agent_runs_it(self, make_manager: MakeManager) -> None:
        class Other:
            @hookimpl
            def ucm_run_agent(self) -> None:
                return None

        class Words:
            @hookimpl
            def ucm_run_agent(
                self, run: AgentRun, agent: object, parameters: Mapping[str, Any]
            ) -> Awaitable[object] | None:
                return self.say(run, agent, parameters) if isinstance(agent, str) else None

            async def say(self, run: AgentRun, word: str, parameters: Mapping[str, Any]) -> str:
                assert current_run() is run
                assert current_context() is run.context
                return f"{word} {parameters['name']}"

        manager = make_manager(plugins=[Other(), Words()])
        manager.register_agent("greet", always("hello"), stateless=True)
        stateless(manager, own=whoami)
        assert await manager.execute_with_agent("alice", "greet", {"name": "you"}) == "hello you"
        assert (await manager.execute_with_agent("alice", "own"))[0] == "alice"

    async def test_one_that_gives_no_awaitable_is_named(self, make_manager: MakeManager) -> None:
        class Wrong:
            @hookimpl
            def ucm_run_agent(self) -> int:
                return 7

            @hookimpl
            def ucm_stream_agent(self) -> int:
                return 7

        manager = make_manager(plugins=[Wrong()])
        stateless(manager, agent=whoami)
        with pytest.raises(PluginError, match="ucm_run_agent returned a int; it returns an awaitable"):
            await manager.execute_with_agent("alice", "agent")
        with pytest.raises(PluginError, match="ucm_stream_agent returned a int; it returns an asynchronous iterable"):
            async with manager.stream_with_agent("alice", "agent") as stream:
                await anext(stream)


def test_there_is_no_run_outside_of_one(manager: UserContextManager) -> None:
    with pytest.raises(ContextNotFoundError, match="no run of an agent here"):
        current_run()
    with running_as(manager, "alice"), pytest.raises(ContextNotFoundError):
        current_run()


@pytest.mark.parametrize(
    "settings", [{"max_runs_per_user": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"queue_items": 0}]
)
def test_a_policy_that_breaks_a_rule_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        AgentPolicy(**settings)
