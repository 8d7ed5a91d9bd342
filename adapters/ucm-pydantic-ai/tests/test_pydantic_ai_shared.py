"""What two users share whose runs are under way: nothing, with the agent of all users and with agents of their own."""

import secrets
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import FunctionToolset

from support.sharing import Gathering, shown
from ucm_middleware import UserContextManager, UserExecutionContext
from ucm_pydantic_ai import PydanticAI, SQLiteConversationStore


def agent_of(gathering: Gathering, model: TestModel) -> Agent[UserExecutionContext, str]:
    async def wait(ctx: RunContext[UserExecutionContext]) -> str:
        ctx.deps.agent_context["kept"] = ctx.agent, ctx.model, ctx.messages, ctx.usage, ctx.prompt
        await gathering.wait()
        return "done"

    return Agent(model, deps_type=UserExecutionContext, tools=[wait], toolsets=[FunctionToolset[Any]()])


@pytest.mark.parametrize("is_stateless", [False, True])
@pytest.mark.parametrize("streams", [False, True])
async def test_runs_share_nothing(sqlite_store: SQLiteConversationStore, is_stateless: bool, streams: bool) -> None:
    gathering = Gathering()
    model = TestModel()
    manager = UserContextManager(plugins=[PydanticAI(conversations=sqlite_store)], secret=secrets.token_bytes(32))
    one = agent_of(gathering, model)
    manager.register_agent(
        "helper",
        (lambda _: one) if is_stateless else (lambda _: agent_of(gathering, model)),
        stateless=is_stateless,
    )
    given = {"prompt": "go on", "conversation_id": "chat"}
    assert shown(await gathering.report(manager, "helper", given, streams=streams)) == []


async def test_what_both_have_is_found() -> None:
    gathering = Gathering()
    first: list[Any] = []

    async def wait(ctx: RunContext[UserExecutionContext]) -> str:
        first.append(ctx.messages)
        ctx.deps.agent_context["given"] = first[0]
        await gathering.wait()
        return "done"

    plugged = UserContextManager(plugins=[PydanticAI()])
    plugged.register_agent("helper", lambda _: Agent(TestModel(), deps_type=UserExecutionContext, tools=[wait]))
    found = shown(await gathering.report(plugged, "helper", {"prompt": "go on"}))
    assert any("bob.agent_context['given'] (list)" in one for one in found), found
