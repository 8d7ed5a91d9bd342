"""Ids that a user was told of things of theirs."""

import json

import pytest

from ucm_middleware.certify.ids import Ids
from ucm_middleware.certify.schema import Route

LIST = Route("GET /orders", "GET", "/orders", "schema")
ONE = Route("GET /orders/{order_id}", "GET", "/orders/{order_id}", "schema")
OTHER = Route("GET /me", "GET", "/me", "schema")


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
    ids = Ids([LIST, ONE, OTHER])
    ids.keep("alice", LIST, json.dumps(answer).encode())
    assert ids.of("alice", ONE, 0) == found
    assert ids.of("bob", ONE, 0) is None
    assert ids.is_empty is (found is None)


def test_those_that_no_path_takes_are_not_kept() -> None:
    ids = Ids([LIST, ONE, OTHER])
    ids.keep("alice", OTHER, b'{"id": 1}')
    ids.keep("alice", LIST, b"no JSON")
    assert ids.is_empty


def test_the_newest_are_kept() -> None:
    ids = Ids([ONE])
    for number in range(20):
        ids.keep("alice", ONE, json.dumps({"id": number}).encode())
    assert {ids.of("alice", ONE, choice) for choice in range(50)} == {str(number) for number in range(12, 20)}
