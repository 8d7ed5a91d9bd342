"""The distribution as it is installed: its entry point, and a framework that is absent or too old."""

import sys
from importlib import metadata
from importlib.metadata import entry_points

import pytest
from agents import Agent, FunctionTool
from offline_model import OfflineModel

import ucm_openai_agents
from ucm_middleware import IsolatedEnvironment, PluginError, UserContextManager
from ucm_openai_agents.framework import require_insides


def test_the_entry_point_leads_to_the_plugin() -> None:
    (found,) = entry_points(group="ucm_middleware", name="openai-agents")
    assert found.load() is ucm_openai_agents.plugin
    assert found.dist is not None
    assert found.dist.name == "ucm-openai-agents"


@pytest.mark.parametrize("way", ["by the deployment", "by name"])
async def test_it_runs_agents_when_it_is_named(way: str) -> None:
    if way == "by name":
        manager = UserContextManager(plugins=["openai-agents"])
    else:
        manager = UserContextManager(environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "openai-agents"}))
    agent = Agent("front", model=OfflineModel())
    manager.register_agent("front", lambda _: agent, stateless=True)
    assert (await manager.execute_with_agent("alice", "front", {"input": "say hi"})).final_output == "hi"


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is imported once more, and forgotten after the test."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ucm_openai_agents"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "which is not installed"),
        ("0.23.9", "needs openai-agents 0.24 or later, and 0.23.9 is installed"),
    ],
)
def test_a_framework_that_is_absent_or_too_old_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: str | None, told: str
) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(PluginError) as caught:
        UserContextManager(plugins=["openai-agents"])
    assert told in str(caught.value)
    assert "pip install 'openai-agents>=0.24'" in str(caught.value)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("found", ["0.24.0", "0.30.1", "1.0rc1"])
def test_later_versions_are_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend(monkeypatch, found)
    UserContextManager(plugins=["openai-agents"])


@pytest.mark.usefixtures("afresh")
def test_one_whose_inside_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else tools would go unwatched, and nobody would know."""

    class Unwrapped:
        __dataclass_fields__ = FunctionTool.__dataclass_fields__
        __post_init__ = FunctionTool.__post_init__

    told = r"makes tools of functions and agents .*pip install 'openai-agents==0\.24"
    with pytest.raises(ImportError, match=told):
        require_insides(Unwrapped)
    monkeypatch.delitem(FunctionTool.__dataclass_fields__, "_agent_instance")
    with pytest.raises(PluginError, match=told):
        UserContextManager(plugins=["openai-agents"])


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    """That another version is installed, or none."""
    real = metadata.version

    def version(name: str) -> str:
        if name != "openai-agents":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
