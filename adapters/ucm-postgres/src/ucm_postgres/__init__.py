"""Transactions on PostgreSQL that belong to one user: an adapter of ucm-middleware."""

from ucm_postgres.binding import Binding
from ucm_postgres.policies import install_keys, policy_sql, setup_sql
from ucm_postgres.reset import RESET
from ucm_postgres.signing import PURPOSE

__all__ = ["PURPOSE", "RESET", "Binding", "install_keys", "policy_sql", "setup_sql"]
