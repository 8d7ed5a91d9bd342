"""Which version of the framework is installed: asked before anything of it is imported."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

NEEDED: Final = (0, 24)
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
