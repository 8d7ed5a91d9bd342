"""The census: what still holds a context after its teardown, and what is done about it."""

from ucm_middleware.census.policy import CensusPolicy

__all__ = ["CensusPolicy"]
