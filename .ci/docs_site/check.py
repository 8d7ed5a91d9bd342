"""Every link of the built site, looked up in the files that are there. Nothing is fetched."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

_LOADS: Final = {
    ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"), ("link", "href"), ("object", "data"),
    ("script", "src"), ("source", "src"), ("video", "src"),
}  # fmt: skip
"""What a page loads by itself, besides the links that a reader may follow."""

_STYLE_LOADS: Final = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")


@dataclass(slots=True)
class Report:
    """What was found: dead links and what is loaded from elsewhere, a line each; links to other sites."""

    links: int = 0
    problems: list[str] = field(default_factory=list[str])
    external: set[str] = field(default_factory=set[str])


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors = set[str]()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif (tag, name) in _LOADS:
                self.loads.append(value)


def check_site(site: Path) -> Report:
    """Look every link of a built site up, and see that its pages load nothing from other hosts.

    Pages that no other leads to are problems too.
    """
    report = Report()
    pages = {file: _Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    reached = {site / "index.html", site / "404.html"}
    for file, page in pages.items():
        name = file.relative_to(site).as_posix()
        for target in page.loads + page.links:
            report.links += 1
            if _is_external(target):
                report.external.add(target)
                if target in page.loads:
                    report.problems.append(f"{name} loads {target} from another host")
                continue
            if urlsplit(target).scheme in {"data", "mailto"}:
                continue
            place, problem = _look_up(site, file, target, pages)
            if problem:
                report.problems.append(f"{name}: {target} {problem}")
            elif place != file:
                reached.add(place)
    report.problems += [
        f"no page leads to {file.relative_to(site).as_posix()}" for file in pages if file not in reached
    ]
    report.problems += _styles(site)
    return report


def _is_external(target: str) -> bool:
    return target.startswith("//") or urlsplit(target).scheme in {"http", "https"}


def _look_up(site: Path, file: Path, target: str, pages: dict[Path, _Page]) -> tuple[Path, str | None]:
    parts = urlsplit(target)
    path = unquote(parts.path)
    # Of a server's error page nobody knows under which address it is shown: its links begin at the root.
    place = site / path.lstrip("/") if path.startswith("/") else (file.parent / path if path else file)
    place = place.resolve()
    if place.is_dir():
        place /= "index.html"
    if not place.is_relative_to(site.resolve()) or not place.is_file():
        return place, "is not there"
    anchor = unquote(parts.fragment)
    if anchor and place in pages and anchor not in pages[place].anchors:
        return place, "has no such place"
    return place, None


def _styles(site: Path) -> Iterator[str]:
    for file in sorted(site.rglob("*.css")):
        for target in _STYLE_LOADS.findall(file.read_text()):
            yield f"{file.relative_to(site).as_posix()} loads {target} from another host"
