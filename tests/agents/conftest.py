"""A manager whose ledger keeps every record."""

import pytest

from support.contexts import MakeManager
from ucm_middleware import UserContextManager
from ucm_middleware.testing import RecordingLedger


@pytest.fixture
def ledger() -> RecordingLedger:
    return RecordingLedger()


@pytest.fixture
def manager(make_manager: MakeManager, ledger: RecordingLedger) -> UserContextManager:
    return make_manager(ledger=ledger)
