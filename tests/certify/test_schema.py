"""What is tried, of an application's schema, of what is given and of its router."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from support.apps.certify_shop import document
from ucm_middleware.certify.cast import Given
from ucm_middleware.certify.material import CASES, Case, Material, make_material
from ucm_middleware.certify.schema import Found, combined
from ucm_middleware.certify.sowing import sown

THIS = "tests.certify.test_schema"


def made(schema: Mapping[str, Any] | None, *given: Given, seed: int = 1) -> Material:
    whole, routes = combined(schema, given, ())
    return make_material(whole, routes, seed)


@pytest.mark.parametrize("schema", [True, {}])
def test_an_id_of_which_the_schema_says_nothing_is_a_text(schema: Any) -> None:
    item = {"name": "item_id", "in": "path", "required": True, "schema": schema}
    whole = {"openapi": "3.1.0", "paths": {"/items/{item_id}": {"get": {"parameters": [item], "responses": {}}}}}
    (case,) = made(whole).cases["GET /items/{item_id}"]
    assert case.filled("tea", None).target == "/items/tea"
    assert case.filled("tea", "a-1").target == "/items/a-1"


def posting(schema: Mapping[str, Any], **components: Any) -> dict[str, Any]:
    operation = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {},
    }
    return {"openapi": "3.1.0", "paths": {"/x": {"post": operation}}, "components": {"schemas": components}}


def bodies(material: Material, key: str = "POST /x") -> list[Any]:
    assert material.not_made == {}
    return [json.loads(case.filled("CANARY", None).body or b"null") for case in material.cases[key]]


@pytest.fixture(scope="module")
def shop() -> Material:
    return made(document())


def test_requests_of_every_kind_are_made(shop: Material) -> None:
    assert shop.not_made == {}
    assert {route.key for route in shop.routes} == {
        *("GET /orders/{order_id}", "GET /things/{uuid}/{name}", "POST /orders", "POST /form", "POST /upload")
    }
    assert all(1 <= len(cases) <= CASES for cases in shop.cases.values())


def test_words_and_ids_stand_where_free_text_and_ids_do(shop: Material) -> None:
    case = shop.cases["GET /orders/{order_id}"][0]
    assert case.filled("CANARY", "77").target == "/orders/77?q=CANARY"
    assert case.filled("CANARY", None).target == "/orders/1?q=CANARY"
    case = shop.cases["GET /things/{uuid}/{name}"][0].filled("CANARY", None)
    assert case.target == "/things/00000000-0000-4000-8000-000000000001/CANARY"
    assert ("x-note", "CANARY") in [(name.lower(), value) for name, value in case.headers]
    for order in bodies(shop, "POST /orders"):
        assert order["text"] == "CANARY"
        assert order["size"] in ("small", "large")
        assert {"text", "size", "count", "price"} <= order.keys() <= {"text", "size", "count", "price", "note", "parts"}


def test_forms_and_files_carry_words(shop: Material) -> None:
    for key in ("POST /form", "POST /upload"):
        assert all(b"CANARY" in (case.filled("CANARY", None).body or b"") for case in shop.cases[key]), key


def test_ours_are_not_in_what_is_made(shop: Material) -> None:
    ours = {"accept-encoding", "host", "content-length", "authorization", "cookie", "user-agent"}
    assert not ours & {name.lower() for cases in shop.cases.values() for case in cases for name, _ in case.headers}


def test_the_same_seed_makes_the_same_in_another_process(shop: Material) -> None:
    code = f"from {THIS} import *; print(repr(made(document()).cases))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
        told = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
        assert told.stdout.strip() == repr(shop.cases)


def test_a_list_of_types_is_taken_as_any_of_them() -> None:
    schema = {"type": ["object"], "properties": {"t": {"type": ["string", "null"]}}, "required": ["t"]}
    assert {"t": "CANARY"} in bodies(made(posting(schema)))


def test_parts_of_which_a_whole_is_made_let_each_other_s_in() -> None:
    base = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    more = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
    whole = posting({"allOf": [{"$ref": "#/components/schemas/Base"}, more]}, Base=base)
    assert all(body["a"] == body["b"] == "CANARY" for body in bodies(made(whole)))


def test_what_must_not_be_is_not_turned_round() -> None:
    assert sown({"not": {"type": "string"}}) == {"not": {"type": "string"}}


def test_bodies_that_stand_elsewhere_carry_words() -> None:
    whole = posting({})
    whole["paths"]["/x"]["post"]["requestBody"] = {"$ref": "#/components/requestBodies/B"}
    schema = {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]}
    whole["components"]["requestBodies"] = {
        "B": {"required": True, "content": {"application/json": {"schema": schema}}}
    }
    assert {"t": "CANARY"} in bodies(made(whole))


def test_a_schema_that_refers_to_itself_is_taken() -> None:
    node = {"type": "object", "properties": {"t": {"type": "string"}, "c": {"$ref": "#/components/schemas/N"}}}
    assert all(isinstance(body, dict) for body in bodies(made(posting({"$ref": "#/components/schemas/N"}, N=node))))


def test_one_route_that_cannot_be_made_leaves_the_others() -> None:
    whole = posting({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]})
    whole["paths"]["/ok"] = {"get": {"responses": {}}}
    material = made(whole)
    assert material.cases["GET /ok"]
    assert set(material.not_made) == {"POST /x"}


def test_what_is_no_path_and_no_operation_is_left_out() -> None:
    paths: dict[str, Any] = {
        "/a": None,
        "/b": {"get": 3, "post": {"responses": {}}},
        "/c\x1b[2J": {"get": {"responses": {}}},
    }
    assert [route.key for route in combined({"openapi": "3.1.0", "paths": paths}, (), ())[1]] == ["POST /b"]


def test_swagger_2_is_not_taken_for_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="Swagger 2"):
        combined({"swagger": "2.0", "paths": {}}, (), ())


def test_what_is_given_goes_before_the_schema_and_that_before_the_router() -> None:
    whole = {"openapi": "3.1.0", "paths": {"/a": {"get": {"responses": {}}}, "/b/{x}": {"get": {"responses": {}}}}}
    found = [
        Found("/b/{y:int}", ("GET", "HEAD"), False),
        Found("/live", (), True),
        Found("/c/{n:int}", ("POST",), False),
    ]
    _, routes = combined(whole, [Given("/a"), Given("/a", "DELETE")], found)
    assert {route.key: route.source for route in routes} == {
        "GET /a": "given",
        "DELETE /a": "given",
        "GET /b/{x}": "schema",
        "WS /live": "router",
        "POST /c/{n}": "router",
    }


def test_a_body_that_is_given_and_its_type_are_sent() -> None:
    material = made(None, Given("/up", "POST", media="application/octet-stream"), Given("/ws", websocket=True))
    assert material.cases["POST /up"][0].takes_padding
    assert material.cases["POST /up"][0].filled("CANARY", None) == Case(
        "/up", (("Content-Type", "application/octet-stream"),), b"CANARY"
    )
    assert material.cases["WS /ws"][0].target == "/ws"


def test_no_more_requests_are_made_when_the_time_is_over() -> None:
    whole, routes = combined(posting({"type": "object"}), [Given("/y")], ())
    turns = iter([False, True])
    material = make_material(whole, routes, 1, lambda: next(turns))
    assert [*material.cases] == [routes[0].key]
    assert material.not_made == {routes[1].key: "the time was over before requests were made for it"}
