"""Promise 5: no user can overwrite or occupy another's key, and no spelling of ids makes two keys one."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from support.fixtures import ServerFactory
from support.observer import Observer, observing
from support.servers import Server

pytestmark = pytest.mark.security


@pytest.fixture(scope="module")
def server(server_kind: str, module_server_factory: ServerFactory) -> Server:
    return module_server_factory(server_kind, "promise_owners:app")


@pytest.fixture
def desk(server: Server) -> Iterator[Observer]:
    with observing(server) as observer:
        yield observer


COLLISIONS = [
    (("acme", "x_r77"), ("acme_x", "r77")),
    (("acme:x", "r77"), ("acme", "x:r77")),
    (("acme/x", "r77"), ("acme", "x/r77")),
    (("acme x", "r77"), ("acme", "x r77")),
    (("acme', 'x", "r77"), ("acme", "x', 'r77")),
    (("Alice", "r77"), ("alice", "r77")),
    (("Jos\u00e9", "r77"), ("Jose\u0301", "r77")),
    (("carol", "r77"), ("r77", "carol")),
]


@pytest.mark.parametrize(("one", "other"), COLLISIONS, ids=lambda pair: "+".join(pair))
def test_ids_that_join_or_look_alike_stay_apart(desk: Observer, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Both keep a context of their own at the same time: under their pair, and both under the same text."""
    kept = []
    for user, request_id in (one, other):
        params = {"request_id": request_id, "text": "_".join(one)}
        kept.append(desk.begin(quote(user), "/keep", params=params))
        desk.wait_for("kept", user=user)
    assert len(desk.active()) == 4
    desk.open("read back")
    for (user, request_id), answer in zip((one, other), kept, strict=True):
        seen = answer.result().json()
        assert (seen["same"], seen["of"]) == (True, user)
        assert request_id in seen["mine"]
        assert len(seen["mine"]) == 2


def test_the_id_of_another_user_as_a_key_leads_to_ones_own(desk: Observer) -> None:
    bob = desk.begin("bob", "/hold")
    desk.wait_for("held", user="bob")
    alice = desk.begin("alice", "/occupy?user=bob")
    desk.wait_for("occupied")
    assert desk.request("bob", "/act/get?user=bob&request_id=any").json() == "bob"
    desk.open("let go")
    assert alice.result().json() is True
    assert bob.result().json() == "bob's"


def test_a_pair_of_another_user_cannot_be_occupied(desk: Observer) -> None:
    assert desk.request("alice", "/act/set-pair?user=bob&request_id=r1").status_code == 403
    bob = desk.begin("bob", "/keep?request_id=r1&text=draft")
    desk.wait_for("kept", user="bob")
    # Nor when it is taken.
    assert desk.request("alice", "/act/set-pair?user=bob&request_id=r1").status_code == 403
    desk.open("read back")
    assert bob.result().json()["same"] is True


@pytest.mark.parametrize("user", ["bob", None])
def test_who_comes_gets_the_key_that_is_their_id_whoever_stands_there(desk: Observer, user: str | None) -> None:
    """Bob is known before the app, or from inside it."""
    squatter = desk.tell("squat?user=bob")
    assert desk.request(user, "/arrive?user=bob").json() == ["ContextNotFoundError", "bob"]
    # Who stood there has lost the key, not the context.
    assert desk.tell(f"evict?request_id={squatter}") is True


def test_who_is_put_under_their_own_id_ends_whoever_stands_there(desk: Observer) -> None:
    squatter = desk.tell("squat?user=bob")
    assert desk.tell("settle?user=bob") == "bob"
    assert desk.wait_until_closed("mallory", squatter)["reason"] == "evicted"


def test_a_context_of_ones_own_is_replaced_and_the_old_one_closed(desk: Observer) -> None:
    assert desk.request("alice", "/replace").json() == [False, True, True]
    assert desk.wait_until_closed("alice", "first")["reason"] == "replaced"
