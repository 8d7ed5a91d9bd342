"""Agents that run as one user: registered by name, run in contexts of their own, told of as they go."""

from ucm_middleware.agents.policy import AgentPolicy
from ucm_middleware.agents.run import AgentRun, agent_run, current_run
from ucm_middleware.agents.stragglers import Straggler
from ucm_middleware.agents.stream import AgentStream
from ucm_middleware.agents.tools import ToolCall

__all__ = ["AgentPolicy", "AgentRun", "AgentStream", "Straggler", "ToolCall", "agent_run", "current_run"]
