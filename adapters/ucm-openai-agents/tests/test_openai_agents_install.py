"""The distribution as it is installed: its entry point, and a framework that is absent or too old."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from agents import Agent
from offline_model import OfflineModel

import ucm_openai_agents
from ucm_middleware import IsolatedEnvironment, UserContextManager


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


PATCHED = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == "openai-agents":
        {found}
    return real(name)
metadata.version = version
from ucm_middleware import UserContextManager
UserContextManager(plugins=["openai-agents"])
"""


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("raise metadata.PackageNotFoundError(name)", "which is not installed"),
        ("return '0.23.9'", "needs openai-agents 0.24 or later, and 0.23.9 is installed"),
    ],
)
def test_a_framework_that_is_absent_or_too_old_is_named_with_what_to_install(found: str, told: str) -> None:
    code = PATCHED.format(found=found)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "PluginError" in ended.stderr
    assert told in ended.stderr
    assert "pip install 'openai-agents>=0.24'" in ended.stderr


def test_later_versions_are_taken() -> None:
    code = PATCHED.format(found="return '1.0rc1'")
    subprocess.run([sys.executable, "-c", code], check=True)
