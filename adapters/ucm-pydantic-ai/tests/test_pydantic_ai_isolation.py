"""Who an agent runs as, whoever reads its stream: without the adapter, where the framework leaks, and with it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.agent import AgentRunEvents
from pydantic_ai.models.test import TestModel
from pydantic_graph import End

from support.waiting import wait_until
from ucm_middleware import (
    AgentTimeoutError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    UserExecutionContext,
    current_context,
    managed_user_context,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import PydanticAI, UserRuns

ran_as: list[str] = []


@pytest.fixture(autouse=True)
def nobody_ran_yet() -> None:
    ran_as.clear()


async def look() -> str:
    ran_as.append(current_context().user_id)
    return current_context().user_id


def look_in_a_thread() -> str:
    ran_as.append(current_context().user_id)
    return current_context().user_id


def new_agent(**given: Any) -> Agent[Any, str]:
    return Agent(TestModel(), deps_type=UserExecutionContext, tools=[look, look_in_a_thread], **given)


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(ledger: RecordingLedger) -> UserContextManager:
    manager = UserContextManager(plugins=[PydanticAI()], ledger=ledger)
    manager.register_agent("look", lambda context: new_agent())
    return manager


def running(manager: UserContextManager, user_id: str) -> AbstractAsyncContextManager[UserExecutionContext]:
    return managed_user_context(manager.create_isolated_context(user_id))


def denials(ledger: RecordingLedger, user_id: str) -> int:
    return len(ledger.select("denied", user=user_id))


# A stream that one user's code made and another user's code reads.


async def read(manager: UserContextManager, stream: AbstractAsyncContextManager[AgentRunEvents[str]]) -> str:
    """What a stream comes to that bob's code reads."""
    async with running(manager, "bob"), stream as events:
        async for _ in events:
            pass
        assert events.result is not None
        return events.result.output


async def test_bare_a_stream_made_for_alice_and_read_by_bob_runs_as_bob(manager: UserContextManager) -> None:
    async with running(manager, "alice"):
        stream = new_agent().run_stream_events("hello")
    assert await read(manager, stream) == '{"look":"bob","look_in_a_thread":"bob"}'
    assert set(ran_as) == {"bob"}


async def test_with_deps_and_the_capability_it_is_refused(manager: UserContextManager, ledger: RecordingLedger) -> None:
    alice = manager.create_isolated_context("alice")
    async with managed_user_context(alice):
        stream = new_agent(capabilities=[UserRuns()]).run_stream_events("hello", deps=alice)
        with pytest.raises(CrossUserAccessError):
            await in_fresh_task(read(manager, stream))
    assert ran_as == []
    assert denials(ledger, "bob")


async def in_fresh_task(work: Any) -> Any:
    """In a Context of its own, as another request's handler is."""
    from contextvars import Context

    return await asyncio.Task(work, context=Context(), loop=asyncio.get_running_loop())


async def test_run_by_the_manager_it_runs_as_alice_and_bob_reads_nothing(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def bob_reads(stream: AsyncIterator[Any]) -> None:
        async with running(manager, "bob"):
            await anext(stream)

    async with running(manager, "alice"), manager.stream_with_agent("alice", "look", {"prompt": "hello"}) as stream:
        with pytest.raises(CrossUserAccessError):
            await in_fresh_task(bob_reads(stream))
        async for _ in stream:
            pass
        assert stream.result.output == '{"look":"alice","look_in_a_thread":"alice"}'
    assert set(ran_as) == {"alice"}
    assert denials(ledger, "bob")


async def drive(manager: UserContextManager, run: Any) -> None:
    async with running(manager, "bob"):
        node = run.next_node
        while not isinstance(node, End):
            node = await run.next(node)


async def test_bare_a_run_begun_by_alice_and_driven_by_bob_runs_as_bob(manager: UserContextManager) -> None:
    async with running(manager, "alice"), new_agent().iter("hello") as run:
        await in_fresh_task(drive(manager, run))
    assert set(ran_as) == {"bob"}


@pytest.mark.parametrize("given", ["by the agent", "for one run"])
async def test_with_the_capability_neither_model_nor_tool_is_called_for_bob(
    manager: UserContextManager, ledger: RecordingLedger, given: str
) -> None:
    agent = new_agent(capabilities=[UserRuns()] if given == "by the agent" else [])
    for_one_run = [UserRuns()] if given == "for one run" else []
    async with running(manager, "alice"):
        with pytest.raises(CrossUserAccessError):
            async with agent.iter("hello", capabilities=for_one_run) as run:
                await in_fresh_task(drive(manager, run))
    assert ran_as == []
    assert len(ledger.select("denied", user="bob")) == 1
    model = agent.model
    assert isinstance(model, TestModel)
    assert model.last_model_request_parameters is None  # it was not asked


async def test_a_tool_is_refused_where_only_it_is_called_for_bob(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    async def step(run: Any, node: Any, user_id: str | None) -> Any:
        if user_id is None:
            return await run.next(node)
        async with running(manager, user_id):
            return await run.next(node)

    async with running(manager, "alice"):
        with pytest.raises(CrossUserAccessError):
            async with new_agent(capabilities=[UserRuns()]).iter("hello") as run:
                node = await step(run, run.next_node, None)
                node = await step(run, node, None)  # the model's answer: it wants both tools
                await in_fresh_task(step(run, node, "bob"))
    assert ran_as == []
    assert denials(ledger, "bob")


async def test_the_capability_fails_closed_where_there_is_no_user() -> None:
    with pytest.raises(ContextNotFoundError):
        await new_agent(capabilities=[UserRuns()]).run("hello")
    assert ran_as == []


async def test_the_same_agent_serves_both_at_once(manager: UserContextManager) -> None:
    agent = new_agent(capabilities=[UserRuns()])

    async def run(user_id: str) -> str:
        async with running(manager, user_id):
            return (await agent.run("hello")).output

    outputs = await asyncio.gather(*(in_fresh_task(run(user_id)) for user_id in ("alice", "bob")))
    assert outputs == [f'{{"look":"{user_id}","look_in_a_thread":"{user_id}"}}' for user_id in ("alice", "bob")]


# Tools that nothing can stop.


class Session:
    """A session of a database, of which a test sees what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def execute(self, statement: str) -> None:
        self.asked.append(statement)


class Slow:
    """A tool that runs in a thread until it is let go, and then uses what it was given."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.let_go = threading.Event()
        self.ended = threading.Event()
        self.raised: BaseException | None = None

    def tool(self, ctx: RunContext[Any]) -> str:
        session = ctx.deps.db_session
        self.began.set()
        self.let_go.wait(30)
        try:
            session.execute("insert")
        except BaseException as error:
            self.raised = error
            raise
        finally:
            self.ended.set()
        return "done"


class BareDeps:
    def __init__(self, session: Session) -> None:
        self.db_session = session


async def test_bare_a_cancelled_run_s_thread_goes_on_with_the_session() -> None:
    slow, session = Slow(), Session()
    agent = Agent(TestModel(), deps_type=BareDeps, tools=[slow.tool])
    run = asyncio.create_task(agent.run("hello", deps=BareDeps(session)))
    await asyncio.to_thread(slow.began.wait, 30)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    slow.let_go.set()
    await asyncio.to_thread(slow.ended.wait, 30)
    assert session.asked == ["insert"]


@pytest.mark.parametrize("way", ["fast", "public", "streamed", "sub-agent"])
async def test_a_thread_that_outlives_its_run_can_do_nothing_and_is_listed(
    manager: UserContextManager, way: str
) -> None:
    slow, session = Slow(), Session()
    capabilities = [UserRuns()] if way == "public" else []
    agent = Agent(TestModel(), deps_type=UserExecutionContext, tools=[slow.tool], capabilities=capabilities)
    if way == "sub-agent":  # an agent that knows nothing of us, in an async tool of another
        inner = agent

        async def ask(ctx: RunContext[UserExecutionContext]) -> str:
            return (await inner.run("hello", deps=ctx.deps)).output

        agent = Agent(TestModel(), deps_type=UserExecutionContext, tools=[ask])
    manager.register_agent("slow", lambda context: agent, stateless=True)
    context = manager.create_isolated_context("alice", db_session=session)
    async with managed_user_context(context):
        work = asyncio.create_task(consume(manager, "slow", streamed=way == "streamed"))
        await asyncio.to_thread(slow.began.wait, 30)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        (straggler,) = manager.get_stragglers()
        tool = "ask" if way == "sub-agent" else "tool"
        assert (straggler.user_id, straggler.agent, straggler.tool) == ("alice", "slow", tool)
        slow.let_go.set()
        await asyncio.to_thread(slow.ended.wait, 30)
        assert isinstance(slow.raised, ContextClosedError)
        assert session.asked == []
        wait_until(lambda: not manager.get_stragglers(), "the straggler is off the list")


async def consume(manager: UserContextManager, agent_name: str, *, streamed: bool) -> None:
    if not streamed:
        await manager.execute_with_agent("alice", agent_name, {"prompt": "hello"})
        return
    async with manager.stream_with_agent("alice", agent_name, {"prompt": "hello"}) as stream:
        async for _ in stream:
            pass


async def test_an_executor_of_the_application_s_own_is_kept_and_watched(manager: UserContextManager) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from pydantic_ai.capabilities import UseThreadExecutor

    slow, names = Slow(), []

    def name() -> str:
        names.append(threading.current_thread().name)
        return "done"

    with ThreadPoolExecutor(2, "theirs") as theirs:
        agent = Agent(
            TestModel(),
            deps_type=UserExecutionContext,
            tools=[slow.tool, name],
            capabilities=[UseThreadExecutor(theirs)],
        )
        manager.register_agent("slow", lambda context: agent, stateless=True)
        with pytest.raises(AgentTimeoutError):
            await manager.execute_with_agent("alice", "slow", {"prompt": "hello"}, timeout=0.5)
        (straggler,) = manager.get_stragglers()
        assert straggler.thread.startswith("theirs")
        slow.let_go.set()
    assert [each.startswith("theirs") for each in names] == [True]


async def test_an_agent_that_never_ends_is_cut_off(manager: UserContextManager) -> None:
    cancelled = asyncio.Event()

    async def wait_for_ever() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    manager.register_agent("waits", lambda context: Agent(TestModel(), tools=[wait_for_ever]))
    with pytest.raises(AgentTimeoutError, match="waits"):
        await manager.execute_with_agent("alice", "waits", {"prompt": "hello"}, timeout=0.2)
    assert cancelled.is_set()
    with pytest.raises(AgentTimeoutError):
        async with manager.stream_with_agent("alice", "waits", {"prompt": "hello"}, timeout=0.2) as stream:
            async for _ in stream:
                pass


async def test_a_stream_that_is_broken_off_stops_its_tool(manager: UserContextManager) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def wait_for_ever() -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return "never"

    manager.register_agent("waits", lambda context: Agent(TestModel(), tools=[wait_for_ever]))
    async with manager.stream_with_agent("alice", "waits", {"prompt": "hello"}) as stream:
        async for _ in stream:
            if began.is_set():
                break
            await asyncio.sleep(0)
        await began.wait()
    assert cancelled.is_set()
    assert await manager.execute_with_agent("alice", "look", {"prompt": "hello"})
