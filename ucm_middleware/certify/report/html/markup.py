"""Elements of a page. Whatever is not an element already is escaped, so nothing can be forgotten."""

import html
from typing import Final

_VOID: Final = frozenset({"br", "link", "meta"})


class Html(str):
    """Markup, which is put in as it is."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: str | float | None) -> Html:
    """An element. An attribute of None is left out; ``class_`` is class, and other underscores are hyphens."""
    said = "".join(
        f' {_name(key)}="{html.escape(_value(value))}"' for key, value in attributes.items() if value is not None
    )
    if element in _VOID:
        return Html(f"<{element}{said}>")
    return Html(f"<{element}{said}>{joined(*children)}</{element}>")


def joined(*children: str) -> Html:
    """One after another."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def shortened(text: str, most: int) -> str:
    """So many characters of it."""
    return text if len(text) <= most else f"{text[: max(most - 1, 1)]}…"


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
