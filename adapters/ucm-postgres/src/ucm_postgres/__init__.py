"""Transactions on PostgreSQL that belong to one user: an adapter of ucm-middleware."""

from ucm_postgres.binding import Binding
from ucm_postgres.reset import RESET

__all__ = ["RESET", "Binding"]
