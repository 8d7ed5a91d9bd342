"""What was tried of what there is, what came of it, and what could not be tried and why."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ucm_middleware.certify.lines.answer import Answer
from ucm_middleware.certify.material import Material
from ucm_middleware.certify.schema import Source
from ucm_middleware.certify.stage import Outcome
from ucm_middleware.certify.steps import Drive

_BY_CLASS: Final[Mapping[int, str]] = {
    0: "no answer",
    1: "1xx",
    2: "2xx",
    3: "3xx",
    5: "5xx",
}

_ACCEPTED: Final = 101
"""The status of a handshake after which a WebSocket is open."""

DRIVES: Final[tuple[Drive, ...]] = (
    *("tour", "keep-alive", "pipelining", "HTTP/2", "burst", "dropped", "slow reader", "background", "websocket"),
    *("others' ids", "sign out and in", "restart"),
)


@dataclass(slots=True)
class RouteCoverage:
    """Of one route. ``answers`` counts by class of status, ``users`` who got a 2xx (or a message), ``own`` how often a
    user's own canary came back: only where that happens could another's be seen.
    """

    key: str
    source: Source
    why_not: str | None = None
    tries: int = 0
    answers: Counter[str] = field(default_factory=Counter[str])
    users: set[str] = field(default_factory=set[str])
    own: int = 0

    @property
    def is_covered(self) -> bool:
        """Whether two users or more were answered as they should be, by more than what they sign in with."""
        return self.why_not is None and len(self.users) >= 2

    @property
    def problem(self) -> str | None:
        """Why it is not covered, for a person."""
        if self.why_not is not None:
            return self.why_not
        if self.is_covered:
            return None
        if not self.tries:
            return "the time was over before it was tried"
        if not self.users and not self.answers:
            return "no message came over it"
        if not self.users:
            said = ", ".join(f"{count} times {kind}" for kind, count in self.answers.most_common(2))
            return f"nobody got {_WANTED[self.key.startswith('WS ')]}: {said}" + _hint(self.answers)
        return f"only {next(iter(self.users))} got {_WANTED[self.key.startswith('WS ')]}"


_WANTED: Final = {False: "an answer of 2xx", True: "a message"}


def _hint(answers: Counter[str]) -> str:
    most = answers.most_common(1)[0][0] if answers else ""
    return {
        "3xx": "; it sends them elsewhere, to sign in perhaps, and redirects are not followed",
        "401": "; its users' file gives no credentials that it takes",
        "403": "; the users may not call it",
        "404": "; what it is asked for is not there",
        "422": "; what its schema says is not what it takes",
        "no answer": "; it hangs, or its connection is lost",
    }.get(most, "")


@dataclass(slots=True)
class Coverage:
    """Of a run."""

    routes: dict[str, RouteCoverage]
    drives: Counter[Drive] = field(default_factory=Counter[Drive])
    without: dict[Drive, str] = field(default_factory=dict[Drive, str])
    not_looked_at: dict[str, str] = field(default_factory=dict[str, str])
    """Channels in which nothing could be looked for, and why."""
    requests: int = 0
    messages: int = 0
    late: int = 0
    endless: int = 0
    ends: int = 0
    """How often the server ended by itself, and was started again."""
    output: int = 0
    """Bytes that the server wrote."""
    _failed: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, material: Material) -> "Coverage":
        """Of nothing tried yet."""
        return cls(
            {
                route.key: RouteCoverage(route.key, route.source, material.not_made.get(route.key))
                for route in material.routes
            }
        )

    def step(self, drive: Drive) -> None:
        """One of its steps was taken."""
        self.drives[drive] += 1

    def outcome(self, outcome: Outcome, *, is_own: bool) -> None:
        """A request was answered, or not."""
        answer, route = outcome.answer, self.routes[outcome.request.route]
        self.requests += 1
        self.late += answer.ending == "late"
        self.endless += answer.ending == "endless"
        route.tries += 1
        if answer.ending == "dropped by us":
            return  # whatever its status, nobody waited for what it says
        route.answers[_kind(answer.status)] += 1
        route.own += is_own
        if answer.is_answered:
            route.users.add(outcome.request.user)

    def message(self, user: str, key: str, *, is_own: bool) -> None:
        """A WebSocket brought one."""
        self.messages += 1
        route = self.routes[key]
        route.users.add(user)
        route.own += is_own

    def connected(self, key: str) -> None:
        """A WebSocket was opened, or tried to be."""
        self.routes[key].tries += 1

    def handshake(self, key: str, answer: Answer, *, is_own: bool) -> None:
        """A WebSocket was accepted, or not."""
        route = self.routes[key]
        route.own += is_own
        if answer.status != _ACCEPTED:
            route.answers["not accepted"] += 1

    def not_signed_in(self, user: str, why: str, *, goes_on: bool) -> None:
        """A sign-in failed in the middle of the run; the user goes on with the one before, or not at all."""
        self._failed[user] = why if goes_on else f"{why}; signed out, {user} took no part in what followed"
        self.without["sign out and in"] = f"in the middle of the run {'; '.join(self._failed.values())}"

    @property
    def covered(self) -> int:
        """Routes."""
        return sum(route.is_covered for route in self.routes.values())

    @property
    def blind(self) -> Iterable[str]:
        """Routes that are covered, and never sent anything of the user's own: nothing could be seen on them."""
        return [route.key for route in self.routes.values() if route.is_covered and not route.own]


def _kind(status: int) -> str:
    return str(status) if 400 <= status < 500 else _BY_CLASS.get(status // 100, "another status")
