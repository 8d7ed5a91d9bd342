"""What the check of the built site finds, on sites that are a few lines long."""

from pathlib import Path

import pytest

from docs_site.check import check_site

HOME = '<a href="a/page.html#there">on</a><img src="a/picture.png"><link href="a/style.css" rel="stylesheet">'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """One in which nothing is wrong."""
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(HOME)
    (tmp_path / "404.html").write_text('<a href="/index.html">home</a>')
    (tmp_path / "a" / "page.html").write_text(
        '<h2 id="there">There</h2><a href="../index.html">home</a> <a href=".">up</a> <a href="#there">there</a>'
        '<a href="https://example.com/">elsewhere</a> <a href="mailto:a@example.com">write</a>'
    )
    (tmp_path / "a" / "index.html").write_text("")
    (tmp_path / "a" / "picture.png").write_text("")
    (tmp_path / "a" / "style.css").write_text("body { background: url(picture.png) }")
    return tmp_path


def test_a_site_in_which_nothing_is_wrong(site: Path) -> None:
    report = check_site(site)
    assert report.problems == []
    assert report.links == 9
    assert report.external == {"https://example.com/"}


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ('<a href="gone.html">', "index.html: gone.html is not there"),
        ('<a href="a/page.html#gone">', "index.html: a/page.html#gone has no such place"),
        ('<a href="#gone">', "index.html: #gone has no such place"),
        ('<a href="../outside.html">', "index.html: ../outside.html is not there"),
        ('<img src="gone.png">', "index.html: gone.png is not there"),
        ('<script src="https://cdn.example/x.js">', "index.html loads https://cdn.example/x.js from another host"),
        ('<link href="//fonts.example/f.css">', "index.html loads //fonts.example/f.css from another host"),
    ],
)
def test_each_thing_that_can_be_wrong_with_a_page_is_named(site: Path, written: str, problem: str) -> None:
    (site.parent / "outside.html").write_text("")
    (site / "index.html").write_text(HOME + written)
    assert check_site(site).problems == [problem]


def test_a_page_that_no_other_leads_to_is_named(site: Path) -> None:
    (site / "alone.html").write_text('<a href="alone.html">myself</a>')
    assert check_site(site).problems == ["no page leads to alone.html"]


@pytest.mark.parametrize(
    "rule", ['@import "https://fonts.example/f.css";', "a { src: url('//fonts.example/f.woff2') }"]
)
def test_a_style_that_loads_from_elsewhere_is_named(site: Path, rule: str) -> None:
    (site / "a" / "style.css").write_text(rule)
    [problem] = check_site(site).problems
    assert problem.startswith("a/style.css loads")
    assert "//fonts.example/f" in problem
