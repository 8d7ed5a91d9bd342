"""The tutorial is what it says: its files run as they stand there, and its commands write what stands below them."""

from pathlib import Path

import pytest

from support.reader import Reader

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = ("identity", "context", "resource", "websocket", "event", "audit", "testing")


def test_whoever_follows_the_tutorial_sees_what_it_shows(tmp_path: Path) -> None:
    """All pages in one folder, one after another."""
    reader = Reader(tmp_path)
    typed = {page: reader.follow((TUTORIAL / f"{page}.md").read_text()) for page in PAGES}
    assert min(typed.values()) > 0, typed
    assert {file.stem for file in TUTORIAL.glob("*.md")} == {"index", *PAGES}


@pytest.mark.parametrize(
    "wrong",
    [
        'curl -s -H "Authorization: Bearer token-of-bob" http://127.0.0.1:8000/whoami\n{"user":"alice"}',
        'curl -s -H "Authorization: Bearer token-of-alice" http://127.0.0.1:8000/whoami',
    ],
)
def test_a_page_that_says_something_else_is_found_out(tmp_path: Path, wrong: str) -> None:
    page = (TUTORIAL / "identity.md").read_text().partition("```console")[0]
    with pytest.raises(AssertionError, match="and the page says"):
        Reader(tmp_path).follow(f"{page}```console\n$ {wrong}\n```\n")
