"""The distribution as it is installed, and what it says of an ADK that is not as it should be."""

import importlib
import importlib.metadata
import sys
from importlib.metadata import PackageNotFoundError, entry_points

import pytest

import ucm_google_adk
from offline import OfflineModel
from ucm_google_adk.installed import require_adk
from ucm_middleware import IsolatedEnvironment, PluginError, UserContextManager


async def test_code_and_a_deployment_can_name_it() -> None:
    from google.adk.agents.llm_agent import LlmAgent

    (found,) = entry_points(group="ucm_middleware", name="google-adk")
    assert found.load() is ucm_google_adk.google_adk
    assert found.dist is not None
    assert found.dist.name == "ucm-google-adk"
    allowed = UserContextManager(
        environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "google-adk", "UCM_ENVIRONMENT": "testing"})
    )
    for manager in (allowed, UserContextManager(plugins=["google-adk"])):
        manager.register_agent("helper", lambda context: LlmAgent(name="helper", model=OfflineModel(answer="hello")))
        assert (await manager.execute_with_agent("alice", "helper", {"message": "go"})).text == "hello"


def test_an_adk_that_is_too_old_or_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> str:
        raise PackageNotFoundError

    for version, told in ((lambda _: "2.9.1", "found 2.9.1"), (lambda _: "1.33.0", "found 1.33.0"), (absent, "none")):
        monkeypatch.setattr("ucm_google_adk.installed.version", version)
        with pytest.raises(
            ImportError, match=rf"needs google-adk 2.13 or later.*{told}.*pip install 'google-adk>=2.13'"
        ):
            require_adk()
    for fine in ("2.13.0", "2.14.1rc1", "3.0"):
        monkeypatch.setattr("ucm_google_adk.installed.version", lambda _, fine=fine: fine)
        require_adk()


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        ("google.adk.runners.Runner", "_collect_toolset", "closes toolsets"),
        ("google.adk.utils._sync_runner", "_get_tool_thread_pool", "runs tools in threads"),
    ],
)
def test_an_adk_whose_inside_is_another_is_named(
    monkeypatch: pytest.MonkeyPatch, owner: str, name: str, told: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "ucm_google_adk"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(f"{owner}.{name}")
    with pytest.raises(ImportError, match=rf"google-adk 2\..* {told} .*pip install 'google-adk==2\.13"):
        importlib.import_module("ucm_google_adk")


def test_the_manager_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ucm_google_adk"]:
        monkeypatch.delitem(sys.modules, name)
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1" if name == "google-adk" else found(name))
    with pytest.raises(PluginError, match="google-adk"):
        UserContextManager(plugins=["google-adk"])
