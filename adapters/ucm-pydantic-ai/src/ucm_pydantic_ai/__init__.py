"""Pydantic AI agents that run as one user: an adapter of ucm-middleware."""
