"""What is done to make an application mix its users up: each drive is a way in which real ones were caught at it.

The plan of a seed is the same in every run; how far a run comes in it depends on the machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Final

from ucm_middleware.certify.cast import Call, Cast
from ucm_middleware.certify.material import Material
from ucm_middleware.certify.schema import Route
from ucm_middleware.certify.steps import (
    BIG,
    Ask,
    Connect,
    Drive,
    HangUp,
    Manner,
    Restart,
    Say,
    SignIn,
    SignOut,
    Step,
    Together,
    Word,
)

_OF_ITS_OWN: Final = 0.3
"""How often a canary stands for free text, and not a word that all use."""

_BURST: Final = 24
_PIPELINE: Final = 6
_TURNS: Final = 6
_UNTIL_RESTART: Final = 8
"""Rounds of all drives before the server is restarted, once."""

_OVER_HTTP: Final[tuple[Drive, ...]] = (
    *("tour", "keep-alive", "pipelining", "burst", "dropped", "slow reader", "background"),
)

_DROPPED: Final[Sequence[Manner]] = ("half sent", "not waited for", "cut off")


@dataclass(frozen=True, slots=True)
class Planned:
    """A step, and the drive it is part of."""

    drive: Drive
    step: Step


def first_sign_ins(cast: Cast) -> tuple[SignIn, ...]:
    """How each user who signs in does it before all other steps, on a connection of their own."""
    calls = [(user.name, user.sign_in) for user in cast.users if user.sign_in is not None]
    return tuple(SignIn(at, user, call.key, f"{user}.0") for at, (user, call) in enumerate(calls, 1))


class Plan:
    """The steps of a seed, without end, behind the first ``sign_ins``. ``without`` says of drives why they cannot be
    tried.
    """

    def __init__(self, cast: Cast, material: Material, seed: int, *, has_http2: bool) -> None:
        self.cast = cast
        self.material = material
        self.without: dict[Drive, str] = {}
        self._random = Random(seed)
        self.sign_ins = first_sign_ins(cast)
        self._number = len(self.sign_ins)
        tried = material.tried()
        self._http = [route for route in tried if not route.websocket]
        self._sockets = [route for route in tried if route.websocket]
        self._reading = [route for route in self._http if not route.changes]
        self._changing = [route for route in self._http if route.changes]
        self._with_ids = [route for route in self._http if route.takes_id]
        self._padded = [route for route in self._http if any(case.takes_padding for case in material.cases[route.key])]
        self._note_what_cannot_be(has_http2=has_http2)

    def _note_what_cannot_be(self, *, has_http2: bool) -> None:
        missing: dict[Drive, str] = {}
        if not self._http:
            missing.update(dict.fromkeys(_OVER_HTTP, "there is no HTTP route to try"))
        if not self._sockets:
            missing["websocket"] = "there is no WebSocket route; routes can be given in the users' file"
        if not has_http2:
            missing["HTTP/2"] = "the server speaks HTTP/1.1 alone; try --server hypercorn"
        elif not self._http:
            missing["HTTP/2"] = "there is no HTTP route to try"
        if not self._with_ids:
            missing["others' ids"] = "no route has an id in its path"
        if not self._changing:
            missing["background"] = "no route changes anything"
        if all(user.sign_in is None for user in self.cast.users):
            missing["sign out and in"] = "no user has a sign_in"
        self.without.update(missing)

    def steps(self) -> Iterator[Planned]:
        """All of them. First each route once by each user, then the drives in turn."""
        drives: dict[Drive, Callable[[], Iterator[Step]]] = {
            "keep-alive": self._keep_alive,
            "burst": self._burst,
            "pipelining": self._pipelining,
            "dropped": self._dropped,
            "websocket": self._websocket,
            "background": self._background,
            "HTTP/2": self._http2,
            "others' ids": self._others_ids,
            "slow reader": self._slow_reader,
            "sign out and in": self._sign_out_and_in,
        }
        possible: dict[Drive, Callable[[], Iterator[Step]]] = {
            drive: make for drive, make in drives.items() if drive not in self.without
        }
        if self._http:
            yield from (Planned("tour", step) for step in self._tour())
        if not possible:
            return
        rounds = 0
        names: list[Drive] = list(possible)
        for drive in cycle(names):
            yield from (Planned(drive, step) for step in possible[drive]())
            if drive == names[-1]:
                rounds += 1
                if rounds == _UNTIL_RESTART:
                    yield Planned("restart", Restart(self.sign_ins))

    # What the drives are made of.

    def _ask(
        self,
        user: str,
        route: Route,
        line: str,
        *,
        manner: Manner = "whole",
        padding: int = 0,
        ids_of: str | None = None,
        patient: bool = False,
        word: Word | None = None,
    ) -> Ask:
        self._number += 1
        cases = self.material.cases[route.key]
        fitting = [at for at, case in enumerate(cases) if case.takes_padding] if padding else range(len(cases))
        return Ask(
            self._number,
            user,
            route.key,
            self._random.choice(fitting),
            line,
            word or self._word(),
            manner,
            padding,
            ids_of,
            patient,
        )

    def _word(self) -> Word:
        return "own" if self._random.random() < _OF_ITS_OWN else "shared"

    def _anybody(self) -> str:
        return self._random.choice(self.cast.names)

    def _everybody(self) -> list[str]:
        return self._random.sample(self.cast.names, len(self.cast.names))

    def _route(self, routes: Sequence[Route]) -> Route:
        return self._random.choice(routes)

    # The drives.

    def _tour(self) -> Iterator[Step]:
        """What changes something first, so that there is something to read; each user on a connection of their own."""
        for route in [*self._changing, *self._reading]:
            for word in ("shared", "own"):
                for user in self.cast.names:
                    yield self._ask(user, route, f"{user}.0", word=word)

    def _keep_alive(self) -> Iterator[Step]:
        """One connection that all share, as behind a proxy; some of its requests are large uploads."""
        line = f"proxy-{self._random.randrange(3)}"
        if self._padded and self._random.random() < 0.5:
            yield self._ask(self._anybody(), self._route(self._padded), line, padding=BIG)
        for _ in range(_TURNS):
            yield self._ask(self._anybody(), self._route(self._http), line)

    def _burst(self) -> Iterator[Step]:
        """Many at the same time, half of them of one route."""
        route = self._route(self._http)
        asks: list[Ask] = []
        for at in range(_BURST):
            user = self._anybody()
            chosen = route if at % 2 else self._route(self._http)
            asks.append(self._ask(user, chosen, f"{user}.{at % 8}"))
        yield Together(tuple(asks))

    def _pipelining(self) -> Iterator[Step]:
        """Several users' requests on one connection, sent before the first is answered."""
        line = f"pipe-{self._random.randrange(2)}"
        yield Together(tuple(self._ask(self._anybody(), self._route(self._http), line) for _ in range(_PIPELINE)))

    def _http2(self) -> Iterator[Step]:
        """Several users' requests on one connection, at the same time."""
        asks = tuple(self._ask(self._anybody(), self._route(self._http), "http2") for _ in range(_PIPELINE))
        yield Together(asks, http2=True)

    def _dropped(self) -> Iterator[Step]:
        """A client that goes away in the middle, and then the others on the same route."""
        route = self._route(self._http)
        first, *others = self._everybody()
        manner = self._random.choice(_DROPPED)
        yield self._ask(first, route, f"{first}.gone", manner=manner)
        for user in [*others, first]:
            yield self._ask(user, route, f"{user}.0")

    def _slow_reader(self) -> Iterator[Step]:
        """An answer that is left standing while the others ask for the same."""
        route = self._route(self._http)
        slow, *others = self._everybody()
        asks = [self._ask(slow, route, f"{slow}.slow", manner="slow")]
        asks += [self._ask(user, route, f"{user}.0") for user in others]
        yield Together(tuple(asks))

    def _background(self) -> Iterator[Step]:
        """Something is begun, and asked for until it is there."""
        route = self._route(self._changing)
        near = [each for each in self._reading if each.collection == route.collection] or self._reading
        for user in self._everybody():
            yield self._ask(user, route, f"{user}.0")
            if near:
                yield self._ask(user, self._route(near), f"{user}.0", patient=True)

    def _others_ids(self) -> Iterator[Step]:
        """What one user was told of, asked for by another."""
        owner, *others = self._everybody()
        for user in others:
            yield self._ask(user, self._route(self._with_ids), f"{user}.0", ids_of=owner)

    def _websocket(self) -> Iterator[Step]:
        """Everybody in the same place, then each says something; some hang up, or are gone."""
        route = self._route(self._sockets)
        case = self._random.randrange(len(self.material.cases[route.key]))
        word = self._word()
        users = self._everybody()
        for user in users:
            self._number += 1
            yield Connect(self._number, user, route.key, case, f"{user} at {route.key}", word)
        for turn in range(2):
            for user in users:
                self._number += 1
                yield Say(self._number, user, route.key, f"{user} at {route.key}", turn)
        leaving = users[0]
        yield HangUp(leaving, f"{leaving} at {route.key}", abruptly=self._random.random() < 0.5)

    def _sign_out_and_in(self) -> Iterator[Step]:
        """One user signs out, and another in on the same connection, as at a shared computer."""
        line = "computer"
        users = self._everybody()
        leaving = next(user for user in users if self.cast[user].sign_in is not None)
        coming = next(user for user in users if user != leaving)
        if self._http:
            yield self._ask(leaving, self._route(self._http), line)
        yield from self._sign(SignOut, leaving, self.cast[leaving].sign_out, line)
        yield from self._sign(SignIn, coming, self.cast[coming].sign_in, line)
        if self._http:
            yield self._ask(coming, self._route(self._http), line)
        yield from self._sign(SignIn, leaving, self.cast[leaving].sign_in, f"{leaving}.0")

    def _sign(self, kind: type[SignIn | SignOut], user: str, call: Call | None, line: str) -> Iterator[Step]:
        """Where that is how it is done: without a sign_out a user goes, and the server is told nothing."""
        if call is not None:
            self._number += 1
            yield kind(self._number, user, call.key, line)
