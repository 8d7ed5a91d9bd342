"""Ids that a user was told of things of theirs."""

import json

import pytest

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast, User
from ucm_middleware.certify.ids import Ids
from ucm_middleware.certify.schema import Route

LIST = Route("GET /orders", "GET", "/orders", "schema")
ONE = Route("GET /orders/{order_id}", "GET", "/orders/{order_id}", "schema")
OTHER = Route("GET /me", "GET", "/me", "schema")

CANARIES = Canaries(Cast((User("alice", secrets=("account-4f2a9c71",)), User("bob"))), 1)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"id": 3}, "3"),
        ({"orderId": "a-1"}, "a-1"),
        ([{"uuid": "0c-1"}], "0c-1"),
        ({"items": [{"id": 4}], "total": 1}, "4"),
        ({"orders": [{"order_id": 5}]}, "5"),
        ({"id": 6, "items": 7}, "6"),
        ({"id": True}, None),
        ({"id": "../etc"}, None),
        ({"id": "x" * 200}, None),
        ({"id": None, "name": "8"}, None),
        ("9", None),
    ],
)
def test_they_are_found_where_answers_have_them(answer: object, found: str | None) -> None:
    ids = Ids([LIST, ONE, OTHER], CANARIES)
    ids.keep("alice", LIST, json.dumps(answer).encode())
    assert ids.of("alice", ONE, 0, "alice") == found
    assert ids.of("bob", ONE, 0, "alice") is None
    assert ids.is_empty is (found is None)


def test_those_that_no_path_takes_are_not_kept() -> None:
    ids = Ids([LIST, ONE, OTHER], CANARIES)
    ids.keep("alice", OTHER, b'{"id": 1}')
    ids.keep("alice", LIST, b"no JSON")
    assert ids.is_empty


def test_the_newest_are_kept() -> None:
    ids = Ids([ONE], CANARIES)
    for number in range(20):
        ids.keep("alice", ONE, json.dumps({"id": number}).encode())
    assert {ids.of("alice", ONE, choice, "bob") for choice in range(50)} == {str(number) for number in range(12, 20)}


@pytest.mark.parametrize("found", [CANARIES.make("alice", 3), f"{CANARIES.make('alice', 3)}-2", "account-4f2a9c71"])
def test_nobody_asks_by_what_is_another_s_canary(found: str) -> None:
    """What is said of it in the answer would be taken for a leak, and is what they asked by."""
    ids = Ids([ONE], CANARIES)
    ids.keep("alice", ONE, json.dumps({"id": found}).encode())
    assert ids.of("alice", ONE, 0, "alice") == found
    assert ids.of("alice", ONE, 0, "bob") is None
    assert ids.is_empty
    ids.keep("alice", ONE, b'{"id": 7}')
    assert {ids.of("alice", ONE, choice, "bob") for choice in range(5)} == {"7"}
    assert not ids.is_empty
