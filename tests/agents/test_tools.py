"""Tools of a run: what is told of their calls, what they may hold, and threads that outlive the run."""

import asyncio
import inspect
import threading
from typing import Any

import pytest

from support.agents import Blocking, always, astray, phases, stateless
from support.contexts import MakeManager, running_as
from support.events import connect, settled
from support.waiting import wait_until
from ucm_middleware import (
    AgentTimeoutError,
    ContextClosedError,
    CrossUserAccessError,
    EventPolicy,
    HandleRevokedError,
    InvalidEventError,
    LedgerUnavailableError,
    UserContextManager,
    agent_run,
    create_isolated_execution_context,
    current_context,
    current_run,
    managed_user_context,
    revoke_handle,
)
from ucm_middleware.audit import Row
from ucm_middleware.testing import RecordingLedger


class Session:
    """A database's, as an application would bring it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def execute(self, statement: str) -> str:
        self.asked.append(statement)
        return statement


class TestWhatIsTold:
    async def test_each_step_comes_over_the_user_s_connections_in_order(self, manager: UserContextManager) -> None:
        async def agent() -> None:
            run = current_run()
            run.thinking("it must be in the index")
            with run.tool("look_up", "call_7"):
                run.emit("progress", {"percent": 50})
            run.thinking()
            with pytest.raises(OSError, match="gone"), run.tool("read"):
                raise OSError("gone")

        stateless(manager, agent=agent)
        _, hers, _ = connect(manager, "alice")
        _, his, _ = connect(manager, "bob")
        await manager.execute_with_agent("alice", "agent")
        await settled()
        told = [(one["type"], one["data"]) for one in hers.envelopes]
        for _, data in told:
            if "seconds" in data:
                assert data.pop("seconds") >= 0
        parent = told[0][1].pop("parent_request_id")
        assert parent is not None
        call, read = {"tool": "look_up", "call_id": "call_7", "call": 1}, {"tool": "read", "call_id": None, "call": 2}
        assert told == [
            ("agent_started", {"agent": "agent", "depth": 1}),
            ("agent_thinking", {"agent": "agent", "text": "it must be in the index"}),
            ("tool_executing", {"agent": "agent", **call}),
            ("progress", {"percent": 50}),
            ("tool_completed", {"agent": "agent", **call}),
            ("agent_thinking", {"agent": "agent"}),
            ("tool_executing", {"agent": "agent", **read}),
            ("tool_completed", {"agent": "agent", **read, "error": "OSError", "reason": "failed"}),
            ("agent_completed", {"agent": "agent"}),
        ]
        assert len({one["request_id"] for one in hers.envelopes}) == 1  # that of the run
        assert his.envelopes == []

    async def test_and_stands_in_the_trail_without_what_was_thought(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            run = current_run()
            run.thinking("a secret")
            with run.tool("look_up"):
                run.emit("note", "a secret")

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert phases(ledger) == [
            ("agent_started", "agent"),
            ("agent_thinking", "agent"),
            ("tool_executing", "agent", "look_up"),
            ("tool_completed", "agent", "look_up"),
            ("agent_completed", "agent"),
        ]
        [sent] = ledger.select("event_sent")
        assert (sent.user_id, dict(sent.data)["type"]) == ("alice", "note")
        assert "a secret" not in repr([tuple(record) for record in ledger.records])

    async def test_an_event_that_cannot_be_serialised_names_the_agent(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            current_run().emit("note", {"value": object()})

        stateless(manager, agent=agent)
        with pytest.raises(InvalidEventError, match=r"data\['value'\]: is a object.*\(in an event of agent 'agent'\)"):
            await manager.execute_with_agent("alice", "agent")
        assert phases(ledger)[-1] == ("agent_failed", "agent", "failed")
        assert ledger.select("event_sent") == []

    async def test_a_call_ends_once_and_at_the_latest_with_the_run(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            run = current_run()
            call = run.tool("twice")
            call.end()
            call.end(OSError())
            run.tool("forgotten")

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert phases(ledger)[1:] == [
            ("tool_executing", "agent", "twice"),
            ("tool_completed", "agent", "twice"),
            ("tool_executing", "agent", "forgotten"),
            ("tool_completed", "agent", "forgotten", "finished"),
            ("agent_completed", "agent"),
        ]

    async def test_a_tool_that_cannot_be_recorded_is_not_called(self, make_manager: MakeManager) -> None:
        class Full(RecordingLedger):
            def append(self, row: Row) -> None:
                if row[0] == "agent_run" and dict(row[11])["phase"] == "tool_executing":
                    raise LedgerUnavailableError("the disk is full")
                super().append(row)

        manager = make_manager(ledger=Full())
        called: list[bool] = []

        async def agent() -> None:
            with current_run().tool("look_up"):
                called.append(True)

        stateless(manager, agent=agent)
        with pytest.raises(LedgerUnavailableError):
            await manager.execute_with_agent("alice", "agent")
        assert called == []

    @pytest.mark.parametrize("text", ["x" * 100_000, "\x00" * 100_000, "\U0001f600" * 100_000, "half a pair: \ud83d"])
    async def test_no_thought_is_too_much_for_an_event(
        self, make_manager: MakeManager, ledger: RecordingLedger, text: str
    ) -> None:
        async def agent() -> None:
            current_run().thinking(text)

        manager = make_manager(ledger=ledger, events=EventPolicy(max_size=4096))
        stateless(manager, agent=agent)
        _, hers, _ = connect(manager, "a" * 128)
        await manager.execute_with_agent("a" * 128, "agent")
        await settled()
        [thought] = [one["data"]["text"] for one in hers.envelopes if one["type"] == "agent_thinking"]
        assert thought[:12] == text[:12]
        assert phases(ledger, "a" * 128)[-1] == ("agent_completed", "agent")

    async def test_a_name_as_long_as_an_event_may_be_does_not_hide_the_end(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            for spare in range(0, 800, 40):
                with current_run().tool("x" * (EventPolicy().max_size - spare)):
                    pass

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        told = [phase[0] for phase in phases(ledger)]
        assert told.count("tool_executing") == told.count("tool_completed") == 20

    async def test_what_a_model_made_up_is_bounded_on_record(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def agent() -> None:
            with current_run().tool("x" * 5000, "y" * 5000):
                pass

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert max(len(str(value)) for record in ledger.records for _, value in record.data) < 1500


class TestWrappedFunctions:
    async def test_of_both_kinds_are_told_and_keep_their_signature(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        async def look_up(word: str, *, times: int = 1) -> str:
            """Look a word up."""
            await asyncio.sleep(0)
            return word * times

        def add(a: int, b: int) -> tuple[int, str]:
            return a + b, current_context().user_id

        async def agent() -> list[Any]:
            run = current_run()
            wrapped, adding = run.wrap_tool(look_up), run.wrap_tool(add, "plus")
            assert inspect.signature(wrapped) == inspect.signature(look_up)
            assert wrapped.__doc__ == "Look a word up."
            assert inspect.iscoroutinefunction(wrapped)
            assert not inspect.iscoroutinefunction(adding)
            return [await wrapped("a", times=2), await asyncio.to_thread(adding, 1, 2)]

        stateless(manager, agent=agent)
        assert await manager.execute_with_agent("alice", "agent") == ["aa", (3, "alice")]
        assert [phase[:3] for phase in phases(ledger)][1:-1] == [
            ("tool_executing", "agent", "look_up"),
            ("tool_completed", "agent", "look_up"),
            ("tool_executing", "agent", "plus"),
            ("tool_completed", "agent", "plus"),
        ]

    async def test_an_error_goes_its_way(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        def fails() -> None:
            raise OSError("broken")

        async def agent() -> None:
            current_run().wrap_tool(fails)()

        stateless(manager, agent=agent)
        with pytest.raises(OSError, match="broken"):
            await manager.execute_with_agent("alice", "agent")
        assert ("tool_completed", "agent", "fails", "failed") in phases(ledger)


class TestInAnotherUsersContext:
    async def test_nothing_of_a_run_is_of_use(self, manager: UserContextManager, ledger: RecordingLedger) -> None:
        async def agent() -> None:
            run = current_run()
            with astray(manager, "bob"):
                for use in (run.thinking, lambda: run.tool("look_up"), lambda: run.emit("note"), run.wrap_tool(print)):
                    with pytest.raises(CrossUserAccessError):
                        use()

        stateless(manager, agent=agent)
        await manager.execute_with_agent("alice", "agent")
        assert phases(ledger) == [("agent_started", "agent"), ("agent_completed", "agent")]
        assert {record.user_id for record in ledger.select("denied")} == {"bob"}


class TestHandles:
    async def test_the_session_of_a_run_ends_with_it_and_not_with_its_handle_s_owner(
        self, manager: UserContextManager
    ) -> None:
        kept: list[Any] = []

        async def agent() -> str:
            kept.append(current_context().db_session)
            assert isinstance(kept[0], Session)
            return str(kept[0].execute("select 1"))

        stateless(manager, agent=agent)
        session = Session()
        context = manager.create_isolated_context("alice", db_session=session)
        with managed_user_context(context):
            assert await manager.execute_with_agent("alice", "agent") == "select 1"
            with pytest.raises(ContextClosedError, match="db_session"):
                kept[0].execute("select 2")
            assert context.db_session is session
        assert session.asked == ["select 1"]

    async def test_a_handle_is_handed_down_and_ends_with_whichever_comes_first(
        self, manager: UserContextManager
    ) -> None:
        kept: list[Any] = []

        async def inner() -> None:
            kept.append(current_context().db_session)
            kept[-1].execute("inner")

        async def agent() -> None:
            kept.append(current_context().db_session)
            await manager.execute_with_agent("alice", "inner")
            with pytest.raises(ContextClosedError):
                kept[1].execute("after the inner run")
            kept[0].execute("outer")
            revoke_handle(kept[0])

        async def revoked() -> None:
            handle = current_context().db_session
            revoke_handle(outer)
            with pytest.raises(HandleRevokedError):
                handle.execute("revoked")

        stateless(manager, agent=agent, inner=inner, revoked=revoked)
        session = Session()
        context = manager.create_isolated_context("alice")
        outer = context.own(session)
        context._db_session = outer
        with managed_user_context(context):
            await manager.execute_with_agent("alice", "agent")
            assert session.asked == ["inner", "outer"]
            await manager.execute_with_agent("alice", "revoked")
        assert session.asked == ["inner", "outer"]

    async def test_plain_data_in_place_of_a_session_stays_what_it_is(self, manager: UserContextManager) -> None:
        async def agent() -> Any:
            return current_context().db_session

        stateless(manager, agent=agent)
        with managed_user_context(manager.create_isolated_context("alice", db_session="a name")):
            assert await manager.execute_with_agent("alice", "agent") == "a name"


class TestStragglers:
    async def test_a_thread_that_outlives_its_run_can_do_nothing_and_is_listed_until_it_ends(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        tool = Blocking()
        session = Session()

        async def agent() -> None:
            run = current_run()
            held = run.context.own(session)
            with run.tool("block") as call:
                await asyncio.to_thread(call.in_thread(tool), lambda: held.execute("too late"))

        manager.register_agent("agent", always(agent), stateless=True)
        assert manager.get_stragglers() == []
        with pytest.raises(AgentTimeoutError):
            await manager.execute_with_agent("alice", "agent", timeout=0.1)
        assert tool.started.is_set()
        [straggler] = manager.get_stragglers()
        assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "agent", "block")
        assert straggler.seconds > 0
        assert straggler.request_id == ledger.select("agent_run")[0].request_id
        ended = dict(ledger.select("agent_run")[-1].data)
        assert (ended["phase"], ended["stragglers"]) == ("agent_failed", 1)
        with running_as(manager, "bob"):
            assert manager.get_stragglers() == []
        with running_as(manager, "alice"):
            assert manager.get_stragglers()[0].tool == "block"
        tool.go_on.set()
        await asyncio.to_thread(tool.ended.wait)
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler to end")
        assert isinstance(tool.outcome, ContextClosedError)
        assert session.asked == []

    async def test_nor_can_it_begin_anything_of_the_run(self, manager: UserContextManager) -> None:
        tool = Blocking()

        async def agent() -> None:
            run = current_run()
            await asyncio.to_thread(run.wrap_tool(tool, "block"), lambda: current_run().tool("another"))

        stateless(manager, agent=agent)
        task = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await asyncio.to_thread(tool.started.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(manager.get_stragglers()) == 1
        tool.go_on.set()
        await asyncio.to_thread(tool.ended.wait)
        assert isinstance(tool.outcome, ContextClosedError)
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler to end")

    async def test_a_thread_of_a_run_that_is_under_way_is_none(self, manager: UserContextManager) -> None:
        tool = Blocking()

        async def agent() -> None:
            await asyncio.to_thread(current_run().wrap_tool(tool, "block"), lambda: None)

        stateless(manager, agent=agent)
        task = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await asyncio.to_thread(tool.started.wait)
        assert manager.get_stragglers() == []
        tool.go_on.set()
        await task
        assert manager.get_stragglers() == []

    async def test_a_step_that_is_no_tool_is_listed_and_not_told_of(
        self, manager: UserContextManager, ledger: RecordingLedger
    ) -> None:
        step = Blocking()

        async def agent() -> None:
            await asyncio.to_thread(current_run().in_thread(step, "step"), lambda: current_run().thinking())

        stateless(manager, agent=agent)
        task = asyncio.ensure_future(manager.execute_with_agent("alice", "agent"))
        await asyncio.to_thread(step.started.wait)
        assert manager.get_stragglers() == []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [straggler] = manager.get_stragglers()
        assert (straggler.user_id, straggler.tool) == ("alice", "step")
        step.go_on.set()
        await asyncio.to_thread(step.ended.wait)
        assert isinstance(step.outcome, ContextClosedError)
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler to end")
        assert phases(ledger) == [("agent_started", "agent"), ("agent_failed", "agent", "cancelled")]

    async def test_an_agent_that_ignores_its_cancellation_is_left_behind_and_listed(
        self, manager: UserContextManager, ledger: RecordingLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ucm_middleware.agents.launch.HANDLER_GRACE", 0.05)
        monkeypatch.setattr("ucm_middleware.teardown.HANDLER_GRACE", 0.05)
        let_go = asyncio.Event()
        session = Session()
        late: list[object] = []

        async def stubborn() -> None:
            held = current_context().own(session)
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            try:
                held.execute("too late")
            except ContextClosedError as error:
                late.append(error)

        stateless(manager, stubborn=stubborn)
        with pytest.raises(AgentTimeoutError, match="ignored its cancellation"):
            await manager.execute_with_agent("alice", "stubborn", timeout=0.05)
        [straggler] = manager.get_stragglers()
        assert (straggler.agent, straggler.tool) == ("stubborn", None)
        assert phases(ledger)[-1] == ("agent_failed", "stubborn", "expired")
        await asyncio.to_thread(wait_until, lambda: manager.get_active_contexts() == {}, "the contexts to close")
        let_go.set()
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler to end")
        assert len(late) == 1
        assert len(ledger.select("agent_run")) == 2


async def test_without_a_manager_it_runs_all_the_same_and_tells_nobody() -> None:
    context = create_isolated_execution_context("alice")
    async with agent_run(context, "agent") as run:
        assert current_run() is run
        run.thinking("x")
        run.emit("note", object())
        with run.tool("look_up") as call:
            assert call.in_thread(threading.get_ident)() == threading.get_ident()
        assert run.wrap_tool(len)("abc") == 3
