"""The distribution as it is installed: its entry point, and what it says where LangGraph is missing or too old."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points

import pytest

import ucm_langgraph
from ucm_langgraph import framework
from ucm_middleware import IsolatedEnvironment, UserContextManager


def test_the_entry_point_leads_to_the_plugin() -> None:
    (found,) = entry_points(group="ucm_middleware", name="langgraph")
    assert found.load() is ucm_langgraph.plugin
    assert found.dist is not None
    assert found.dist.name == "ucm-langgraph"


def test_a_deployment_can_allow_it_by_name() -> None:
    allowed = UserContextManager(environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "langgraph"}))
    assert allowed.hooks.run_agent
    assert allowed.hooks.stream_agent


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, "needs langgraph 1.2.24 or later, which is not installed: pip install 'langgraph>=1.2.24'"),
        ("0.6.11", "is installed in version 0.6.11: pip install"),
        ("1.2.23", "is installed in version 1.2.23"),
        ("1.2.24rc1", None),
        ("1.2.24", None),
        ("1.10.0", None),
        ("2.0", None),
    ],
)
def test_a_version_that_does_not_do(monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str | None) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise PackageNotFoundError("langgraph")
        return installed

    monkeypatch.setattr(framework, "version", version)
    if said is None:
        framework.require("langgraph", framework.FLOOR)
        return
    with pytest.raises(ImportError) as caught:
        framework.require("langgraph", framework.FLOOR)
    assert said in str(caught.value)


@pytest.mark.parametrize("what", ["the package", "the plugin", "the middleware"])
def test_it_is_said_at_the_import(what: str) -> None:
    """In a process of its own, before anything of LangGraph is imported."""
    missing = "langchain" if what == "the middleware" else "langgraph"
    act = {
        "the package": "import ucm_langgraph",
        "the plugin": "from ucm_middleware import UserContextManager; UserContextManager(plugins=['langgraph'])",
        "the middleware": "import ucm_langgraph.middleware",
    }[what]
    code = f"""
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == {missing!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
try:
    {act}
except Exception as error:
    print(type(error).__name__, error)
    print({missing!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    kind, imported = done.stdout.strip().rsplit("\n", 1)
    assert kind.startswith("PluginError" if what == "the plugin" else "ImportError")
    assert f"ucm-langgraph needs {missing}" in kind
    assert "pip install" in kind
    assert imported == "False"
