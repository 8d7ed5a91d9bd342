"""Fifty users at once, each with a secret: through the adapter nobody meets another's. Without it they do."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from typing import Any

import pytest
from google.adk.agents.llm_agent import LlmAgent
from google.adk.agents.run_config import RunConfig, ToolThreadPoolConfig
from google.adk.agents.sequential_agent import SequentialAgent
from google.adk.apps.app import App
from google.adk.artifacts.in_memory_artifact_service import InMemoryArtifactService
from google.adk.events.event import Event
from google.adk.memory.in_memory_memory_service import InMemoryMemoryService
from google.adk.runners import Runner
from google.adk.sessions.base_session_service import BaseSessionService
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.adk.telemetry.context import ContentCapturingMode, TelemetryConfig
from google.adk.tools.agent_tool import AgentTool
from google.adk.tools.tool_context import ToolContext
from google.genai import types

from offline import OfflineModel
from support.events import Client, connect
from support.tracing import Sdk
from ucm_google_adk import (
    GoogleADK,
    OwnedArtifactService,
    OwnedMemoryService,
    OwnedSessionService,
    UserContextPlugin,
)
from ucm_middleware import (
    AgentPolicy,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    agent_run,
    current_context,
)
from ucm_middleware.testing import RecordingLedger, Users

USERS = [f"user-{number}" for number in range(50)]
FEW = USERS[:10]
CHAT = "chat"  # what every client calls its conversation
RUN = RunConfig(
    tool_thread_pool_config=ToolThreadPoolConfig(max_workers=8),
    telemetry=TelemetryConfig(capture_message_content=ContentCapturingMode.SPAN_ONLY),
)


def secret_of(user: str) -> str:
    return f"<secret of {user}>"


def text(content: str) -> types.Content:
    return types.Content(role="user", parts=[types.Part(text=content)])


def foreign(shown: str, user: str | None) -> list[str]:
    """The users other than this one whose secrets are in a text."""
    return [other for other in USERS if other != user and secret_of(other) in shown]


# The agent: it keeps the user's secret wherever ADK offers to, and shows it again.


async def keep(tool_context: ToolContext) -> str:
    """Keep the secret in state, artifacts and memory."""
    secret = secret_of(current_context().user_id)
    tool_context.state["user:secret"] = secret
    tool_context.state["secret"] = secret
    await tool_context.save_artifact("user:secret.txt", types.Part(text=secret))
    await tool_context.save_artifact("secret.txt", types.Part(text=secret))
    await tool_context.add_events_to_memory(events=[Event(author="user", content=text(secret))])
    return secret


def show(tool_context: ToolContext) -> dict[str, Any]:
    """What the state has; in a thread of its own."""
    return {"user": current_context().user_id, "state": tool_context.state.to_dict()}


async def recall(tool_context: ToolContext) -> dict[str, Any]:
    """What artifacts and memory have."""
    files = await tool_context.list_artifacts()
    parts = [await tool_context.load_artifact(name) for name in files]
    found = await tool_context.search_memory("secret")
    return {
        "user": tool_context.user_id,
        "files": [part.text for part in parts if part],
        "memories": [part.text for entry in found.memories for part in entry.content.parts or []],
    }


class Agents:
    """One tree of agents, the same for all users, with the models that it asks."""

    def __init__(self, *, alone: bool = False) -> None:
        others: Any = () if alone else (("adviser", {"request": "please"}), _to("closer"))
        self.models = {
            "root": OfflineModel(calls=(("keep", {}), *others)),
            "adviser": OfflineModel(calls=(("show", {}),), answer="advised"),
            "closer": OfflineModel(calls=(("recall", {}),), answer="closed"),
        }
        adviser = LlmAgent(name="adviser", description="advises", model=self.models["adviser"], tools=[show])
        closer = LlmAgent(
            name="closer",
            model=self.models["closer"],
            tools=[recall],
            instruction="The secret is {user:secret?}.",
            disallow_transfer_to_parent=True,
        )
        tools: list[Any] = [keep] if alone else [keep, AgentTool(adviser)]
        self.root = LlmAgent(name="root", model=self.models["root"], tools=tools, sub_agents=[] if alone else [closer])

    @property
    def asked(self) -> list[tuple[str | None, str]]:
        return [each for model in self.models.values() for each in model.asked]


def _to(name: str) -> tuple[str, dict[str, Any]]:
    return "transfer_to_agent", {"agent_name": name}


async def test_fifty_users_at_once(
    service: BaseSessionService, app: str, sdk: Sdk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    in_memory = isinstance(service, InMemorySessionService)
    memories, files, ledger = InMemoryMemoryService(), InMemoryArtifactService(), RecordingLedger()
    agents = Agents(alone=not in_memory)  # ADK takes its time
    adk = GoogleADK(app, session_service=service, memory_service=memories, artifact_service=files, run_config=RUN)
    manager = UserContextManager(plugins=[adk], ledger=ledger, agents=AgentPolicy(max_runs_per_user=2))
    manager.register_agent("root", lambda context: agents.root, stateless=True)
    clients: dict[str, Client] = {user: connect(manager, user)[1] for user in USERS}
    spans_before = len(sdk.spans)

    async def use(user: str) -> None:
        given = {"message": f"my secret is {secret_of(user)}", "session_id": CHAT}
        answer = await manager.execute_with_agent(user, "root", given)
        shown = json.dumps([event.model_dump(mode="json") for event in answer.events])
        assert foreign(shown, user) == []
        results = {
            response.name: response.response for event in answer.events for response in event.get_function_responses()
        }
        assert results["keep"] == {"result": secret_of(user)}
        if not in_memory:
            return
        assert results["recall"] == {"user": user, "files": [secret_of(user)] * 2, "memories": [secret_of(user)]}
        # Again, in the same conversation, as a stream, broken off in the middle.
        async with manager.stream_with_agent(user, "root", {"message": "and again", "session_id": CHAT}) as stream:
            assert foreign((await anext(stream)).model_dump_json(), user) == []

    await asyncio.gather(*map(use, USERS))

    assert {user for user, _ in agents.asked} == set(USERS)
    for user, shown in agents.asked:
        assert foreign(shown, user) == [], f"a model asked for {user} saw another's secret"
    for user, client in clients.items():
        assert client.frames
        assert {envelope["user_id"] for envelope in client.envelopes if "user_id" in envelope} <= {user}
        assert foreign("".join(client.frames), user) == []
    assert foreign(str(ledger.records), None) == []  # nobody's at all
    assert foreign(caplog.text, None) == []
    assert "Failed to detach" not in caplog.text  # as OpenTelemetry says of a span that was left in another's Context
    for user in USERS:
        with Users(manager).running(user):
            session = await adk.session_service.get_session(app_name=app, user_id=user, session_id=CHAT)
            assert session is not None
            assert secret_of(user) in session.model_dump_json()
            assert foreign(session.model_dump_json(), user) == []

    # ADK is told to put what is said on its spans: those of one trace are one user's.
    by_trace: dict[int, set[str]] = {}
    for span in sdk.spans[spans_before:]:
        assert span.context is not None
        shown = json.dumps([dict(span.attributes or {}), [dict(each.attributes or {}) for each in span.events]])
        by_trace.setdefault(span.context.trace_id, set()).update(foreign(shown, None))
    assert set().union(*by_trace.values()) == set(USERS)
    assert all(len(seen) <= 1 for seen in by_trace.values())


# An application that calls the runner itself, and believes the client who it is.


def runner_for(agents: Agents, guarded: bool, services: tuple[Any, Any, Any]) -> Runner:
    sessions, memories, files = services
    return Runner(
        app=App(name="shop", root_agent=agents.root, plugins=[UserContextPlugin()] if guarded else []),
        session_service=OwnedSessionService(sessions) if guarded else sessions,
        memory_service=OwnedMemoryService(memories) if guarded else memories,
        artifact_service=OwnedArtifactService(files) if guarded else files,
        auto_create_session=True,
    )


def services() -> tuple[Any, Any, Any]:
    return InMemorySessionService(), InMemoryMemoryService(), InMemoryArtifactService()


async def ask(runner: Runner, claimed: str, message: str = "show me") -> list[Event]:
    given = runner.run_async(user_id=claimed, session_id=CHAT, new_message=text(message), run_config=RUN)
    async with aclosing(given) as events:
        return [event async for event in events]


@pytest.mark.parametrize("guarded", [False, True], ids=["bare", "guarded"])
async def test_who_claims_to_be_another(guarded: bool) -> None:
    agents = Agents()
    runner, users = runner_for(agents, guarded, services()), Users(UserContextManager())

    async def attack(number: int, user: str) -> list[str]:
        victim = FEW[number - 1]
        with users.running(user):
            try:
                events = await ask(runner, victim)
            except CrossUserAccessError:
                return []
        return foreign(json.dumps([event.model_dump(mode="json") for event in events]), user)

    async def begin(user: str) -> None:
        with users.running(user):
            await ask(runner, user, secret_of(user))

    await asyncio.gather(*map(begin, FEW))
    for model in agents.models.values():
        model.asked.clear()
    got = await asyncio.gather(*(attack(number, user) for number, user in enumerate(FEW)))
    seen = [(user, found) for user, shown in agents.asked if (found := foreign(shown, user))]
    if guarded:
        assert not any(got)
        assert agents.asked == []
    else:  # everybody has the secret of the one before
        assert got == [[FEW[number - 1]] for number in range(len(FEW))]
        assert len(seen) >= len(FEW)


async def read_in(context_of: str, users: Users, events: AsyncGenerator[Event, None]) -> list[Event]:
    """Read on, in another user's context, as another request would."""

    async def read() -> list[Event]:
        with users.running(context_of):
            return [event async for event in events]

    return await asyncio.create_task(read(), context=Context())


@pytest.mark.parametrize("guarded", [False, True], ids=["bare", "guarded"])
@pytest.mark.parametrize("root", ["agent", "workflow"])
@pytest.mark.parametrize("begun", [0, 1])
async def test_a_stream_that_another_reads(guarded: bool, root: str, begun: int) -> None:
    """Made for alice, begun or not, and read on in bob's context."""
    ran_as: list[str] = []

    async def act(tool_context: ToolContext) -> str:
        """Do what this user may."""
        ran_as.append(current_context().user_id)
        return "done"

    agent = LlmAgent(name="root", model=OfflineModel(calls=(("act", {}), ("act", {}))), tools=[act])
    agents = Agents()
    agents.root = agent if root == "agent" else SequentialAgent(name="all", sub_agents=[agent])  # type: ignore[assignment]
    runner, users = runner_for(agents, guarded, services()), Users(UserContextManager())
    with users.running("alice"):
        events = runner.run_async(user_id="alice", session_id=CHAT, new_message=text("alice's secret"))
        for _ in range(begun):
            await anext(events)
        async with aclosing(events):
            if guarded:
                with pytest.raises((CrossUserAccessError, RuntimeError)) as refused:
                    await read_in("bob", users, events)
                error = refused.value
                assert isinstance(error.__cause__ or error, CrossUserAccessError)
                assert "bob" not in ran_as
                return
            assert await read_in("bob", users, events)  # bob has alice's answer
    if root == "workflow" or not begun:
        assert "bob" in ran_as  # and has acted in her name


async def test_a_stream_of_the_manager_is_read_by_its_user_alone() -> None:
    manager = UserContextManager(plugins=[GoogleADK("shop", run_config=RUN)])
    agents, users = Agents(), Users(manager)
    model = OfflineModel(calls=(("show", {}),))
    manager.register_agent("root", lambda context: LlmAgent(name="root", model=model, tools=[show]))
    del agents
    with users.running("alice"):
        async with manager.stream_with_agent("alice", "root", {"message": "hello"}) as stream:

            async def read_as_bob() -> None:
                with users.running("bob"):
                    await anext(stream)

            for _ in range(3):
                with pytest.raises(CrossUserAccessError):
                    await asyncio.create_task(read_as_bob(), context=Context())
            events = [event async for event in stream]
    (response,) = [response for event in events for response in event.get_function_responses()]
    assert response.response is not None
    assert response.response["user"] == "alice"
    assert {user for user, _ in model.asked} == {"alice"}


class TestDirectly:
    """Through the runner, in a request's context, guarded."""

    async def test_outside_of_a_context_nothing_runs(self) -> None:
        agents = Agents()
        with pytest.raises(ContextNotFoundError):
            await ask(runner_for(agents, True, services()), "user-1")
        only_plugin = Runner(
            app=App(name="shop", root_agent=agents.root, plugins=[UserContextPlugin()]),
            session_service=InMemorySessionService(),
            auto_create_session=True,
        )
        with pytest.raises(RuntimeError) as refused:
            await ask(only_plugin, "user-1")
        assert isinstance(refused.value.__cause__, ContextNotFoundError)
        assert agents.asked == []

    async def test_the_plugin_alone_refuses_anothers_session(self) -> None:
        agents = Agents()
        runner = Runner(
            app=App(name="shop", root_agent=agents.root, plugins=[UserContextPlugin()]),
            session_service=InMemorySessionService(),
            auto_create_session=True,
        )
        users = Users(UserContextManager())
        with users.running("user-2"), pytest.raises(RuntimeError) as refused:
            await ask(runner, "user-1")
        assert isinstance(refused.value.__cause__, CrossUserAccessError)
        assert agents.asked == []

    async def test_in_a_run_it_is_told_of_and_else_only_guarded(self) -> None:
        agents, ledger = Agents(), RecordingLedger()
        runner = runner_for(agents, True, services())
        manager = UserContextManager(ledger=ledger)
        users = Users(manager)
        with users.running("user-1") as context:
            await ask(runner, "user-1")
            assert not [record for record in ledger.records if record.event == "agent_run"]
            async with agent_run(context, "mine"):
                await ask(runner, "user-1")
        phases: list[dict[str, Any]] = [dict(record.data) for record in ledger.records if record.event == "agent_run"]
        started = [one["agent"] for one in phases if one["phase"] == "agent_started"]
        assert started == ["mine", "closer"] or started == ["mine", "root", "adviser", "closer"]
        ended = [one["agent"] for one in phases if one["phase"] == "agent_completed"]
        assert sorted(ended) == sorted(started)

    async def test_users_of_one_plugin_do_not_end_each_others_runs(self) -> None:
        """One plugin is for all: what it has open is each run's own."""
        agents, ledger = Agents(), RecordingLedger()
        runner = runner_for(agents, True, services())
        users = Users(UserContextManager(ledger=ledger))

        async def use(user: str) -> None:
            with users.running(user) as context:
                async with agent_run(context, "mine"):
                    await ask(runner, user)

        await asyncio.gather(*map(use, FEW))
        for user in FEW:
            phases: list[dict[str, Any]] = [
                dict(each.data) for each in ledger.records if each.event == "agent_run" and each.user_id == user
            ]
            failed = [one for one in phases if one["phase"] == "agent_failed"]
            assert failed == []
            begun = sorted(one["agent"] for one in phases if one["phase"] == "agent_started")
            assert begun == sorted(one["agent"] for one in phases if one["phase"] == "agent_completed")
            assert begun == ["adviser", "closer", "mine", "root"]
