"""What is tried with agents of every framework that the port runs as plain async functions. One module for each in
tests/frameworks has the framework's real classes, and an offline model.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ucm_middleware import (
    AgentError,
    AgentTimeoutError,
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    current_run,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger

from .contexts import MakeManager
from .events import connect
from .frameworks import (
    CROWD,
    WAIT,
    Agent,
    Framework,
    Function,
    Session,
    Witness,
    all_of,
    desk,
    elsewhere,
    ended,
    owners,
    secret_of,
    tools_of,
)
from .tracing import Sdk
from .waiting import PATIENCE, wait_until


class AsOneUser:
    """What each framework's agents are tried for. A subclass names the framework."""

    framework: Framework
    spans_tell = True
    """Whether what users say stands in the framework's own spans."""

    @pytest.fixture
    def witness(self) -> Witness:
        return Witness()

    async def test_many_users_at_once_are_kept_apart(
        self, make_manager: MakeManager, witness: Witness, sdk: Sdk
    ) -> None:
        users = [f"user-{number:02}" for number in range(CROWD)]
        ledger = RecordingLedger()
        spans_before = len(sdk.spans)
        with ThreadPoolExecutor(2 * CROWD) as threads:
            asyncio.get_running_loop().set_default_executor(threads)
            manager = make_manager(ledger=ledger)
            witness.crowd = threading.Barrier(CROWD)
            manager.register_agent("desk", desk(self.framework, self.framework.model(witness), witness))
            connections = {user: connect(manager, user) for user in users}
            answers = await asyncio.gather(
                *(
                    manager.execute_with_agent(
                        user, "desk", self.framework.parameters(f"I am {user}: {secret_of(user)}")
                    )
                    for user in users
                )
            )
            await asyncio.to_thread(
                wait_until, lambda: all(ended(client.frames) for _, client, _ in connections.values()), "all are told"
            )
            for context, _, _ in connections.values():
                context.close("finished")

        for user, answer in zip(users, answers, strict=True):
            assert owners(answer) == {user}
            assert f"look_up: {secret_of(user)}" in str(answer)
            assert f"note: {secret_of(user)}" in str(answer)
            _, client, _ = connections[user]
            assert owners(*client.frames) == {user}
            kinds = [envelope["type"] for envelope in client.envelopes]
            assert kinds.count("tool_executing") == kinds.count("tool_completed") == kinds.count("used") == 2
            assert (kinds[0], kinds[-1]) == ("agent_started", "agent_completed")
            phases = [dict(record.data)["phase"] for record in ledger.select("agent_run", user=user)]
            assert phases.count("tool_executing") == 2
        assert not owners(*map(tuple, ledger.records)), "what users say stands in no record"
        for where, times in (("model", 2), ("look_up", 1), ("note", 1)):
            assert sorted(witness.of(where)) == sorted([(user, {user}) for user in users] * times)
        traces: dict[int, str] = {}
        for span in sdk.spans[spans_before:]:
            assert span.context is not None
            traces[span.context.trace_id] = traces.get(span.context.trace_id, "") + span.to_json()
        assert all(len(owners(spans)) <= 1 for spans in traces.values())
        runs = [spans for spans in traces.values() if '"invoke_agent desk"' in spans]
        assert len(runs) == CROWD
        assert all('"execute_tool look_up"' in spans and '"execute_tool note"' in spans for spans in runs)
        if self.spans_tell:  # the framework's own, which are part of the run's trace
            assert set().union(*map(owners, runs)) == set(users)
        assert manager.get_stragglers() == []

    async def test_an_agent_that_another_run_had_is_refused(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        shared = self.framework.agent(self.framework.model(witness), tools_of(witness))
        manager.register_agent("shared", lambda context: shared)
        parameters = self.framework.parameters(f"I am alice: {secret_of('alice')}")
        await manager.execute_with_agent("alice", "shared", parameters)
        with pytest.raises(AgentError, match="another run had already"):
            await manager.execute_with_agent("bob", "shared", self.framework.parameters("And I am bob"))
        assert {user for _, user, _ in witness.sightings} == {"alice"}

    async def test_without_the_port_whoever_names_a_conversation_has_it(
        self, make_manager: MakeManager, witness: Witness, tmp_path: Path
    ) -> None:
        manager = make_manager()
        model = self.framework.model(witness)
        for user, leaked in (("alice", set[str]()), ("bob", {"alice"})):
            async with managed_user_context(manager.create_isolated_context(user)):
                answer = await self.framework.talk(model, tmp_path, "main", f"I am {user}: {secret_of(user)}")
            assert owners(answer) == {user} | leaked

    async def test_a_conversation_under_a_derived_key_is_its_users(
        self, make_manager: MakeManager, witness: Witness, tmp_path: Path
    ) -> None:
        manager = make_manager()
        model = self.framework.model(witness)

        async def talk(conversation: str, prompt: str) -> str:
            key = current_context().derive_key("conversation", conversation)
            return await self.framework.talk(model, tmp_path, key, prompt)

        manager.register_agent("desk", lambda context: talk, stateless=True)
        for user in ("alice", "bob"):
            prompt = f"I am {user}: {secret_of(user)}"
            answer = await manager.execute_with_agent(user, "desk", {"conversation": "main", "prompt": prompt})
            assert owners(answer) == {user}
        for user in ("alice", "bob"):
            answer = await manager.execute_with_agent(
                user, "desk", {"conversation": "main", "prompt": "What did I say?"}
            )
            assert owners(answer) == {user}, "the own conversation goes on"
        witness.require_apart()

    async def test_a_stream_runs_as_its_user_whoever_reads_it(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        model = self.framework.model(witness)
        manager.register_agent("desk", desk(self.framework, model, witness, streaming=True))
        parameters = self.framework.parameters(f"I am alice: {secret_of('alice')}")
        alice, bob = manager.create_isolated_context("alice"), manager.create_isolated_context("bob")
        async with managed_user_context(alice), manager.stream_with_agent("alice", "desk", parameters) as stream:
            with pytest.raises(CrossUserAccessError):
                await elsewhere(all_of(stream), bob)
            assert await elsewhere(all_of(stream))
        assert {user for _, user, _ in witness.sightings} == {"alice"}
        assert len(witness.of("model")) == 2
        witness.require_apart()

    async def test_without_the_port_a_stream_runs_as_whoever_reads_it(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        streaming = self.framework.streaming(self.framework.model(witness), tools_of(witness))
        alice, bob = manager.create_isolated_context("alice"), manager.create_isolated_context("bob")
        async with managed_user_context(alice):
            stream = streaming(**self.framework.parameters(f"I am alice: {secret_of('alice')}"))
            assert await elsewhere(all_of(stream), bob)
        # The leak: tools that ask who their user is are told the reader, and the model mixes both.
        assert witness.of("look_up") == [("bob", {"alice"})]
        assert witness.of("model")[-1] == ("bob", {"alice", "bob"})

    async def test_a_stream_that_is_broken_off_ends_at_once(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        model = self.framework.model(witness)
        manager.register_agent("desk", desk(self.framework, model, witness, streaming=True))
        async with manager.stream_with_agent("alice", "desk", self.framework.parameters(WAIT)) as stream:
            async for _ in stream:
                if witness.of("model"):
                    break
        assert [user for where, user, _ in witness.sightings if where == "model left"] == ["alice"]
        assert manager.get_active_contexts() == {}
        assert manager.get_stragglers() == []

    async def test_a_tool_that_outlives_its_run_is_listed_and_can_do_nothing(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        manager = make_manager()
        began, goes_on = threading.Event(), threading.Event()
        outcome: list[Any] = []

        def wait(text: str) -> str:
            """Wait for long."""
            session = current_context().db_session
            outcome.append(session.query())
            began.set()
            assert goes_on.wait(PATIENCE)
            try:
                session.query()
            except ContextClosedError as error:
                outcome.append(type(error))
            return "late"

        self._register(manager, "desk", wait, witness)
        context = manager.create_isolated_context("alice", db_session=Session())
        async with managed_user_context(context):
            task = asyncio.create_task(manager.execute_with_agent("alice", "desk", self.framework.parameters("hello")))
            await asyncio.to_thread(wait_until, began.is_set, "the tool has begun")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            [straggler] = manager.get_stragglers()
            assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "desk", "wait")
            calls = len(witness.of("model"))
            goes_on.set()
            await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler has ended")
        await asyncio.get_running_loop().shutdown_default_executor()  # its threads have ended then
        assert outcome == ["rows", ContextClosedError]
        assert len(witness.of("model")) == calls, "nobody goes on with what it returned"

    async def test_a_run_has_a_deadline_and_others_go_on(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        goes_on = threading.Event()

        def wait(text: str) -> str:
            """Wait for long, as alice."""
            if current_context().user_id == "alice":
                assert goes_on.wait(PATIENCE)
            return f"waited as {current_context().user_id}"

        self._register(manager, "desk", wait, witness)
        parameters = self.framework.parameters("hello")
        try:
            late = asyncio.create_task(manager.execute_with_agent("alice", "desk", parameters, timeout=0.2))
            assert "waited as bob" in str(await manager.execute_with_agent("bob", "desk", parameters))
            with pytest.raises(AgentTimeoutError, match=r"did not end within 0\.2 seconds"):
                await late
        finally:
            goes_on.set()
        await asyncio.to_thread(wait_until, lambda: manager.get_stragglers() == [], "the straggler has ended")

    async def test_a_refusal_in_a_tool_becomes_an_answer_to_the_model(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)
        bob = manager.create_isolated_context("bob")
        owned = bob.own(Session())

        def query(text: str) -> str:
            """Ask with what is bob's."""
            return owned.query()

        self._register(manager, "desk", query, witness)
        answer = await manager.execute_with_agent("alice", "desk", self.framework.parameters("hello"))
        assert "rows" not in str(answer)
        assert len(witness.of("model")) == 2
        assert [(record.user_id, record.actor_id) for record in ledger.select("denied")] == [("alice", None)]
        bob.close("finished")

    async def test_agents_that_the_framework_runs_share_the_run(
        self, make_manager: MakeManager, witness: Witness
    ) -> None:
        ledger = RecordingLedger()
        manager = make_manager(ledger=ledger)
        model = self.framework.model(witness)

        def make(_: UserExecutionContext) -> Agent:
            return self.framework.team(model, [current_run().wrap_tool(tool) for tool in tools_of(witness)])

        manager.register_agent("desk", make)
        users = ("alice", "bob", "carol")
        answers = await asyncio.gather(
            *(manager.execute_with_agent(user, "desk", self.framework.parameters(secret_of(user))) for user in users)
        )
        for user, answer in zip(users, answers, strict=True):
            assert owners(answer) == {user}
            assert (user, {user}) in witness.of("look_up")
            assert (user, {user}) in witness.of("note")
            phases = [dict(record.data)["phase"] for record in ledger.select("agent_run", user=user)]
            assert phases.count("agent_started") == 1
            assert phases.count("tool_executing") == phases.count("tool_completed") == 2
        witness.require_apart()

    async def test_a_tool_may_run_another_agent(self, make_manager: MakeManager, witness: Witness) -> None:
        manager = make_manager()
        model = self.framework.model(witness)
        manager.register_agent("helper", desk(self.framework, model, witness))

        async def ask_helper(text: str) -> str:
            """Ask the helper."""
            user = current_context().user_id
            return str(await manager.execute_with_agent(user, "helper", self.framework.parameters(text)))

        self._register(manager, "desk", ask_helper, witness)
        connections = {user: connect(manager, user) for user in ("alice", "bob")}
        asking = (
            manager.execute_with_agent(user, "desk", self.framework.parameters(secret_of(user)))
            for user in ("alice", "bob")
        )
        for user, answer in zip(("alice", "bob"), await asyncio.gather(*asking), strict=True):
            assert owners(answer) == {user}
            assert f"look_up: {secret_of(user)}" in str(answer)
        witness.require_apart()
        for user, (context, client, _) in connections.items():
            await asyncio.to_thread(wait_until, partial(ended, client.frames), "all is told")
            context.close("finished")
            started = [envelope["data"] for envelope in client.envelopes if envelope["type"] == "agent_started"]
            assert [(data["agent"], data["depth"]) for data in started] == [("desk", 1), ("helper", 2)], user

    def _register(self, manager: UserContextManager, name: str, tool: Function, witness: Witness) -> None:
        model = self.framework.model(witness)
        manager.register_agent(name, lambda _: self.framework.agent(model, [current_run().wrap_tool(tool)]))
