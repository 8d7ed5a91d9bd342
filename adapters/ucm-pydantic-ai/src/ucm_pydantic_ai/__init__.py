"""Pydantic AI agents that run as one user: an adapter of ucm-middleware."""

import ucm_pydantic_ai.framework  # noqa: F401 - first, since it says what is missing

# isort: split
from ucm_pydantic_ai.conversations import UserConversations
from ucm_pydantic_ai.sqlite import SQLiteConversationStore

__all__ = ["SQLiteConversationStore", "UserConversations"]
