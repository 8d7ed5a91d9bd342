"""A finding as it is reported: called the same in every run, and explained in a sentence."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ucm_middleware.certify.report.saying import Saying
from ucm_middleware.certify.sightings import Channel, Place, Sighting
from ucm_middleware.certify.steps import Step, asks_of

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Shown

_DIGITS: Final = 16

_SENT: Final[Mapping[Channel, str]] = {
    "body": "in the body of {route}",
    "header": "in a header of the answer to {route}",
    "event": "in a message of {route}",
}
_KEPT: Final[Mapping[Channel, str]] = {
    "log": "a log record of {detail} has {what} in it",
    "span": "the span {detail} has {what} in it",
    "setting": "the setting {detail} of its database connection has {what} in it",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """How often ``viewer`` saw what is ``owner``'s."""

    viewer: str
    owner: str
    count: int


@dataclass(frozen=True, slots=True)
class Reported:
    """A finding. ``place`` is where it was, as ``fingerprint`` stands for it: neither depends on the seed, on who took
    part or on the machine.

    ``steps`` show it; where ``reproduced`` is false, no attempt showed it again, and these are the last ones before.
    ``number`` is that of the request in whose answer it was first.
    """

    fingerprint: str
    place: Place
    sentence: str
    viewer: str
    owner: str
    pairs: tuple[Pair, ...]
    steps: tuple[Step, ...]
    texts: tuple[str, ...]
    reproduced: bool
    attempts: int
    number: int

    @property
    def sightings(self) -> int:
        """How often it was seen, by anybody."""
        return sum(pair.count for pair in self.pairs)


def fingerprint(place: Place) -> str:
    """Of a lasting place: 16 hexadecimal digits."""
    named = json.dumps([place.channel, place.route, place.detail])
    return hashlib.sha256(named.encode()).hexdigest()[:_DIGITS]


def sentence(place: Place, first: Sighting) -> str:
    """What happened, the first time."""
    what = f"a secret of {first.owner}'s" if first.source is None else f"something that {first.owner} had sent"
    if place.channel in _SENT:
        at = f", at {place.detail}" if place.detail else ""
        return f"{first.viewer} was sent {what} {_SENT[place.channel].format(route=place.route)}{at}"
    kept = _KEPT[place.channel].format(detail=place.detail or "without a name", what=what)
    return f"{kept}, made while {first.viewer}'s {place.route} was answered"


def reported(shown: "Iterable[Shown]", saying: Saying) -> tuple[Reported, ...]:
    """Findings by route; those that are called the same are one, with the steps that could be taken again."""
    merged: dict[str, Reported] = {}
    for one in shown:
        found = _reported(one, saying)
        other = merged.get(found.fingerprint)
        merged[found.fingerprint] = found if other is None else _merged(other, found)
    return tuple(sorted(merged.values(), key=lambda found: (found.place.route, found.place.channel, str(found.place))))


def _reported(shown: "Shown", saying: Saying) -> Reported:
    finding, shortest = shown.finding, shown.shortest
    place = saying.lasting(finding.place)
    steps = tuple(map(saying.step, shortest.steps))
    return Reported(
        fingerprint=fingerprint(place),
        place=place,
        sentence=saying.text(sentence(saying.place(finding.place), finding.first)),
        viewer=finding.first.viewer,
        owner=finding.first.owner,
        pairs=_sorted(Pair(viewer, owner, count) for (viewer, owner), count in finding.pairs.items()),
        steps=steps,
        texts=tuple(map(str, steps)),
        reproduced=shortest.reproduced,
        attempts=shortest.attempts,
        number=finding.first.number,
    )


def _merged(one: Reported, other: Reported) -> Reported:
    counts: dict[tuple[str, str], int] = {}
    for pair in (*one.pairs, *other.pairs):
        counts[pair.viewer, pair.owner] = counts.get((pair.viewer, pair.owner), 0) + pair.count
    better = min(one, other, key=lambda found: (not found.reproduced, sum(len(asks_of(step)) for step in found.steps)))
    pairs = _sorted(Pair(viewer, owner, count) for (viewer, owner), count in counts.items())
    return replace(better, pairs=pairs, attempts=one.attempts + other.attempts)


def _sorted(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(pairs, key=lambda pair: (-pair.count, pair.viewer, pair.owner)))
