"""What was tried and what was not, as tables."""

from collections.abc import Iterable, Sequence

from ucm_middleware.certify.report.covering import Covering, RouteRow, Row
from ucm_middleware.certify.report.html.markup import Html, tag
from ucm_middleware.certify.report.words import answers, who

_NUMBERS = frozenset({"tried", "own came back", "steps", "times"})


def table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, states: Sequence[str] = ()) -> Html:
    """A table that scrolls where it is wider than the page. ``states`` are classes of its rows."""
    head = tag("tr", *(tag("th", text, scope="col", class_=_class_of(text)) for text in heads))
    body = (
        tag(
            "tr",
            *(tag("td", cell, class_=_class_of(text)) for text, cell in zip(heads, row, strict=True)),
            class_=states[at] if at < len(states) else None,
        )
        for at, row in enumerate(rows)
    )
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=name)


def coverage(covering: Covering, users: tuple[str, ...]) -> Html:
    """Routes, drives and channels."""
    heads = ("route", "tried", "answered", "got a 2xx", "own came back", "state")
    rows = [_route(route, users) for route in covering.routes]
    states = [route.state.replace(" ", "-") for route in covering.routes]
    return tag(
        "div",
        tag("h3", "Routes"),
        table("Routes", heads, rows, states=states),
        tag("h3", "Drives"),
        table("Drives", ("drive", "steps", "why not"), map(_drive, covering.drives), states=_states(covering.drives)),
        tag("h3", "Channels"),
        table(
            "Channels", ("channel", "looked in"), map(_channel, covering.channels), states=_states(covering.channels)
        ),
    )


def _route(route: RouteRow, users: tuple[str, ...]) -> Sequence[str]:
    state = route.state if route.problem is None else f"{route.state}: {route.problem}"
    return route.key, f"{route.tries:,}", answers(route), who(route, users), f"{route.own:,}", state


def _drive(row: Row) -> Sequence[str]:
    return row.name, f"{row.count:,}", row.why_not or ""


def _channel(row: Row) -> Sequence[str]:
    return row.name, "yes" if row.why_not is None else f"no: {row.why_not}"


def _states(rows: Sequence[Row]) -> list[str]:
    return ["covered" if row.why_not is None else "not-covered" for row in rows]


def _class_of(head: str) -> str | None:
    return "number" if head in _NUMBERS else None
