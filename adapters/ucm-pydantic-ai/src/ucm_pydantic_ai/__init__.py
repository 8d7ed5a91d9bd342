"""Pydantic AI agents that run as one user: an adapter of ucm-middleware."""

# First, since it says what is missing.
import ucm_pydantic_ai.framework  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split
from ucm_pydantic_ai.asked import Prepared
from ucm_pydantic_ai.conversations import UserConversations
from ucm_pydantic_ai.runner import PydanticAI
from ucm_pydantic_ai.sqlite import SQLiteConversationStore
from ucm_pydantic_ai.steps import UserRuns
from ucm_pydantic_ai.threads import ToolThreads

__all__ = [
    "Prepared",
    "PydanticAI",
    "SQLiteConversationStore",
    "ToolThreads",
    "UserConversations",
    "UserRuns",
    "plugin",
]

plugin = PydanticAI()
"""What the entry point ``pydantic_ai`` loads: without conversations. For those, give the manager a ``PydanticAI``."""
