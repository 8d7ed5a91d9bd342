"""What two users share whose runs are under way: nothing, with one graph for all."""

import secrets
from typing import Any

import pytest
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.prebuilt import ToolRuntime
from langgraph.store.memory import InMemoryStore

from langgraph_agents import ToolModel, agent, ask
from support.sharing import Gathering, shown
from ucm_langgraph import LangGraph, OwnedCache, OwnedCheckpointer, OwnedStore
from ucm_middleware import UserContextManager, UserExecutionContext, current_context


def managed(gathering: Gathering, kept: Any) -> UserContextManager:
    @tool
    async def wait(text: str, runtime: ToolRuntime[UserExecutionContext]) -> str:
        """Waits."""
        current_context().agent_context["kept"] = kept(runtime)
        await gathering.wait()
        return text

    made = agent(
        ToolModel(),
        wait,
        context_schema=UserExecutionContext,
        checkpointer=OwnedCheckpointer(InMemorySaver()),
        store=OwnedStore(InMemoryStore()),
        cache=OwnedCache(InMemoryCache()),
    )
    manager = UserContextManager(plugins=[LangGraph()], secret=secrets.token_bytes(32))
    manager.register_agent("talk", lambda _: made, stateless=True)
    return manager


@pytest.mark.parametrize("streams", [False, True])
async def test_runs_share_nothing(streams: bool) -> None:
    gathering = Gathering()
    manager = managed(gathering, lambda runtime: (runtime.state, runtime.store))
    given = {"input": ask("use wait: now"), "thread_id": "trip"}
    assert shown(await gathering.report(manager, "talk", given, streams=streams)) == []


async def test_a_state_that_both_have_is_found() -> None:
    gathering = Gathering()
    first: list[Any] = []

    def keep(runtime: Any) -> object:
        first.append(runtime.state["messages"])
        return first[0]

    manager = managed(gathering, keep)
    found = shown(await gathering.report(manager, "talk", {"input": ask("use wait: now"), "thread_id": "trip"}))
    assert found == ["alice.agent_context['kept'] is bob.agent_context['kept'] (list)"]
