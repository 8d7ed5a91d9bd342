"""The tutorial is what it says: its files run as they stand there, and its commands write what stands below them."""

from pathlib import Path

import pytest

from support.reader import Reader

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = ("identity", "context", "resource", "websocket", "event", "audit", "testing")


def text(page: str) -> str:
    return (TUTORIAL / f"{page}.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_whoever_follows_the_tutorial_sees_what_it_shows(tmp_path: Path, page: str) -> None:
    """Each page, with what the pages before it have left in the folder."""
    reader = Reader(tmp_path)
    for earlier in PAGES[: PAGES.index(page)]:
        reader.save(text(earlier))
    assert reader.follow(text(page)) > 0


def test_no_page_is_left_out() -> None:
    assert {file.stem for file in TUTORIAL.glob("*.md")} == {"index", *PAGES}


@pytest.mark.parametrize(
    "wrong",
    [
        'curl -s -H "Authorization: Bearer token-of-bob" http://127.0.0.1:8000/whoami\n{"user":"alice"}',
        'curl -s -H "Authorization: Bearer token-of-alice" http://127.0.0.1:8000/whoami',
    ],
)
def test_a_page_that_says_something_else_is_found_out(tmp_path: Path, wrong: str) -> None:
    page = text("identity").partition("```console")[0]
    with pytest.raises(AssertionError, match="and the page says"):
        Reader(tmp_path).follow(f"{page}```console\n$ {wrong}\n```\n")
