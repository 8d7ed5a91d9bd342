"""What is read of Markdown: links and headings outside of code, and blocks of code."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

_FENCED: Final = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<info>[^\n]*)\n(?P<text>.*?)^ *(?P=fence) *$", re.MULTILINE | re.DOTALL
)
_CODE: Final = re.compile(
    rf"{_FENCED.pattern}|(?P<ticks>`+)(?:[^`]|(?!(?P=ticks)(?!`))`)+?(?P=ticks)", re.MULTILINE | re.DOTALL
)
_LINK: Final = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_HEADING: Final = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Link:
    """A link or an image, as it is written."""

    is_image: bool
    text: str
    target: str


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: what stands behind its fence, its text without the indentation, and how many lines
    of the page come before that."""

    info: str
    text: str
    lines_before: int

    @property
    def language(self) -> str:
        """The first word behind the fence; empty without one."""
        return self.info.split()[0] if self.info.strip() else ""

    @property
    def title(self) -> str | None:
        """The name of the file that the block is, complete as it stands."""
        found = re.search(r'\btitle="([^"]+)"', self.info)
        return found[1] if found else None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for found in _FENCED.finditer(page):
        text = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        yield Block(found["info"].strip(), text, page.count("\n", 0, found.start("text")))


def links(page: str) -> Iterator[Link]:
    """The inline links and images of a page, in order."""
    found: list[Link] = []
    replace_links(page, lambda link: found.append(link))
    return iter(found)


def replace_links(page: str, replacement: Callable[[Link], str | None]) -> str:
    """The page with each link replaced by what is answered for it; None leaves it as it is. Code is left alone."""
    codes: list[str] = []

    def hide(code: re.Match[str]) -> str:
        codes.append(code[0])
        return f"\0{len(codes) - 1}\0"

    def show(text: str) -> str:
        return re.sub("\0([0-9]+)\0", lambda number: codes[int(number[1])], text)

    def replace(found: re.Match[str]) -> str:
        answer = replacement(Link(found["image"] == "!", show(found["text"]), found["target"]))
        return found[0] if answer is None else answer

    return show(_LINK.sub(replace, _CODE.sub(hide, page)))


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as the hosts of repositories make them."""
    text = _FENCED.sub("", page)
    seen: dict[str, int] = {}
    made = set[str]()
    for heading in _HEADING.findall(text):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        made.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return made
