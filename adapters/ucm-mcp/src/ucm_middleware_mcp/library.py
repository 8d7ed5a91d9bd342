"""Whether the installed SDK, and FastMCP, are those that this was written for."""

import re
from importlib.metadata import version
from typing import Final

from ucm_middleware import ConfigurationError

MCP_FLOOR: Final = (2, 3)
FASTMCP_FLOOR: Final = (4, 2)


def require(distribution: str, floor: tuple[int, int]) -> None:
    """Raise ConfigurationError when a distribution is older than its floor."""
    found = version(distribution)
    numbers = tuple(int(digits[0]) for part in found.split(".")[:2] if (digits := re.match(r"\d+", part)))
    if numbers < floor:
        needed = ".".join(map(str, floor))
        raise ConfigurationError(
            f"{distribution} {found} is installed, and ucm-middleware-mcp needs {needed} or later: "
            f"pip install '{distribution}>={needed}'"
        )
