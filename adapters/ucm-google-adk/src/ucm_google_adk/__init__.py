"""Agents of Google's ADK that run as one user: an adapter of ucm-middleware."""
