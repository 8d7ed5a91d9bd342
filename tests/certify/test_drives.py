"""The plan: the same for the same seed, with every drive in it or a reason why not."""

from itertools import islice

import pytest

from ucm_middleware.certify.cast import Call, Cast, User, strangers
from ucm_middleware.certify.coverage import DRIVES
from ucm_middleware.certify.drives import Plan, Planned
from ucm_middleware.certify.material import Case, Material
from ucm_middleware.certify.schema import Route
from ucm_middleware.certify.steps import Ask, Restart, Together

ITEM = Route("GET /items/{item_id}", "GET", "/items/{item_id}", "schema")
ADD = Route("POST /items", "POST", "/items", "schema")
LIVE = Route("WS /live", "WS", "/live", "given", websocket=True)
JSON = (("Content-Type", "application/json"),)

SIGNING = Cast(tuple(User(name, sign_in=Call("/in", body=name)) for name in ("alice", "bob", "carol")))


def material(*routes: Route) -> Material:
    return Material(routes, {each.key: (Case(each.path, JSON, b"{}"), Case(each.path)) for each in routes})


def steps(
    *routes: Route, cast: Cast = SIGNING, seed: int = 1, number: int = 3000, has_http2: bool = True
) -> list[Planned]:
    return [*islice(Plan(cast, material(*routes), seed, has_http2=has_http2).steps(), number)]


def test_the_same_seed_makes_the_same_plan_and_another_another() -> None:
    assert steps(ITEM, ADD, LIVE) == steps(ITEM, ADD, LIVE)
    assert steps(ITEM, ADD, LIVE) != steps(ITEM, ADD, LIVE, seed=2)


@pytest.mark.parametrize(
    ("routes", "cast", "has_http2"),
    [
        ((ITEM, ADD, LIVE), SIGNING, True),
        ((ITEM,), strangers(), False),
        ((ADD,), strangers(2), True),
        ((LIVE,), SIGNING, True),
        ((), SIGNING, False),
    ],
)
def test_every_drive_is_in_it_or_a_reason_why_not(routes: tuple[Route, ...], cast: Cast, has_http2: bool) -> None:
    plan = Plan(cast, material(*routes), 1, has_http2=has_http2)
    planned = {each.drive for each in islice(plan.steps(), 3000)}
    assert planned | plan.without.keys() == {*DRIVES}
    assert not planned & plan.without.keys()
    assert all(plan.without.values())


def test_each_route_is_toured_by_each_user_with_and_without_a_canary() -> None:
    tour = [each.step for each in steps(ITEM, ADD) if each.drive == "tour"]
    asked = {(each.user, each.route, each.word) for each in tour if isinstance(each, Ask)}
    assert asked == {
        (user, route.key, word) for user in SIGNING.names for route in (ITEM, ADD) for word in ("own", "shared")
    }


def test_numbers_are_not_used_twice() -> None:
    found = [one.number for each in steps(ITEM, ADD, LIVE) for one in _numbered(each)]
    assert len(found) == len({*found})


def _numbered(planned: Planned) -> list[Ask]:
    step = planned.step
    return [*step.asks] if isinstance(step, Together) else [step] if isinstance(step, Ask) else []


def test_others_ids_are_others() -> None:
    asks = [each.step for each in steps(ITEM) if each.drive == "others' ids"]
    assert asks
    assert all(isinstance(ask, Ask) and ask.ids_of not in (None, ask.user) for ask in asks)


def test_the_server_is_restarted_once() -> None:
    assert sum(isinstance(each.step, Restart) for each in steps(ITEM)) == 1
