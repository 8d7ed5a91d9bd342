"""Many users in a matrix: a row for whose data it is, a column for who saw it."""

from collections.abc import Sequence
from typing import Final

from ucm_middleware.certify.report.html.channels import LOOKS, Arrow
from ucm_middleware.certify.report.html.markup import Html, joined, shortened, tag

MOST_USERS: Final = 50

_MANY: Final = 30
_TOP: Final = 104


def shown_in_matrix(users: Sequence[str], arrows: Sequence[Arrow]) -> Sequence[str]:
    """All users, or those to whom most happened where there are too many."""
    if len(users) <= MOST_USERS:
        return users
    counts = dict.fromkeys(users, 0)
    for arrow in arrows:
        counts[arrow.owner] += arrow.count
        counts[arrow.viewer] += arrow.count
    most = set(sorted(users, key=lambda user: -counts[user])[:MOST_USERS])
    return [user for user in users if user in most]


def matrix(users: Sequence[str], arrows: Sequence[Arrow], *titles: Html, labelled_by: str) -> Html:
    """The picture. ``titles`` are its title and description."""
    grid = _Grid(users)
    cells: dict[tuple[str, str], list[Arrow]] = {}
    for arrow in arrows:
        if arrow.owner in grid.at and arrow.viewer in grid.at:
            cells.setdefault((arrow.owner, arrow.viewer), []).append(arrow)
    width, height = grid.left + grid.size + 50, _TOP + grid.size + 4
    return tag(
        "svg",
        *titles,
        tag("text", "whose ↓", x=grid.left - 6, y=_TOP - 8, class_="axis end"),
        tag("text", "seen by →", x=grid.left - 6, y=_TOP - 26, class_="axis end"),
        *map(grid.row, users),
        *map(grid.column, users),
        *(grid.cell(found) for found in cells.values()),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        class_="matrix many" if len(users) > _MANY else "matrix",
        role="img",
        aria_labelledby=labelled_by,
    )


class _Grid:
    """Smaller where there are many users, so that all of them are in sight on a screen."""

    __slots__ = ("_longest", "_side", "at", "left", "size")

    def __init__(self, users: Sequence[str]) -> None:
        self.at = {user: number for number, user in enumerate(users)}
        self._side, self.left, self._longest = (20, 86, 11) if len(users) > _MANY else (28, 116, 15)
        self.size = self._side * len(users)

    def _x(self, user: str) -> float:
        return self.left + self._side * self.at[user]

    def _y(self, user: str) -> float:
        return _TOP + self._side * self.at[user]

    def row(self, user: str) -> Html:
        """A stripe, with the user's own cell and name."""
        y, side = self._y(user), self._side
        name = joined(tag("title", user), shortened(user, self._longest))
        return joined(
            tag("rect", x=self.left, y=y, width=self.size, height=side, class_="even" if self.at[user] % 2 else "odd"),
            tag("rect", x=self._x(user), y=y, width=side, height=side, class_="self"),
            tag("text", name, x=self.left - 6, y=y + side * 0.68, class_="label end"),
        )

    def column(self, user: str) -> Html:
        """A line, with the user's name aslant."""
        x = self._x(user)
        turned = f"rotate(-60 {x + self._side * 0.65:.1f} {_TOP - 6})"
        name = joined(tag("title", user), shortened(user, self._longest))
        return joined(
            tag("line", x1=x, y1=_TOP, x2=x, y2=_TOP + self.size, class_="grid"),
            tag("text", name, x=x + self._side * 0.65, y=_TOP - 6, transform=turned, class_="label"),
        )

    def cell(self, found: Sequence[Arrow]) -> Html:
        """A stripe for each channel, with its letter, and below how often in all."""
        x, y, side = self._x(found[0].viewer), self._y(found[0].owner), self._side
        stripe = side / len(found)
        stripes = (
            joined(
                tag("rect", x=x + stripe * at, y=y, width=stripe, height=side, class_=f"cell {arrow.channel}"),
                tag("text", LOOKS[arrow.channel].letter, x=x + stripe * (at + 0.5), y=y + side * 0.45, class_="letter"),
            )
            for at, arrow in enumerate(found)
        )
        count = _brief(sum(arrow.count for arrow in found))
        said = tag("title", "; ".join(map(str, found)))
        return tag("g", said, *stripes, tag("text", count, x=x + side / 2, y=y + side * 0.88, class_="small"))


def _brief(count: int) -> str:
    """In four characters."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k" if count < 999_500 else "1M+"
