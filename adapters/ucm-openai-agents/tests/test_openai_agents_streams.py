"""Streams: whose they are, whoever reads; broken off, cancelled and timed out. And what the SDK does by itself."""

import asyncio
from typing import Any

import pytest
from agents import Agent, Runner, function_tool
from offline_model import OfflineModel
from offline_team import SECRET, Team, secret_of

from support.events import connect
from ucm_middleware import (
    AgentTimeoutError,
    ContextClosedError,
    CrossUserAccessError,
    UserContextManager,
    current_context,
    managed_user_context,
)
from ucm_middleware.testing.waiting import wait_until
from ucm_openai_agents import OpenAIAgents, guard_agent


class Gate:
    """A tool that waits until it is let go, and says as whom it went on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.went_on: list[str] = []
        self.left: list[str] = []

        @function_tool
        async def wait() -> str:
            self.entered.set()
            try:
                await self.open.wait()
            finally:
                self.left.append("left")
            return "waited"

        @function_tool
        async def go_on() -> str:
            self.went_on.append("somebody")
            return "went on"

        self.agent = Agent[Any]("front", model=OfflineModel(), tools=[wait, go_on])
        self.manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
        self.manager.register_agent("front", lambda _: self.agent, stateless=True)


async def test_a_stream_gives_the_sdk_s_events_and_what_it_came_to() -> None:
    team = Team()
    manager = team.manager(OpenAIAgents())
    async with manager.stream_with_agent("alice", "front", {"input": "recall(); say good bye"}) as stream:
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[0] == "agent_updated_stream_event"
    assert kinds.count("raw_response_event") == 4  # two words, and the end of two answers
    assert stream.result.final_output == "good bye"


async def test_a_stream_read_in_another_user_s_context_is_refused_and_runs_as_its_own_user() -> None:
    team = Team()
    manager = team.manager(OpenAIAgents())
    alice, bob = (manager.create_isolated_context(user) for user in ("alice", "bob"))
    async with managed_user_context(alice):
        stream = manager.stream_with_agent("alice", "front", {"input": "recall(); arecall(); say done"})
        await stream.__aenter__()

    async def read_as_bob() -> None:
        async with managed_user_context(bob):
            with pytest.raises(CrossUserAccessError):
                [event async for event in stream]

    await asyncio.create_task(read_as_bob())
    with pytest.raises(ContextClosedError):  # alice's request has ended, and with it what she had under way
        [event async for event in stream]
    await stream.__aexit__(None, None, None)
    assert {user for _, user in team.called} <= {"alice"}
    assert not [text for text in team.model.seen if secret_of("bob") in text]


async def test_a_stream_that_is_broken_off_ends_then_and_there() -> None:
    gate = Gate()
    _, client, _ = connect(gate.manager, "alice")
    async with gate.manager.stream_with_agent("alice", "front", {"input": "wait(); go_on()"}) as stream:
        async for _ in stream:
            break
        await gate.entered.wait()
    assert gate.left == ["left"]
    gate.open.set()
    await asyncio.sleep(0)
    assert gate.went_on == []
    ends = [(each["type"], each["data"].get("reason")) for each in client.envelopes][-2:]
    assert ends == [("tool_completed", "cancelled"), ("agent_failed", "cancelled")]
    assert len(asyncio.all_tasks()) == 1


async def test_bare_a_stream_that_is_broken_off_goes_on_after_its_request() -> None:
    gate = Gate()
    result = Runner.run_streamed(gate.agent, "wait(); go_on()")

    async def request() -> None:
        async for _ in result.stream_events():
            break
        await gate.entered.wait()

    reader = asyncio.create_task(request())
    await reader
    gate.open.set()
    assert result.run_loop_task is not None
    await asyncio.wait((result.run_loop_task,))
    assert gate.went_on == ["somebody"]


async def test_with_a_guarded_agent_even_a_bare_stream_stops_with_its_request() -> None:
    gate = Gate()
    guard_agent(gate.agent)
    context = gate.manager.create_isolated_context("alice")
    async with managed_user_context(context):
        result = Runner.run_streamed(gate.agent, "wait(); go_on()", context=current_context())
        await gate.entered.wait()
    gate.open.set()
    assert result.run_loop_task is not None
    await asyncio.wait((result.run_loop_task,))
    assert gate.went_on == []
    assert isinstance(result.run_loop_exception, ContextClosedError)


@pytest.mark.parametrize("way", ["cancelled", "timed out", "revoked"])
async def test_a_run_that_is_stopped_leaves_nothing_running(way: str) -> None:
    gate = Gate()
    given = {"input": "wait(); go_on()"}
    run = asyncio.create_task(
        gate.manager.execute_with_agent("alice", "front", given, timeout=0.2 if way == "timed out" else None)
    )
    await gate.entered.wait()
    if way == "cancelled":
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    elif way == "timed out":
        with pytest.raises(AgentTimeoutError):
            await run
    else:
        gate.manager.revoke("alice", "signed out")
        with pytest.raises(ContextClosedError):
            await run
    assert gate.left == ["left"]
    gate.open.set()
    await asyncio.sleep(0)
    assert gate.went_on == []
    assert gate.manager.get_active_contexts() == {}
    assert gate.manager.get_stragglers() == []
    assert len(asyncio.all_tasks()) == 1


async def test_a_stream_ends_with_a_hand_off_under_way() -> None:
    team, asked = Team(), asyncio.Event()

    async def never() -> None:
        asked.set()
        await asyncio.Event().wait()

    team.billing.model = OfflineModel(before=never)
    manager = team.manager(OpenAIAgents())
    _, client, _ = connect(manager, "alice")
    async with manager.stream_with_agent("alice", "front", {"input": "handoff to billing"}):
        await asked.wait()
    ends = sorted((each["type"], each["data"]["agent"]) for each in client.envelopes[-2:])
    assert ends == [("agent_failed", "billing"), ("agent_failed", "front")]


async def test_an_asynchronous_tool_that_will_not_be_cancelled_is_waited_for() -> None:
    """The SDK cancels its tools and does not wait for them."""
    entered, stay = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    @function_tool
    async def stubborn() -> str:
        entered.set()
        while not stay.is_set():
            try:
                await stay.wait()
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_later(0.05, stay.set)
        ended.append(current_context().user_id)
        return "done"

    agent = Agent[Any]("front", model=OfflineModel(), tools=[stubborn])
    manager = UserContextManager(plugins=[OpenAIAgents()], secret=SECRET)
    manager.register_agent("front", lambda _: agent, stateless=True)
    run = asyncio.create_task(manager.execute_with_agent("alice", "front", {"input": "stubborn()"}))
    await entered.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert ended == ["alice"]  # still inside of the run, whose context was open
    wait_until(lambda: len(asyncio.all_tasks()) == 1, "nothing is left")


async def test_what_a_stream_raises_reaches_its_reader() -> None:
    team = Team()
    manager = team.manager(OpenAIAgents())
    with pytest.raises(AssertionError, match="no step"):
        async with manager.stream_with_agent("alice", "front", {"input": "what?"}) as stream:
            [event async for event in stream]
