"""The pages of the repository: links that lead somewhere, code that compiles, and a place in the site's navigation."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs_site.layout import DeadLinkError, lay_out, page_text, require_links, site_pages
from docs_site.markdown import blocks

ROOT = Path(__file__).parents[2]
PAGES = {source: page for source, page in site_pages(ROOT).items() if source.endswith(".md")}


@pytest.mark.parametrize("source", PAGES)
def test_python_in_a_page_compiles(source: str) -> None:
    for block in blocks((ROOT / source).read_text()):
        if block.language == "python":
            text = "\n" * block.lines_before + block.text  # so that an error names the line of the page
            compile(text, source, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def test_a_page_with_whole_programs_is_run_by_a_test() -> None:
    """A title is the name of a file: what has one is complete, and a test names its page."""
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__))
    whole = {
        Path(source)
        for source in PAGES
        for block in blocks((ROOT / source).read_text())
        if block.title and block.language == "python"
    }
    assert len(whole) > 7
    # Those of the tutorial are all run by one test, which sees to it that none is left out.
    unproved = [page for page in whole if page.parent.name != "tutorial" and page.name not in tests]
    assert not unproved, f"no test runs the programs of {unproved}"


def test_every_link_leads_somewhere() -> None:
    require_links(ROOT, PAGES)


def test_every_page_is_in_the_navigation_once() -> None:
    def leaves(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                if isinstance(value, str):
                    yield value
                else:
                    yield from leaves(value)

    config = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    assert sorted(leaves(config["nav"])) == sorted(PAGES.values())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a page of each kind, and a file that is none."""
    root = tmp_path / "repository"
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md"):
        write(root, name, "# One\n")
    write(root, "adapters/README.md", "# Adapters\n")
    write(root, "adapters/ucm-db/README.md", "# A database\n\n## Pools, and more\n")
    write(root, "tests/test_it.py", "")
    write(root, "docs/how-to/do.md", "# Do\n")
    write(root, "docs/how-to/picture.svg", "<svg/>")
    write(root, "docs/index.md", "# Home\n")
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a page](../index.md)", "[a page](../index.md)"),
        ("[pools](../../adapters/ucm-db/README.md#pools-and-more)", "[pools](../adapters/ucm-db.md#pools-and-more)"),
        ("[`ucm-db`](../../adapters/ucm-db/)", "[A database](../adapters/ucm-db.md)"),
        ("[docs/index.md](../index.md)", "[Home](../index.md)"),
        ("[a test](../../tests/test_it.py)", "a test (`tests/test_it.py` in the repository)"),
        ("[tests/test_it.py](../../tests/test_it.py)", "`tests/test_it.py`"),
        ("[tests](../../tests/)", "`tests`"),
        ("![seen](picture.svg)", "![seen](picture.svg)"),
        ("[elsewhere](https://example.com/a)", "[elsewhere](https://example.com/a)"),
        ("[here](#do)", "[here](#do)"),
        ("`[no](link.md)`", "`[no](link.md)`"),
        ("```md\n[no](link.md)\n```", "```md\n[no](link.md)\n```"),
    ],
)
def test_a_link_on_the_site_leads_to_what_the_site_has(repository: Path, written: str, shown: str) -> None:
    write(repository, "docs/how-to/do.md", f"# Do\n\n{written}\n")
    lay_out(repository, repository / "build")
    assert (repository / "build/how-to/do.md").read_text() == f"# Do\n\n{shown}\n"
    assert page_text(repository, "README.md", site_pages(repository)) == "# One\n"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("[a](nowhere.md)", r"do.md: \(nowhere.md\) is not there"),
        ("![a](nowhere.png)", r"\(nowhere.png\) is not there"),
        ("[a](../../../outside.md)", "is not there"),
        ("[a](../index.md#nothing)", r"\(../index.md#nothing\) has no such heading"),
        ("[a](#nothing)", "has no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_stops_the_site(repository: Path, written: str, problem: str) -> None:
    write(repository, "docs/how-to/do.md", f"# Do\n\n{written}\n")
    with pytest.raises(DeadLinkError, match=problem):
        lay_out(repository, repository / "build")
    assert not (repository / "build").exists()
