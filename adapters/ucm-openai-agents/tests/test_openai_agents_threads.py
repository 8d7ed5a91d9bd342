"""Synchronous tools run in threads, which nothing stops: what one can do after its run, with the adapter and bare."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, RunContextWrapper, Runner, UserError, function_tool
from offline_model import OfflineModel
from offline_team import SECRET

from support.waiting import wait_until
from ucm_middleware import (
    ContextClosedError,
    CrossUserAccessError,
    UserContextError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    managed_user_context,
)
from ucm_openai_agents import OpenAIAgents, guard_agent


class Database:
    """A session of the user's."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)


class Slow:
    """An agent whose synchronous tool waits in its thread, and then writes as whoever it is."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.ended = threading.Event()
        self.errors: list[BaseException] = []

        @function_tool
        def write(wrapper: RunContextWrapper[Any], text: str) -> str:
            context = wrapper.context
            session = context.db_session if isinstance(context, UserExecutionContext) else context
            self.entered.set()
            try:
                self.release.wait(30)
                session.write(text)
            except UserContextError as error:
                self.errors.append(error)
                raise
            finally:
                self.ended.set()
            return "written"

        self.agent = Agent[Any]("front", model=OfflineModel(), tools=[write])
        self.manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
        self.manager.register_agent("front", lambda _: self.agent, stateless=True)


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.release.set()  # so that no thread keeps the process


async def test_a_thread_that_outlives_its_run_can_do_nothing_and_is_listed_until_it_ends(slow: Slow) -> None:
    database = Database()
    context = slow.manager.create_isolated_context("alice", db_session=database)
    async with managed_user_context(context):
        given = {"input": "write(text=late)"}
        run = asyncio.create_task(slow.manager.execute_with_agent("alice", "front", given))
        await asyncio.to_thread(slow.entered.wait, 30)
        assert slow.manager.get_stragglers() == []  # it has not outlived it yet
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        (straggler,) = slow.manager.get_stragglers()
        assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "front", "write")
        slow.release.set()
        await asyncio.to_thread(slow.ended.wait, 30)
    await asyncio.to_thread(wait_until, lambda: not slow.manager.get_stragglers(), "the thread has ended")
    assert database.written == []
    assert [type(error) for error in slow.errors] == [ContextClosedError]


async def test_a_tool_that_ends_in_time_writes(slow: Slow) -> None:
    database = Database()
    slow.release.set()
    async with managed_user_context(slow.manager.create_isolated_context("alice", db_session=database)):
        await slow.manager.execute_with_agent("alice", "front", {"input": "write(text=in time)"})
    assert slow.errors == []
    assert database.written == ["in time"]


async def test_bare_the_thread_writes_after_its_run(slow: Slow) -> None:
    database = Database()
    run = asyncio.create_task(Runner.run(slow.agent, "write(text=late)", context=database))
    await asyncio.to_thread(slow.entered.wait, 30)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    slow.release.set()
    await asyncio.to_thread(slow.ended.wait, 30)
    assert database.written == ["late"]


async def test_a_thread_runs_as_its_user_with_the_span_of_its_call(slow: Slow) -> None:
    seen: list[str] = []

    @function_tool
    def who() -> str:
        seen.append(current_context().user_id)
        return threading.current_thread().name

    slow.agent.tools = [who]
    users = [f"user-{number}" for number in range(10)]
    await asyncio.gather(*(slow.manager.execute_with_agent(user, "front", {"input": "who()"}) for user in users))
    assert sorted(seen) == sorted(users)


@pytest.mark.parametrize("how", ["as it is", "as his own", "as his own, from execute_with_agent"])
async def test_a_state_of_alice_s_that_is_resumed_by_bob_calls_none_of_her_tools(how: str) -> None:
    """Nor the model. For apps that call Runner themselves."""
    called: list[str] = []

    @function_tool(needs_approval=True)
    async def pay() -> str:
        called.append(current_context().user_id)
        return "paid"

    agent = guard_agent(Agent[Any]("front", model=OfflineModel(), tools=[pay]))
    manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
    manager.register_agent("front", lambda _: agent, stateless=True)
    alice, bob = (manager.create_isolated_context(user) for user in ("alice", "bob"))

    async def begin() -> Any:
        async with managed_user_context(manager.create_isolated_context("alice")):
            if how.endswith("execute_with_agent"):
                result = await manager.execute_with_agent("alice", "front", {"input": "pay()"})
            else:
                result = await Runner.run(agent, "pay()", context=alice)
            state = result.to_state()
            state.approve(result.interruptions[0])
            return state

    async def go_on(user: UserExecutionContext, state: Any) -> Any:
        async with managed_user_context(user):
            return await Runner.run(agent, state, context=None if how == "as it is" else user)

    state = await begin()
    with pytest.raises(UserError) as caught:  # which the SDK makes of what a hook raises
        await asyncio.create_task(go_on(bob, state))
    assert isinstance(caught.value.__cause__, CrossUserAccessError)
    assert called == []
    trail = manager.get_audit_trail("bob")
    assert trail is not None
    assert "denied" in repr(trail)
    result = await asyncio.create_task(go_on(alice, await begin()))
    assert called == ["alice"]
    assert result.final_output == "done: paid"
