"""A real PostgreSQL, and the SDK's own tracing off in the process, but where a test is about it."""

import pytest
from agents import set_tracing_disabled

from support.databases import database, postgres_server

__all__ = ["database", "postgres_server"]


@pytest.fixture(scope="session", autouse=True)
def _no_tracing() -> None:
    set_tracing_disabled(True)
