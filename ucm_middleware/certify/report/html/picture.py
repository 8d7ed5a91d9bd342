"""Who reached whose data: a picture, and the same in words for whom a picture is no use."""

from typing import Final

from ucm_middleware.certify.report.html.channels import LOOKS, Arrow, arrows_of, legend
from ucm_middleware.certify.report.html.circle import MOST_ARROWS, MOST_USERS, circle
from ucm_middleware.certify.report.html.markup import Html, tag
from ucm_middleware.certify.report.html.matrix import matrix, shown_in_matrix
from ucm_middleware.certify.report.html.tables import table
from ucm_middleware.certify.report.reporting import Run
from ucm_middleware.certify.report.words import counted

_MOST_SAID: Final = 20
_MOST_ROWS: Final = 200


def picture(run: Run, users: tuple[str, ...], caption: str) -> Html:
    """The figure of a run. ``caption`` says which."""
    arrows = arrows_of(run.findings)
    if not arrows and len(users) > MOST_USERS:
        return tag("figure", tag("figcaption", caption), tag("p", _nothing(users), class_="nothing"))
    name = "with-ucm" if run.with_ucm else "plain"
    titles = (
        tag("title", f"Who reached whose data: {caption}", id=f"{name}-title"),
        tag("desc", _said(arrows, users), id=f"{name}-desc"),
    )
    labelled_by = f"{name}-title {name}-desc"
    if len(users) <= MOST_USERS and len(arrows) <= MOST_ARROWS:
        drawn = circle(users, arrows, *titles, labelled_by=labelled_by)
        hint = "An arrow goes from whose data it is to who saw it, with how often."
    else:
        shown = shown_in_matrix(users, arrows)
        drawn = tag(
            "div",
            matrix(shown, arrows, *titles, labelled_by=labelled_by),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label=f"Picture: {caption}",
        )
        hint = "A row is whose data it is, a column who saw it."
        if left := len(users) - len(shown):
            hint += f" {counted(left, 'user')} to whom less happened {'is' if left == 1 else 'are'} left out."
    if not arrows:
        return tag("figure", tag("figcaption", caption), drawn, tag("p", _nothing(users)))
    return tag("figure", tag("figcaption", caption), drawn, legend(arrows), tag("p", hint), _in_words(arrows))


def _nothing(users: tuple[str, ...]) -> str:
    return f"Of {counted(len(users), 'user')} none was seen to be sent what is another's. That is no proof."


def _said(arrows: tuple[Arrow, ...], users: tuple[str, ...]) -> str:
    if not arrows:
        return _nothing(users)
    rest = len(arrows) - _MOST_SAID
    return "; ".join([*map(str, arrows[:_MOST_SAID]), *([f"and {rest:,} more"] if rest > 0 else [])]) + "."


def _in_words(arrows: tuple[Arrow, ...]) -> Html:
    rows = [(arrow.owner, arrow.viewer, LOOKS[arrow.channel].name, f"{arrow.count:,}") for arrow in arrows[:_MOST_ROWS]]
    rest = len(arrows) - len(rows)
    more = (tag("p", f"and {rest:,} more, of which the JSON report has all"),) if rest else ()
    summary = tag("summary", "The picture as a table")
    return tag("details", summary, table("Who reached whose data", ("whose", "seen by", "in", "times"), rows), *more)
