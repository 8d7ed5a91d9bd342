"""What a run tried, as it is reported: what could not be tried stands beside what was, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from ucm_middleware.certify.coverage import DRIVES, Coverage, RouteCoverage
from ucm_middleware.certify.report.saying import Saying
from ucm_middleware.certify.sightings import Channel

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Result

BLIND: Final = "nothing of the user's own was ever sent here, so nothing could be seen"

_NOT_REACHED: Final = "the time was over before it was tried"

_CHANNELS: Final[tuple[Channel, ...]] = get_args(Channel)


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A route. ``answered`` are the users who got a 2xx or a message, ``own`` how often their own canaries came back.

    ``problem`` says why it is not covered, or that it is blind; None where neither is so.
    """

    key: str
    source: str
    tries: int
    answers: tuple[tuple[str, int], ...]
    answered: tuple[str, ...]
    own: int
    is_covered: bool
    is_blind: bool
    problem: str | None

    @property
    def is_tried(self) -> bool:
        """Whether it answered two users, if only as they signed in."""
        return len(self.answered) > 1

    @property
    def state(self) -> Literal["covered", "blind", "not covered"]:
        """In a word or two."""
        return "not covered" if not self.is_covered else "blind" if self.is_blind else "covered"


@dataclass(frozen=True, slots=True)
class Row:
    """A drive, with how many of its steps were taken, or a channel. ``why_not`` is None where it was tried."""

    name: str
    count: int
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Covering:
    """Of a run."""

    routes: tuple[RouteRow, ...]
    drives: tuple[Row, ...]
    channels: tuple[Row, ...]
    counts: Mapping[str, int]
    """``requests``, ``messages`` of WebSockets, answers that came ``late`` or were ``endless``, how often the server
    ended by itself (``ends``), and the bytes that it wrote (``output``).
    """

    @property
    def covered(self) -> int:
        """Routes."""
        return sum(route.is_covered for route in self.routes)

    @property
    def blind(self) -> tuple[RouteRow, ...]:
        """Routes on which nothing could be seen."""
        return tuple(route for route in self.routes if route.is_blind)

    @property
    def tried(self) -> int:
        """Drives."""
        return sum(drive.why_not is None for drive in self.drives)


def covering(result: "Result", saying: Saying) -> Covering:
    """What was tried in a run."""
    coverage = result.coverage
    users = result.options.cast.names
    blind = frozenset(coverage.blind)
    return Covering(
        routes=tuple(_route(route, route.key in blind, users, saying) for route in coverage.routes.values()),
        drives=tuple(_drive(drive, coverage, saying) for drive in DRIVES),
        channels=tuple(_channel(name, coverage, saying) for name in _CHANNELS),
        counts={
            name: getattr(coverage, name) for name in ("requests", "messages", "late", "endless", "ends", "output")
        },
    )


def _route(route: RouteCoverage, is_blind: bool, users: tuple[str, ...], saying: Saying) -> RouteRow:
    problem = BLIND if is_blind else route.problem
    return RouteRow(
        key=saying.text(route.key),
        source=route.source,
        tries=route.tries,
        answers=tuple(route.answers.most_common()),
        answered=tuple(user for user in users if user in route.users),
        own=route.own,
        is_covered=route.is_covered,
        is_blind=is_blind,
        problem=None if problem is None else saying.text(problem),
    )


def _drive(drive: str, coverage: Coverage, saying: Saying) -> Row:
    count = next((count for name, count in coverage.drives.items() if name == drive), 0)
    why_not = next((why for name, why in coverage.without.items() if name == drive), None)
    if not count and why_not is None:
        why_not = _NOT_REACHED
    return Row(drive, count, None if why_not is None else saying.text(why_not))


def _channel(name: str, coverage: Coverage, saying: Saying) -> Row:
    why_not = coverage.not_looked_at.get(name)
    return Row(name, 0, None if why_not is None else saying.text(why_not))
