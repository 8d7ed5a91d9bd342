"""Where an event says that it comes from: from its user's own request, under the manager that sends it."""

import json

import pytest

from support.contexts import MakeManager
from support.events import connect, settled
from ucm_middleware import managed_user_context
from ucm_middleware.testing import RecordingLedger

pytestmark = pytest.mark.security


async def test_another_managers_alice_is_another_user(make_manager: MakeManager) -> None:
    ledger = RecordingLedger()
    here, elsewhere = make_manager(ledger=ledger), make_manager()
    _, client, _ = connect(here, "alice")
    here.serve()
    async with managed_user_context(elsewhere.create_isolated_context("alice", "r-of-another-app", thread_id="theirs")):
        with here.privileged(reason="a reminder", users=["alice"]):
            await here.send_event("alice", "message")
    await settled()
    [envelope] = map(json.loads, client.frames)
    assert (envelope["thread_id"], envelope["run_id"], envelope["request_id"]) == (None, None, None)
    [record] = ledger.select("event_sent")
    assert (record.actor_id, record.request_id, record.thread_id) == ("", None, None)
