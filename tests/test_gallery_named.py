"""Which of the gallery's bugs the checker names, and by which object; of the clean twins it names nothing."""

import pytest

from examples.gallery import GALLERY, Bug
from support.gallery import every_bug, inspect

SHARED_AT = {
    "global_cache": "['dashboard']",
    "lru_cached_user": "['account']",
    "mutable_default": "['basket']",
    "class_attribute": "['cart']",
    "worker_variable": "['billed to']",
    "client_pool": "['payments']",
    "agent_memory": "['agent']",
    "wrong_room": "['room']",
    "broken_off_export": "['page']['account']",
    "reused_response": "['answer']",
}
"""Where in alice's `agent_context` the object is that bob reaches too.

The others leave nothing that two users reach: `request_variable` is cured, a session is closed and opened again, a
response is kept as bytes.
"""


@every_bug
def test_the_checker_names_what_the_users_share(bug: Bug) -> None:
    inspection = inspect(bug, planted=True)

    where = SHARED_AT.get(bug.name)
    if where is None:
        assert inspection.findings == []
    else:
        (finding,) = inspection.findings
        assert finding.startswith(f"alice.agent_context{where}")
        assert " is bob.agent_context" in finding


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(
            bug,
            id=bug.name,
            marks=[pytest.mark.xfail(strict=True, reason="it walks through a WebSocket into the manager's own hub")]
            if bug.name == "wrong_room"
            else [],
        )
        for bug in GALLERY
        if bug.needs is None
    ],
)
def test_nothing_is_named_of_the_clean_twin(bug: Bug) -> None:
    inspection = inspect(bug, planted=False)

    assert inspection.findings == []
    assert not [event for event in inspection.events if event["outcome"] != "ok"]
