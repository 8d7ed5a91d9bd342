"""How channels look: a colour, a letter and a kind of line each, so that nobody need tell colours apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.html.markup import Html, tag
from ucm_middleware.certify.sightings import Channel


@dataclass(frozen=True, slots=True)
class Look:
    """``letter`` stands in pictures, ``name`` in the legend; ``dashes`` is what SVG calls a stroke-dasharray."""

    letter: str
    name: str
    dashes: str | None


LOOKS: Final[Mapping[Channel, Look]] = {
    "body": Look("B", "body of an answer", None),
    "header": Look("H", "header of an answer", "9 4"),
    "event": Look("E", "WebSocket message", "2 4"),
    "log": Look("L", "log record", "9 4 2 4"),
    "span": Look("S", "span", "14 4"),
    "setting": Look("D", "database setting", "4 4"),
}


@dataclass(frozen=True, slots=True)
class Arrow:
    """How often what is ``owner``'s reached ``viewer`` in a channel."""

    owner: str
    viewer: str
    channel: Channel
    count: int

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count:,} times"
        return f"{self.viewer} saw {self.owner}'s {times} ({LOOKS[self.channel].name})"


def arrows_of(findings: Iterable[Reported]) -> tuple[Arrow, ...]:
    """All of a run, the most frequent first."""
    counts: dict[tuple[str, str, Channel], int] = {}
    for finding in findings:
        for pair in finding.pairs:
            key = pair.owner, pair.viewer, finding.place.channel
            counts[key] = counts.get(key, 0) + pair.count
    arrows = (Arrow(owner, viewer, channel, count) for (owner, viewer, channel), count in counts.items())
    return tuple(sorted(arrows, key=lambda arrow: (-arrow.count, arrow.owner, arrow.viewer, arrow.channel)))


def legend(arrows: Iterable[Arrow]) -> Html:
    """Of the channels in a picture."""
    used = {arrow.channel for arrow in arrows}
    entries = (_entry(channel, look) for channel, look in LOOKS.items() if channel in used)
    return tag("ul", *entries, class_="legend")


def _entry(channel: Channel, look: Look) -> Html:
    line = tag("line", x1=1, y1=7, x2=39, y2=7, class_=f"arrow {channel}", stroke_dasharray=look.dashes)
    swatch = tag("svg", line, width=40, height=14, aria_hidden="true")
    return tag("li", swatch, tag("b", look.letter), f" {look.name}")
