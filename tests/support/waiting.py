"""Waiting for a condition, as the public helpers do."""

from ucm_middleware.testing.waiting import PATIENCE, wait_until

__all__ = ["PATIENCE", "wait_until"]
