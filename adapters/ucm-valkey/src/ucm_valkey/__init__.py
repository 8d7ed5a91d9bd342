"""Caches on Valkey and Redis that belong to one user: an adapter of ucm-middleware."""
