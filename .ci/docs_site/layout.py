"""Which pages the site has, and where their links lead there.

The pages are written for the repository: a link in docs/ may lead to an adapter, an example or a test. The site has the
pages of docs/ and, of the rest, the Markdown that is worth reading there. A link to anything else of the repository
becomes its name: what is not on the site cannot be a dead link on it.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from docs_site.commands import MARK, commands
from docs_site.markdown import Link, anchors, links, replace_links

_SINGLE: Final = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "overview.md",
    "adapters/README.md": "adapters/index.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples/index.md",
}


class DeadLinkError(Exception):
    """Links that lead nowhere, a line each."""


def site_pages(root: Path) -> dict[str, str]:
    """From a file in the repository to the page or file of the site that it is."""
    found = dict(_SINGLE)
    for file in sorted((root / "docs").rglob("*")):
        if file.is_file():
            found[file.relative_to(root).as_posix()] = file.relative_to(root / "docs").as_posix()
    for folder in ("adapters", "examples"):
        for file in sorted((root / folder).glob("*/README.md")):
            found[file.relative_to(root).as_posix()] = f"{folder}/{file.parent.name}.md"
    return found


def lay_out(root: Path, target: Path) -> int:
    """Write the site's pages into a folder, over what was there. Returns how many there are.

    Raises DeadLinkError for links to what is not in the repository.
    """
    pages = site_pages(root)
    require_links(root, pages)
    shutil.rmtree(target, ignore_errors=True)
    for source, page in pages.items():
        place = target / page
        place.parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".md"):
            place.write_text(page_text(root, source, pages))
        else:
            shutil.copyfile(root / source, place)
    return sum(page.endswith(".md") for page in pages.values())


def require_links(root: Path, sources: Mapping[str, str]) -> None:
    """Raise DeadLinkError unless each link in these files leads to a file and, in Markdown, to a heading there."""
    dead = [
        f"{source}: ({link.target}) {problem}"
        for source in sources
        if source.endswith(".md")
        for link in links((root / source).read_text())
        if (problem := _problem(root, source, link.target))
    ]
    if dead:
        raise DeadLinkError("\n".join(dead))


def page_text(root: Path, source: str, pages: Mapping[str, str]) -> str:
    """A page of the repository as the site has it: its links lead to pages of the site, or are names."""

    def moved(link: Link) -> str | None:
        if _is_external(link.target):
            return None
        path, hash_, anchor = link.target.partition("#")
        if not path:
            return None
        name = _resolved(source, path)
        page = _page_of(root, name, pages)
        if page is None:
            return _as_name(link.text, name)
        there = os.path.relpath(page, PurePosixPath(pages[source]).parent).replace(os.sep, "/")
        text = _title(root, pages, page) if _is_name(link.text, name) and page.endswith(".md") else link.text
        return f"{'!' if link.is_image else ''}[{text}]({there}{hash_}{anchor})"

    text = replace_links((root / source).read_text(), moved)
    return text.replace(MARK, commands()) if MARK in text else text


def _problem(root: Path, source: str, target: str) -> str | None:
    if _is_external(target):
        return None
    path, _, anchor = target.partition("#")
    name = _resolved(source, path) if path else source
    if name.startswith("../") or not (root / name).exists():
        return "is not there"
    if anchor and name.endswith(".md") and anchor not in anchors((root / name).read_text()):
        return "has no such heading"
    return None


def _is_external(target: str) -> bool:
    return target.startswith(("http://", "https://", "mailto:"))


def _resolved(source: str, path: str) -> str:
    return os.path.normpath(PurePosixPath(source).parent / path).replace(os.sep, "/")


def _page_of(root: Path, name: str, pages: Mapping[str, str]) -> str | None:
    name = f"{name}/README.md" if (root / name).is_dir() else name
    return pages.get(name)


def _as_name(text: str, name: str) -> str:
    return f"`{name}`" if _is_name(text, name) else f"{text} (`{name}` in the repository)"


def _is_name(text: str, name: str) -> bool:
    said = text.replace("`", "").rstrip("/")
    return bool(said) and name.endswith(said)


def _title(root: Path, pages: Mapping[str, str], page: str) -> str:
    source = next(source for source, placed in pages.items() if placed == page)
    return (root / source).read_text().partition("\n")[0].removeprefix("# ")
