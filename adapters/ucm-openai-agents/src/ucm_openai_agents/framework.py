"""Which version of the framework is installed: asked before anything of it is imported."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

NEEDED: Final = (0, 24)
AGENT_OF_TOOL: Final = "_agent_instance"
"""Where a tool has the agent that it is made of; the SDK has no public name for it."""

_INSTALL: Final = f"pip install 'openai-agents>={NEEDED[0]}.{NEEDED[1]}'"


def require_framework() -> None:
    """Raises ImportError, which says what to install, when the OpenAI Agents SDK is absent or too old."""
    try:
        installed = version("openai-agents")
    except PackageNotFoundError:
        absent = "ucm-openai-agents needs the OpenAI Agents SDK, which is not installed"
        raise ImportError(f"{absent}: {_INSTALL}") from None
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < NEEDED:
        raise ImportError(
            f"ucm-openai-agents needs openai-agents {NEEDED[0]}.{NEEDED[1]} or later, and {installed} is installed: "
            f"{_INSTALL}"
        )


def require_insides(tool: type[Any]) -> None:
    """Raises ImportError for a ``FunctionTool`` without what the adapter stands on, since unwatched is unguarded."""
    fields = getattr(tool, "__dataclass_fields__", {})
    if AGENT_OF_TOOL not in fields or not hasattr(tool, "__post_init__") or "__wrapped__" not in vars(tool):
        raise ImportError(
            f"openai-agents {version('openai-agents')} makes tools of functions and agents in a way that this "
            "ucm-openai-agents does not know; install a later ucm-openai-agents, or "
            f"pip install 'openai-agents=={NEEDED[0]}.{NEEDED[1]}.*'"
        )
