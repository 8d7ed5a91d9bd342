"""Few users in a circle, with an arrow from whose data it is to who saw it."""

from collections.abc import Mapping, Sequence
from math import cos, hypot, pi, sin
from typing import Final

from ucm_middleware.certify.report.html.channels import LOOKS, Arrow
from ucm_middleware.certify.report.html.markup import Html, joined, shortened, tag

MOST_USERS: Final = 8
MOST_ARROWS: Final = 20

_WIDTH: Final = 520
_RADIUS: Final = 165
_NODE: Final = 38
_BEND: Final = 34
_LABEL: Final = 0.7
"""Where on its arrow a label stands, from 0 to 1: not in the middle, where arrows cross."""

Point = tuple[float, float]


def circle(users: Sequence[str], arrows: Sequence[Arrow], *titles: Html, labelled_by: str) -> Html:
    """The picture. ``titles`` are its title and description."""
    height = 240 if len(users) == 2 else 2 * (_RADIUS + _NODE) + 40
    where = _places(users, height)
    turns: dict[tuple[str, str], int] = {}
    lines: list[Html] = []
    labels: list[Html] = []
    for arrow in arrows:
        pair = arrow.owner, arrow.viewer
        turn = turns[pair] = turns.get(pair, -1) + 1
        line, label = _arrow(arrow, where[arrow.owner], where[arrow.viewer], _BEND * (1 + 1.5 * turn))
        lines.append(line)
        labels.append(label)
    nodes = (_node(user, where[user]) for user in users)
    return tag(
        "svg",
        *titles,
        joined(*lines, *nodes, *labels),
        viewBox=f"0 0 {_WIDTH} {height}",
        class_="circle",
        role="img",
        aria_labelledby=labelled_by,
    )


def _places(users: Sequence[str], height: float) -> Mapping[str, Point]:
    begin = pi if len(users) == 2 else -pi / 2
    angles = [begin + 2 * pi * at / len(users) for at in range(len(users))]
    return {
        user: (_WIDTH / 2 + _RADIUS * cos(angle), height / 2 + _RADIUS * sin(angle))
        for user, angle in zip(users, angles, strict=True)
    }


def _node(user: str, at: Point) -> Html:
    x, y = at
    return tag(
        "g",
        tag("title", user),
        tag("circle", cx=x, cy=y, r=_NODE, class_="node"),
        tag("text", shortened(user, 10), x=x, y=y + 5, class_="name"),
    )


def _arrow(arrow: Arrow, owner: Point, viewer: Point, bend: float) -> tuple[Html, Html]:
    """A curve that bends to its left: so those of both directions stand apart."""
    length = hypot(viewer[0] - owner[0], viewer[1] - owner[1])
    along = (viewer[0] - owner[0]) / length, (viewer[1] - owner[1]) / length
    aside = along[1], -along[0]
    middle = (
        (owner[0] + viewer[0]) / 2 + aside[0] * 2 * bend,
        (owner[1] + viewer[1]) / 2 + aside[1] * 2 * bend,
    )
    begin, end = _towards(owner, middle, _NODE), _towards(viewer, middle, _NODE + 11)
    look = LOOKS[arrow.channel]
    curve = f"M{begin[0]:.1f} {begin[1]:.1f}Q{middle[0]:.1f} {middle[1]:.1f} {end[0]:.1f} {end[1]:.1f}"
    line = tag(
        "g",
        tag("title", str(arrow)),
        tag("path", d=curve, class_=f"arrow {arrow.channel}", stroke_dasharray=look.dashes),
        tag("path", d=_head(end, _towards(viewer, middle, _NODE + 1)), class_=f"head {arrow.channel}"),
    )
    return line, _label(f"{look.letter} {arrow.count:,}", _on_curve(begin, middle, end, _LABEL), arrow.channel)


def _towards(point: Point, other: Point, distance: float) -> Point:
    length = hypot(other[0] - point[0], other[1] - point[1])
    return (
        point[0] + (other[0] - point[0]) / length * distance,
        point[1] + (other[1] - point[1]) / length * distance,
    )


def _on_curve(begin: Point, middle: Point, end: Point, at: float) -> Point:
    def along(axis: int) -> float:
        return (1 - at) ** 2 * begin[axis] + 2 * at * (1 - at) * middle[axis] + at**2 * end[axis]

    return along(0), along(1)


def _head(base: Point, tip: Point) -> str:
    x, y = tip[0] - base[0], tip[1] - base[1]
    left, right = (base[0] - y * 0.6, base[1] + x * 0.6), (base[0] + y * 0.6, base[1] - x * 0.6)
    return f"M{tip[0]:.1f} {tip[1]:.1f}L{left[0]:.1f} {left[1]:.1f}L{right[0]:.1f} {right[1]:.1f}Z"


def _label(text: str, at: Point, channel: str) -> Html:
    width = 8 * len(text) + 10
    return tag(
        "g",
        tag("rect", x=at[0] - width / 2, y=at[1] - 11, width=width, height=22, rx=11, class_=f"pill {channel}"),
        tag("text", text, x=at[0], y=at[1] + 4.5, class_="count"),
    )
