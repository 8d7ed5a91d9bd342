"""LangGraph and LangChain agents that run as one user: an adapter of ucm-middleware."""

from ucm_langgraph import framework as framework  # before all that imports LangGraph
from ucm_langgraph.cache import OwnedCache
from ucm_langgraph.checkpoints import OwnedCheckpointer
from ucm_langgraph.handlers import OwnerGuard
from ucm_langgraph.plugin import LangGraph
from ucm_langgraph.store import OwnedStore

__all__ = ["LangGraph", "OwnedCache", "OwnedCheckpointer", "OwnedStore", "OwnerGuard", "plugin"]

plugin = LangGraph()
"""What the entry point ``langgraph`` loads. For other settings, give the manager a ``LangGraph`` of your own."""
