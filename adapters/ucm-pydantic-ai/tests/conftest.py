"""What the tests of this adapter share: fixtures alone."""

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ucm_middleware import UserContextManager
from ucm_pydantic_ai import SQLiteConversationStore


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager(secret=secrets.token_bytes(32))


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[SQLiteConversationStore]:
    store = SQLiteConversationStore(tmp_path / "conversations.db")
    yield store
    await store.aclose()
