"""What two users share whose runs are under way: nothing, with one agent for all and with agents of their own."""

from typing import Any

import pytest
from google.adk.agents.llm_agent import LlmAgent
from google.adk.tools.tool_context import ToolContext

from offline import OfflineModel
from support.sharing import Gathering, shown
from ucm_google_adk import GoogleADK
from ucm_middleware import UserContextManager, current_context


def managed(gathering: Gathering, kept: Any, *, is_stateless: bool = False) -> UserContextManager:
    async def wait(tool_context: ToolContext) -> str:
        """Wait."""
        current_context().agent_context["kept"] = kept(tool_context)
        await gathering.wait()
        return "done"

    def make() -> LlmAgent:
        return LlmAgent(name="helper", description="helper", model=OfflineModel(calls=(("wait", {}),)), tools=[wait])

    one = make()
    manager = UserContextManager(plugins=[GoogleADK("shop")])
    manager.register_agent("helper", lambda _: one if is_stateless else make(), stateless=is_stateless)
    return manager


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("is_stateless", [False, True])
async def test_runs_share_nothing(is_stateless: bool, streams: bool) -> None:
    gathering = Gathering()
    manager = managed(
        gathering, lambda context: (context.state, context.user_content, context.actions), is_stateless=is_stateless
    )
    given = {"message": "wait", "session_id": "chat"}
    assert shown(await gathering.report(manager, "helper", given, streams=streams)) == []


async def test_a_state_that_both_have_is_found() -> None:
    gathering = Gathering()
    first: list[Any] = []

    def keep(context: Any) -> object:
        first.append(context.state)
        return first[0]

    found = shown(await gathering.report(managed(gathering, keep), "helper", {"message": "wait"}))
    assert any("(State)" in one for one in found), found
