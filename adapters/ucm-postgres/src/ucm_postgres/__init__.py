"""Transactions on PostgreSQL that belong to one user: an adapter of ucm-middleware."""
