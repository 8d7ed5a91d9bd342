"""What two users share whose runs are under way: nothing, with one team of agents for all."""

from pathlib import Path
from typing import Any

import pytest
from agents import Agent, RunContextWrapper, SQLiteSession, function_tool
from offline_model import OfflineModel
from offline_team import SECRET

from support.sharing import Gathering, shown
from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_openai_agents import OpenAIAgents


def managed(gathering: Gathering, path: Path, kept: Any) -> UserContextManager:
    @function_tool
    async def wait(wrapper: RunContextWrapper[UserExecutionContext]) -> str:
        """Waits."""
        wrapper.context.agent_context["kept"] = kept(wrapper)
        await gathering.wait()
        return "done"

    front = Agent("front", model=OfflineModel(), tools=[wait])
    plugin = OpenAIAgents(sessions=lambda key: SQLiteSession(key, path))
    manager = UserContextManager(plugins=[plugin], secret=SECRET)
    manager.register_agent("front", lambda _: front, stateless=True)
    return manager


@pytest.mark.parametrize("streams", [False, True])
async def test_runs_share_nothing(tmp_path: Path, streams: bool) -> None:
    gathering = Gathering()
    manager = managed(gathering, tmp_path / "sessions.db", lambda wrapper: (wrapper, wrapper.usage))
    given = {"input": "wait()", "session_id": "chat"}
    assert shown(await gathering.report(manager, "front", given, streams=streams)) == []


async def test_usage_that_both_have_is_found(tmp_path: Path) -> None:
    gathering = Gathering()
    first: list[Any] = []

    def keep(wrapper: Any) -> object:
        first.append(wrapper.usage)
        return first[0]

    manager = managed(gathering, tmp_path / "sessions.db", keep)
    found = shown(await gathering.report(manager, "front", {"input": "wait()"}))
    assert any("(Usage)" in one for one in found), found
