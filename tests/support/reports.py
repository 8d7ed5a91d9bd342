"""Results of the certifier made by hand, for tests of how they are reported."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast, User
from ucm_middleware.certify.certifying import Options, Result, Shown
from ucm_middleware.certify.coverage import Coverage, RouteCoverage
from ucm_middleware.certify.report.baseline import Baseline
from ucm_middleware.certify.report.reporting import Report, make_report
from ucm_middleware.certify.shortening import Shortest
from ucm_middleware.certify.sightings import Channel, Place, Sighting
from ucm_middleware.certify.steps import Ask, Step, Together
from ucm_middleware.certify.trial import Finding

SEED = 7
DASHBOARD = "GET /dashboard/{period}"
COMMAND = ("ucm", "certify", "shop:app", "--seed", str(SEED))


def secret_of(name: str) -> str:
    """What only this user may see."""
    return f"sk-live-{name}-4711"


def cast_of(names: Sequence[str]) -> Cast:
    """Users with a credential and a secret each."""
    return Cast(
        tuple(User(name, {"Authorization": f"Bearer token-of-{_in_ascii(name)}"}, (secret_of(name),)) for name in names)
    )


def _in_ascii(name: str) -> str:
    """As a header can have it."""
    return name if name.isascii() and name.isalpha() else name.encode().hex()


def shown(
    place: Place,
    pairs: dict[tuple[str, str], int],
    steps: Sequence[Step] = (),
    *,
    reproduced: bool = True,
    source: int | None = None,
) -> Shown:
    """A finding of these pairs of a viewer and an owner; without steps, by one shared connection."""
    viewer, owner = next(iter(pairs))
    taken = steps or (Ask(1, owner, place.route, 0, "proxy-1"), Ask(2, viewer, place.route, 0, "proxy-1"))
    finding = Finding(Sighting(place, viewer, owner, 2, source), 5, dict(pairs))
    return Shown(finding, Shortest(tuple(taken), reproduced, 3))


def dashboard(pairs: dict[tuple[str, str], int] | None = None, channel: Channel = "body") -> Shown:
    """A finding in the dashboard."""
    return shown(Place(channel, DASHBOARD, "$.account.api_key"), pairs or {("bob", "alice"): 1018})


def result(
    found: Sequence[Shown] = (),
    names: Sequence[str] = ("alice", "bob"),
    *,
    with_ucm: bool = False,
    routes: Sequence[RouteCoverage] = (),
    notes: tuple[str, ...] = (),
    seed: int = SEED,
) -> Result:
    """A run of four routes: one covered, one blind, one not covered, and one that could not be tried."""
    users = set(names)
    rows = [
        RouteCoverage(DASHBOARD, "schema", tries=2905, answers=Counter({"2xx": 2862}), users=users, own=1848),
        RouteCoverage("GET /health", "router", tries=400, answers=Counter({"2xx": 400}), users=users),
        RouteCoverage("POST /orders", "given", tries=12, answers=Counter({"422": 12})),
        RouteCoverage("PUT /odd", "schema", "no request can be made by its schema: no type"),
        *routes,
    ]
    coverage = Coverage({row.key: row for row in rows}, requests=5907, ends=1)
    coverage.drives.update({"tour": 8, "keep-alive": 864, "burst": 144})
    coverage.without["HTTP/2"] = "the server speaks HTTP/1.1 alone; try --server hypercorn"
    coverage.not_looked_at["span"] = "OpenTelemetry's SDK is not installed"
    coverage.not_looked_at["setting"] = "no variable names the application's database"
    options = Options("shop:app", cast_of(names), seed=seed)
    return Result(options, with_ucm, tuple(found), coverage, 20.2, notes)


def report(
    found: Sequence[Shown] = (),
    names: Sequence[str] = ("alice", "bob"),
    *,
    after: Sequence[Shown] | None = None,
    baseline: Baseline | None = None,
    routes: Sequence[RouteCoverage] = (),
    notes: tuple[str, ...] = (),
) -> Report:
    """Of that run; with what was found ``after`` the package was added, of both."""
    plain = result(found, names, routes=routes, notes=notes)
    other = None if after is None else replace(result(after, names, routes=routes), with_ucm=True)
    return make_report(plain, other, command=COMMAND, baseline=baseline)


def canary(owner: str, names: Sequence[str] = ("alice", "bob"), seed: int = SEED) -> str:
    """One of theirs."""
    return Canaries(cast_of(names), seed).make(owner, 3)


def crowd(size: int) -> tuple[list[str], list[Shown]]:
    """Many users, and three findings between some of them."""
    names = [f"user-{at:02}" for at in range(size)]
    near = {(names[(at + 1) % size], name): 3 + at * 37 for at, name in enumerate(names)}
    logs = {(names[(at * 7 + 3) % size], names[at]): 1 + at for at in range(0, size, 3)}
    together = Together(tuple(Ask(at, name, DASHBOARD, 0, "pipe-0") for at, name in enumerate(names[:5])))
    return names, [
        shown(Place("body", DASHBOARD, "$.items[].owner"), near, (together,), source=1),
        shown(Place("log", "POST /orders", "shop.orders"), logs),
        shown(Place("header", "GET /health", "x-user"), dict(list(near.items())[:5]), reproduced=False),
    ]
