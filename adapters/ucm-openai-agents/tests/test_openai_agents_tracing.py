"""The SDK's own tracing: by default it sends everything out, and mixes users where code around them traces."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from agents import RunConfig, Runner, SQLiteSession, custom_span, trace
from agents.tracing import Span, Trace, TracingProcessor, get_current_span, get_current_trace, set_trace_provider
from agents.tracing.provider import DefaultTraceProvider
from agents.tracing.setup import get_trace_provider
from offline_team import EVERYTHING, Team, secret_of

from ucm_openai_agents import OpenAIAgents

USERS = [f"user-{number}" for number in range(4)]


class Exported(TracingProcessor):
    """What would be sent to OpenAI."""

    def __init__(self) -> None:
        self.traces: list[dict[str, Any]] = []
        self.spans: list[dict[str, Any]] = []

    def on_trace_start(self, trace: Trace) -> None:
        self.traces.append(trace.export() or {})

    def on_trace_end(self, trace: Trace) -> None: ...

    def on_span_start(self, span: Span[Any]) -> None: ...

    def on_span_end(self, span: Span[Any]) -> None:
        self.spans.append(span.export() or {})

    def shutdown(self) -> None: ...

    def force_flush(self) -> None: ...

    def trace_ids_of(self, secret: str) -> set[str]:
        """The traces of spans that show a secret."""
        return {span["trace_id"] for span in self.spans if secret in repr(span)}


@pytest.fixture
def exported() -> Iterator[Exported]:
    """The SDK's tracing is on, and what it exports is here."""
    before = get_trace_provider()
    provider = DefaultTraceProvider()
    provider.set_disabled(False)
    exported = Exported()
    provider.set_processors([exported])
    set_trace_provider(provider)
    yield exported
    set_trace_provider(before)


async def test_bare_users_are_mixed_in_the_trace_of_the_code_around_them_with_all_that_they_said(
    exported: Exported,
) -> None:
    team = Team()
    with trace("the application"):
        await asyncio.gather(*(Runner.run(team.front, EVERYTHING, context=user) for user in USERS))
    seen = [exported.trace_ids_of(secret_of(user)) for user in USERS]
    assert len({frozenset(ids) for ids in seen}) == 1
    assert all(seen)


CONFIGS = {
    "no run config": None,
    "a run config": RunConfig(workflow_name="chat", group_id="everybody", tracing_disabled=False),
}


@pytest.mark.parametrize("around", [True, False], ids=["inside of a trace", "in none"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
async def test_nothing_of_a_run_is_traced_unless_it_is_asked_for(
    exported: Exported, config: RunConfig | None, around: bool
) -> None:
    team = Team()
    # One that would be traced, if it were for its own settings.
    team.front.tools.append(team.helper.as_tool("ask_too", "", run_config=RunConfig(tracing_disabled=False)))
    manager = team.manager(OpenAIAgents(run_config=config))

    async def talk(user: str) -> None:
        given = {"input": f"ask_too(input=recall()); {EVERYTHING}"}
        await manager.execute_with_agent(user, "front", given)
        async with manager.stream_with_agent(user, "front", given) as stream:
            [event async for event in stream]

    if around:
        with trace("the application"):
            await asyncio.gather(*map(talk, USERS))
            assert get_current_trace() is not None  # and that one goes on
    else:
        await asyncio.gather(*map(talk, USERS))
    assert exported.spans == []
    assert [found["workflow_name"] for found in exported.traces] == ["the application"] * around


async def test_where_it_is_asked_for_each_run_has_a_trace_of_its_own_without_what_was_said(exported: Exported) -> None:
    team = Team()
    manager = team.manager(OpenAIAgents(tracing=True, sessions=SQLiteSession))

    async def talk(user: str) -> None:
        given = {"input": f"{EVERYTHING}; say {secret_of(user)}", "session_id": "chat"}
        await manager.execute_with_agent(user, "front", given)
        async with manager.stream_with_agent(user, "front", given) as stream:
            [event async for event in stream]

    with trace("the application") as outer, custom_span("around") as around:
        await asyncio.gather(*map(talk, USERS))
        assert get_current_trace() is outer
        assert get_current_span() is around
    assert [exported.trace_ids_of(secret_of(user)) for user in USERS] == [set()] * len(USERS)
    traces = {found["id"]: found for found in exported.traces if found["id"] != outer.trace_id}
    assert len(traces) == 2 * len(USERS)
    spans = [span for span in exported.spans if span["trace_id"] != outer.trace_id]
    assert {span["trace_id"] for span in spans} == set(traces)
    assert not [span for span in spans if span["parent_id"] == around.span_id]
    groups = [found["group_id"] for found in traces.values()]
    assert len(set(groups)) == len(USERS)  # the conversations, by their keys
    assert all(group.startswith("ucm1_") for group in groups)
    assert not [found for found in exported.traces + exported.spans if "user-" in repr(found)]
