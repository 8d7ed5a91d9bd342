"""Refuses to go on without Pydantic AI, or with one that is too old: imported before anything that needs it."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

DISTRIBUTION: Final = "pydantic-ai-slim"
"""What both of the framework's distributions, whole and slim, install."""

NEEDED: Final = (2, 68)
"""The version that the tests ran with."""


def require_framework() -> None:
    """Raises ImportError that names what is installed, what is needed, and the command that installs it."""
    needed = ".".join(map(str, NEEDED))
    command = f"pip install '{DISTRIBUTION}>={needed}'"
    try:
        installed = version(DISTRIBUTION)
    except PackageNotFoundError:
        raise ImportError(
            f"ucm-pydantic-ai needs {DISTRIBUTION} {needed} or later, and none is installed: {command}"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < NEEDED:
        raise ImportError(
            f"ucm-pydantic-ai needs {DISTRIBUTION} {needed} or later, and {installed} is installed: {command}"
        )


require_framework()
