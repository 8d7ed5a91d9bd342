"""The steps of a finding as a diagram: lanes for users, connections that they share, and the application."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ucm_middleware.certify.report.findings import Reported
from ucm_middleware.certify.report.html.markup import Html, joined, shortened, tag
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Restart, Say, SignIn, SignOut, Step, Together

_MOST_USERS: Final = 6
_MOST_ROWS: Final = 40
_LANE: Final = 120
_SHARED: Final = 170
_BEFORE_SHARED: Final = 60
_AFTER_SHARED: Final = 150
_LAST: Final = 240
_LEFT: Final = 66
_TOP: Final = 44
_ROW: Final = 40
_CHARACTER: Final = 6.7
"""Pixels."""

_HTTP2: Final = "HTTP/2 connection"
"""No line of a step is called so."""


@dataclass(frozen=True, slots=True)
class Row:
    """Something that a user does, or with ``kind`` another line of the diagram."""

    label: str
    user: str = ""
    line: str = ""
    kind: Literal["sends", "group", "note"] = "sends"
    in_group: bool = False


def sequence(finding: Reported) -> Html | None:
    """The diagram, or None where there is too much for one."""
    rows = [row for step in finding.steps for row in _rows(step)]
    users = list(dict.fromkeys([row.user for row in rows if row.user] + [finding.viewer]))
    if not rows or len(users) > _MOST_USERS or len(rows) > _MOST_ROWS:
        return None
    shared = [line for line in dict.fromkeys(row.line for row in rows if row.line) if _is_shared(line, rows)]
    return _Diagram(users, shared, len(rows) + 1).drawn(rows, finding)


def _is_shared(line: str, rows: Sequence[Row]) -> bool:
    return line == _HTTP2 or len({row.user for row in rows if row.line == line}) > 1


def _rows(step: Step) -> Iterator[Row]:
    match step:
        case Ask():
            yield Row(_label(step), step.user, step.line)
        case Together():
            one_line = len({ask.line for ask in step.asks}) == 1
            how = "multiplexed" if step.http2 else "pipelined" if one_line else "at the same time"
            yield Row(how, kind="group")
            for ask in step.asks:
                yield Row(_label(ask), ask.user, _HTTP2 if step.http2 else ask.line, in_group=True)
        case Connect():
            yield Row(f"opens {step.route}", step.user)
        case Say():
            yield Row(f"sends a message over {step.route}", step.user)
        case HangUp():
            yield Row("drops the WebSocket" if step.abruptly else "closes the WebSocket", step.user)
        case SignIn():
            yield Row("signs in", step.user, step.line)
        case SignOut():
            yield Row("signs out", step.user, step.line)
        case Restart():
            yield Row("the server is restarted", kind="note")


def _label(ask: Ask) -> str:
    extras = [
        *([ask.manner] if ask.manner != "whole" else []),
        *(["large"] if ask.padding else []),
        *(["its canary in it"] if ask.word == "own" else []),
        *([f"id of {ask.ids_of}"] if ask.ids_of not in (None, ask.user) else []),
        *(["until it is there"] if ask.patient else []),
    ]
    return f"{ask.route} ({', '.join(extras)})" if extras else ask.route


class _Diagram:
    __slots__ = ("_application", "_height", "_lanes", "_shared")

    def __init__(self, users: Sequence[str], shared: Sequence[str], rows: int) -> None:
        self._lanes = {user: float(_LEFT + _LANE * at) for at, user in enumerate(users)}
        begin = _LEFT + _LANE * (len(users) - 1) + (_BEFORE_SHARED if shared else 0)
        self._shared = {line: float(begin + _SHARED * (at + 1)) for at, line in enumerate(shared)}
        self._application = begin + _SHARED * len(shared) + (_AFTER_SHARED if shared else _LAST)
        self._height = _TOP + _ROW * (rows + 1)

    def drawn(self, rows: Sequence[Row], finding: Reported) -> Html:
        width = self._application + 70
        return tag(
            "svg",
            tag("title", "The steps as a diagram"),
            tag("desc", "; ".join([*finding.texts, finding.sentence])),
            *(self._lane(user, x, "user") for user, x in self._lanes.items()),
            *(self._lane(line, x, "shared") for line, x in self._shared.items()),
            self._lane("application", self._application, "application"),
            *self._groups(rows),
            *(self._row(row, self._y(at)) for at, row in enumerate(rows)),
            self._leak(finding, self._y(len(rows))),
            viewBox=f"0 0 {width:.0f} {self._height}",
            width=width,
            height=self._height,
            class_="sequence",
            role="img",
        )

    def _y(self, at: int) -> float:
        return _TOP + _ROW * (at + 0.8)

    def _lane(self, name: str, x: float, kind: str) -> Html:
        label = name if kind != "shared" or name == _HTTP2 else f"connection {name}"
        width = 156 if kind == "shared" else 104
        most = 20 if kind == "shared" else 15
        return joined(
            tag("line", x1=x, y1=_TOP - 8, x2=x, y2=self._height - 6, class_=f"lane {kind}"),
            tag("rect", x=x - width / 2, y=8, width=width, height=28, rx=6, class_=f"lane {kind}"),
            tag("text", tag("title", label), shortened(label, most), x=x, y=26.5, class_="name"),
        )

    def _row(self, row: Row, y: float) -> Html:
        if row.kind == "group":
            return tag("text", row.label, x=12, y=y + 4, class_="step group")
        if row.kind == "note":
            line = tag("line", x1=8, y1=y, x2=self._application + 50, y2=y, class_="note")
            return joined(line, tag("text", row.label, x=14, y=y - 6, class_="step"))
        begin, end = self._lanes[row.user], self._application
        via = self._shared.get(row.line)
        dot = () if via is None else (tag("circle", cx=via, cy=y, r=5, class_="via"),)
        return joined(
            tag("line", x1=begin, y1=y, x2=end - 9, y2=y, class_="send"),
            tag("path", d=f"M{end - 1:.1f} {y:.1f}l-9 -5v10z", class_="send"),
            *dot,
            self._text(row.label, begin + 7, y - 7, end - begin - 14, "step"),
        )

    def _groups(self, rows: Sequence[Row]) -> Iterator[Html]:
        """A box around what happens at the same time."""
        for at, row in enumerate(rows):
            if row.kind == "group":
                size = next((n for n, other in enumerate(rows[at + 1 :]) if not other.in_group), len(rows) - at - 1)
                top = self._y(at) - 14
                height = self._y(at + size) - top + 12
                yield tag("rect", x=4, y=top, width=self._application + 62, height=height, rx=8, class_="group")

    def _leak(self, finding: Reported, y: float) -> Html:
        begin, end = self._application, self._lanes[finding.viewer]
        label = f"something of {finding.owner}'s, in the {finding.place.channel}"
        if finding.place.channel not in ("body", "header", "event"):
            return joined(
                tag("circle", cx=begin, cy=y, r=7, class_="leak"),
                tag("text", f"{label} made for {finding.viewer}", x=begin - 14, y=y + 4, class_="step leak end"),
            )
        return joined(
            tag("line", x1=begin, y1=y, x2=end + 10, y2=y, class_="leak"),
            tag("path", d=f"M{end + 1:.1f} {y:.1f}l11 -6v12z", class_="leak"),
            self._text(label, end + 15, y - 8, begin - end - 20, "step leak"),
        )

    def _text(self, text: str, x: float, y: float, width: float, kind: str) -> Html:
        return tag("text", tag("title", text), shortened(text, int(width / _CHARACTER)), x=x, y=y, class_=kind)
