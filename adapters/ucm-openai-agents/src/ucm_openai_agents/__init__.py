"""OpenAI agents that run as one user: an adapter of ucm-middleware."""

from ucm_openai_agents.framework import require_framework

require_framework()

from ucm_openai_agents.plugin import OpenAIAgents  # noqa: E402
from ucm_openai_agents.sessions import OwnedSession, OwnedSessions  # noqa: E402
from ucm_openai_agents.watch import guard_agent  # noqa: E402

__all__ = ["OpenAIAgents", "OwnedSession", "OwnedSessions", "guard_agent", "plugin"]

plugin = OpenAIAgents()
"""What the entry point ``openai-agents`` loads. For sessions, give the manager an ``OpenAIAgents`` of your own."""
