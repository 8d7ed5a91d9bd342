"""Which of checker, census and guard names each bug of the gallery, and how; of the clean twins none names anything."""

from dataclasses import dataclass
from typing import Any

from examples.gallery import GALLERY, Bug
from support.gallery import Inspection, every_bug, inspect


@dataclass(frozen=True, slots=True)
class Named:
    """What is named of a bug. ``shared`` is where in alice's `agent_context` the object is that bob reaches too, and
    ``held_by`` the global that keeps it; ``task`` what outlives its request; ``field`` where in which route's answer
    bob is sent alice's key.
    """

    shared: str | None = None
    held_by: str | None = None
    task: str | None = None
    field: tuple[str, str] | None = None


NAMED = {
    "global_cache": Named("['dashboard']", ".CACHE['today']", None, ("/dashboard/{period}", "$.account.api_key")),
    "lru_cached_user": Named("['account']", ".current_account.<cache>", None, ("/profile", "$.api_key")),
    "mutable_default": Named("['basket']", ".add_line.__defaults__[0]", None, ("/order/{item}", "$[0].api_key")),
    "class_attribute": Named("['cart']", ".Cart.items", None, ("/cart/{item}", "$[0].buyer.api_key")),
    "request_variable": Named(),
    "worker_variable": Named("['billed to']", None, None, ("/invoice", "$.billed to.api_key")),
    "client_pool": Named(
        "['payments']", ".POOL._idle['payments.example'][0]", None, ("/checkout", "$.account.api_key")
    ),
    "closed_session": Named(None, None, "create_app.<locals>.write_digest", ("/digest", "$[0].api_key")),
    "agent_memory": Named("['agent']", ".AGENT", None, ("/chat", "$.recalled[1].tool.api_key")),
    "wrong_room": Named("['room']", ".ROOMS['work']", None, ("/devices/{profile}", "$.settings.api_key")),
    "broken_off_export": Named(
        "['page']['account']", ".BOOKKEEPING.account", None, ("/statements/next", "$.account.api_key")
    ),
    "reused_response": Named("['answer']", ".NO_CONTENT", None, ("/sign-in", "set-cookie")),
    "cache_without_vary": Named(None, None, None, ("-", "$.account.api_key")),
}
"""The middleware cures `request_variable`. The cache of `cache_without_vary` answers before any route is found."""


def test_each_bug_is_here() -> None:
    assert sorted(NAMED) == sorted(bug.name for bug in GALLERY if bug.needs is None)


@every_bug
def test_what_is_named_of_a_planted_bug(bug: Bug) -> None:
    named = NAMED[bug.name]

    inspection = inspect(bug, planted=True)

    _assert_checker(bug, named, inspection)
    holders = [holder for event in _events(inspection, "outlived") for holder in event["holders"]]
    if named.task is None:
        assert holders == []
    else:
        assert holders
        assert all(holder.startswith(f"task {bug.module}.{named.task}, at ") for holder in holders)
    sent = {(event["route"], event["field"]) for event in _events(inspection, "egress") if "receiver" in event}
    assert sent >= (set() if named.field is None else {named.field})
    assert bool(sent) is (named.field is not None)


def _assert_checker(bug: Bug, named: Named, inspection: Inspection) -> None:
    where = None if named.shared is None else f"alice.agent_context{named.shared} is bob.agent_context"
    found = [finding for finding in inspection.findings if where is not None and finding.startswith(where)]
    assert len(found) == (0 if where is None else 1), inspection.findings
    if where is None:
        assert inspection.findings == []
    elif named.held_by is not None:
        assert found[0].endswith(f", which is {bug.module}{named.held_by}")


@every_bug
def test_nothing_is_named_of_the_clean_twin(bug: Bug) -> None:
    inspection = inspect(bug, planted=False)

    assert inspection.findings == []
    assert not [event for event in inspection.events if event["outcome"] != "ok"]


def _events(inspection: Inspection, kind: str) -> list[dict[str, Any]]:
    return [event for event in inspection.events if event["event"] == kind]
