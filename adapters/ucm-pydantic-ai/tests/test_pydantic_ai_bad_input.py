"""What does not fit: a clear error that names the agent and the remedy, and everybody else's runs go on."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from typing import Any

import pytest
from pydantic_ai import Agent, UsageLimits
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models.test import TestModel
from pydantic_ai.models.wrapper import WrapperModel

import ucm_pydantic_ai
from ucm_middleware import (
    AgentError,
    AgentParametersError,
    ConfigurationError,
    IsolatedEnvironment,
    UserContextManager,
)
from ucm_middleware.testing import RecordingLedger
from ucm_pydantic_ai import Prepared, PydanticAI, framework

HISTORY = [ModelRequest(parts=[UserPromptPart("hello")])]


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(ledger: RecordingLedger) -> UserContextManager:
    manager = UserContextManager(plugins=[PydanticAI()], ledger=ledger)
    manager.register_agent("echo", lambda context: Agent(TestModel(custom_output_text="hello")))
    return manager


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({}, "there is no prompt"),
        (None, "there is no prompt"),
        ({"prompt": None}, "there is no prompt"),
        ({"prompt": 7}, "prompt is a int"),
        ({"prompt": b"hello"}, "prompt is a bytes"),
        ({"prompt": {"text": "hello"}}, "prompt is a dict"),
        ({"prompt": "hello", "conversation_id": 7}, "conversation_id is a int"),
        ({"prompt": "hello", "message_history": [{"role": "system"}]}, "message_history is a list"),
        ({"prompt": "hello", "usage_limits": 7}, "usage_limits is a int"),
        ({"prompt": "hello", "user_id": "bob"}, "no parameter 'user_id'"),
        ({"prompt": "hello", "deps": "mine"}, "no parameter 'deps'"),
        ({"prompt": "hello", "conversation_id": "c1", "message_history": HISTORY}, "both"),
        ({"prompt": "hello", "conversation_id": "c1"}, "kept nowhere"),
    ],
)
async def test_parameters_that_do_not_fit(
    manager: UserContextManager, parameters: dict[str, Any] | None, problem: str
) -> None:
    with pytest.raises(AgentParametersError, match=problem) as caught:
        await manager.execute_with_agent("alice", "echo", parameters)
    assert caught.value.agent == "echo"
    assert caught.value.remedy
    with pytest.raises(AgentParametersError, match=problem):
        async with manager.stream_with_agent("alice", "echo", parameters) as stream:
            await anext(stream)
    assert (await manager.execute_with_agent("alice", "echo", {"prompt": "hello"})).output == "hello"


async def test_parameters_that_do_fit(manager: UserContextManager) -> None:
    given = {"prompt": ["hello", "there"], "message_history": HISTORY, "metadata": {"of": "a test"}}
    result = await manager.execute_with_agent("alice", "echo", {**given, "model_settings": {"temperature": 0.0}})
    assert [part.content for part in result.all_messages()[0].parts] == ["hello"]
    with pytest.raises(UsageLimitExceeded):
        limits = UsageLimits(request_limit=0)
        await manager.execute_with_agent("alice", "echo", {"prompt": "hello", "usage_limits": limits})


async def test_an_agent_of_another_framework_is_not_ours(manager: UserContextManager) -> None:
    class Other:
        pass

    manager.register_agent("other", lambda context: Other())
    with pytest.raises(AgentError, match="name the plugin of its framework"):
        await manager.execute_with_agent("alice", "other", {"prompt": "hello"})
    manager.register_agent("function", lambda context: lambda prompt: echo(prompt))
    assert await manager.execute_with_agent("alice", "function", {"prompt": "hello"}) == "hello"


async def echo(prompt: str) -> str:
    return prompt


async def test_an_agent_of_the_framework_without_the_plugin_says_so() -> None:
    manager = UserContextManager()
    manager.register_agent("echo", lambda context: Agent(TestModel()))
    with pytest.raises(AgentError, match="name the plugin of its framework"):
        await manager.execute_with_agent("alice", "echo", {"prompt": "hello"})


@pytest.mark.parametrize("prepared", [False, True], ids=["bare", "prepared"])
async def test_a_shared_agent_is_refused_unless_it_is_said_to_be_stateless(
    manager: UserContextManager, prepared: bool
) -> None:
    agent = Agent(TestModel(custom_output_text="hello"))
    manager.register_agent("shared", lambda context: Prepared(agent) if prepared else agent)
    await manager.execute_with_agent("alice", "shared", {"prompt": "hello"})
    with pytest.raises(AgentError, match="stateless=True"):
        await manager.execute_with_agent("bob", "shared", {"prompt": "hello"})


async def test_an_agent_that_wants_other_deps_says_how_to_give_them(manager: UserContextManager) -> None:
    manager.register_agent("wants", lambda context: Agent(TestModel(), deps_type=dict))
    with pytest.raises(AgentError, match="Prepared"):
        await manager.execute_with_agent("alice", "wants", {"prompt": "hello"})


@pytest.mark.parametrize("deps_type", [object, type(None), dict[str, str] | None])
async def test_deps_that_say_little_are_the_context(manager: UserContextManager, deps_type: Any) -> None:
    manager.register_agent("any", lambda context: Agent(TestModel(custom_output_text="hello"), deps_type=deps_type))
    assert (await manager.execute_with_agent("alice", "any", {"prompt": "hello"})).output == "hello"


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no agent of Pydantic AI's"):
        Prepared("agent")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="conversation, user_prompt cannot be settled"):
        Prepared(Agent(TestModel()), user_prompt="hello", conversation=None)


class Heard(WrapperModel):
    """A model of which a test sees with which settings it was asked."""

    def __init__(self, wrapped: TestModel) -> None:
        super().__init__(wrapped)
        self.asked: list[Any] = []

    async def request(self, messages: Any, model_settings: Any, model_request_parameters: Any) -> Any:
        self.asked.append(model_settings)
        return await super().request(messages, model_settings, model_request_parameters)


async def test_agents_in_another_s_overrides_and_wrapped_ones_go_the_public_way(
    manager: UserContextManager, ledger: RecordingLedger
) -> None:
    """Where the hooks cannot be put in an agent once and for all, they are given to the run."""
    from pydantic_ai.agent import WrapperAgent

    called = []

    def tool() -> str:
        called.append("tool")
        return "done"

    agent = Agent(TestModel(), tools=[tool])
    manager.register_agent("wrapped", lambda context: WrapperAgent(agent))
    await manager.execute_with_agent("alice", "wrapped", {"prompt": "hello"})
    manager.register_agent("plain", lambda context: agent, stateless=True)
    with agent.override(model=WrapperModel(TestModel())):
        await manager.execute_with_agent("alice", "plain", {"prompt": "hello"})
    with agent.override(spec={"capabilities": ["Thinking"]}), agent.override(model=(model := Heard(TestModel()))):
        await manager.execute_with_agent("alice", "plain", {"prompt": "hello"})
    assert {"thinking": True} in model.asked  # the override is in force
    assert called == ["tool"] * 3
    told = [dict(record.data)["phase"] for record in ledger.select("agent_run")]
    assert told.count("tool_executing") == 3


# The distribution, and the framework that it needs.


def test_the_entry_point_leads_to_the_plugin() -> None:
    (found,) = entry_points(group="ucm_middleware", name="pydantic_ai")
    assert found.load() is ucm_pydantic_ai.plugin
    assert found.dist is not None
    assert found.dist.name == "ucm-pydantic-ai"


async def test_a_deployment_can_allow_it_by_name() -> None:
    manager = UserContextManager(environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "pydantic_ai"}))
    manager.register_agent("echo", lambda context: Agent(TestModel(custom_output_text="hello")))
    assert (await manager.execute_with_agent("alice", "echo", {"prompt": "hello"})).output == "hello"


@pytest.mark.parametrize("installed", ["1.99.0", "2.67.3", "nonsense"])
def test_a_framework_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(framework, "version", lambda name: installed)
    with pytest.raises(ImportError, match=f"2.68 or later, and {installed} is installed: pip install"):
        framework.require_framework()


@pytest.mark.parametrize("installed", ["2.68.0", "2.100.0", "3.0.0b1"])
def test_a_framework_that_is_new_enough_is_not(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(framework, "version", lambda name: installed)
    framework.require_framework()


def test_without_the_framework_the_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(framework, "version", missing)
    with pytest.raises(ImportError, match=r"none is installed: pip install 'pydantic-ai-slim>=2\.68'"):
        framework.require_framework()


_ABSENT = """
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == "pydantic-ai-slim":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.modules["pydantic_ai"] = None
from ucm_middleware import UserContextManager
UserContextManager(plugins=["pydantic_ai"])
"""


def test_a_manager_that_loads_it_without_the_framework_says_so_too() -> None:
    ended = subprocess.run([sys.executable, "-c", _ABSENT], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "PluginError" in ended.stderr
    assert "pip install 'pydantic-ai-slim>=2.68'" in ended.stderr
