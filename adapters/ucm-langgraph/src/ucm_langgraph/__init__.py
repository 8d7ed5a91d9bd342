"""LangGraph and LangChain agents that run as one user: an adapter of ucm-middleware."""
