"""LangGraph and LangChain agents that run as one user: an adapter of ucm-middleware."""

from ucm_langgraph.cache import OwnedCache
from ucm_langgraph.checkpoints import OwnedCheckpointer
from ucm_langgraph.store import OwnedStore

__all__ = ["OwnedCache", "OwnedCheckpointer", "OwnedStore"]
