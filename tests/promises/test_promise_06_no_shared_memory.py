"""Promise 6: what goes into a context is copied, and what two users share all the same is found and named."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    env = {"PROMISE_MODE": "the process's"}
    return module_server_factory(server_kind, "promise_memory:app", env=env)


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


@pytest.mark.parametrize("way", ["create", "create-managed", "set", "from-request", "from-connection", "child"])
def test_what_everybody_is_given_is_each_ones_own(desk: Observer, way: str) -> None:
    defaults = desk.ask("defaults")
    answers = {}
    for user in ("alice", "bob"):
        answers[user] = desk.begin(user, f"/defaults/{way}")
        # One after the other, so that the second would find what the first has changed.
        desk.wait_for("changed", user=user)
    desk.open("all have changed theirs")
    for user, answer in answers.items():
        assert answer.result().json() == {
            "before": defaults,
            "after": {
                "theme": user,
                "recent": [user],
                "panels": {"left": {"open": user}},
                "seen": sorted(["nobody", user]),
            },
        }
    assert desk.ask("defaults") == defaults


def test_a_child_has_a_copy_of_what_its_parent_has(desk: Observer) -> None:
    seen = desk.request("alice", "/inherit").json()
    assert seen == {"parent": ["parent's"], "child": ["parent's", "child's"], "mode": None}


def test_what_the_product_shows_is_a_copy(desk: Observer) -> None:
    seen = desk.request("alice", "/views").json()
    assert seen == {"tags": ["open"], "events": True, "user": "alice", "listed": ["alice"]}


def test_configuration_set_in_a_context_stays_in_it(desk: Observer) -> None:
    answers = {}
    for user in ("alice", "bob"):
        answers[user] = desk.begin(user, "/configure")
        desk.wait_for("configured", user=user)
    desk.open("all have configured")
    for user, answer in answers.items():
        assert answer.result().json() == {
            "before": "the process's",
            "after": user,
            "process": "the process's",
            "application": "the process's",
        }


def found_when(desk: Observer, **shared: str) -> dict[str, Any]:
    """What the check finds while each of these users shares something in the way named."""
    answers = []
    for user, way in shared.items():
        answers.append(desk.begin(user, f"/share?way={way}"))
        desk.wait_for("shares", user=user)
    found: dict[str, Any] = desk.ask("report")
    desk.open("has been checked")
    assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    return found


ALICES = "alice.agent_context['notes']"

FOUND = {
    "item": ("bob.agent_context['notes']", "list"),
    "nested": ("bob.agent_context['work'][0]['of today'][1]", "list"),
    "object": ("bob.agent_context['board'].notes", "list"),
    "method": ("bob.agent_context['post'].__self__", "list"),
    "closure": ("bob.agent_context['read']<variable thing>", "list"),
    "metadata": ("bob.audit_metadata['notes']", "list"),
    "attribute": ("bob.board", "list"),
}


@pytest.mark.parametrize("way", FOUND)
def test_what_two_users_share_is_found_and_named_by_both_paths(desk: Observer, way: str) -> None:
    path, kind = FOUND[way]
    found = found_when(desk, alice="item", bob=way)
    assert found == {"isolated": False, "findings": [f"{ALICES} is {path} ({kind})"]}
    assert desk.system_events("isolation_violated")[-1]["findings"] == [{"users": ["alice", "bob"], "type": kind}]


def test_what_is_shared_with_the_child_of_a_context_is_found(desk: Observer) -> None:
    found = found_when(desk, alice="item", bob="child")
    assert found["isolated"] is False
    (finding,) = found["findings"]
    assert ALICES in finding
    assert "bob" in finding


def test_a_session_of_two_users_is_found(desk: Observer) -> None:
    found = found_when(desk, alice="session", bob="session")
    assert found == {"isolated": False, "findings": ["alice.db_session is bob.db_session (Session)"]}


@pytest.mark.parametrize("way", ["marked", "immutable", "equal"])
def test_what_is_shared_on_purpose_or_without_harm_is_not_found(desk: Observer, way: str) -> None:
    assert found_when(desk, alice=way, bob=way) == {"isolated": True, "findings": []}


def test_what_one_user_has_twice_is_not_shared(desk: Observer) -> None:
    first = desk.begin("alice", "/share?way=item")
    assert found_when(desk, alice="nested", bob="equal") == {"isolated": True, "findings": []}
    assert first.result().status_code == 200


REFUSED = {
    "lock": ("agent_context['tools'][0]['guard']", "cannot be copied"),
    "function": ("agent_context['read']", "closes over variables"),
    "reserved": ("audit_metadata['user_id']", "reserved"),
    "keys": ("agent_context[1]", "keys must be str"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_copied_is_refused_by_its_path(desk: Observer, what: str) -> None:
    expected_path, expected_rule = REFUSED[what]
    path, rule = desk.request("alice", f"/refused/{what}").json()
    assert path == expected_path
    assert expected_rule in rule
