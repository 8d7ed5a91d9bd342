"""The page of ``ucm certify`` in Chromium: a file on a disk, which asks for nothing and runs nothing."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from support.reports import crowd, dashboard, report, shown
from ucm_middleware.certify.coverage import RouteCoverage
from ucm_middleware.certify.report.html import as_html
from ucm_middleware.certify.report.reporting import Report
from ucm_middleware.certify.sightings import Place

HOSTILE = "<img src=x onerror=document.title='x'><script>document.title='x'</script>"


class Opened:
    """A page, with what it asked for and complained of."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.asked: list[str] = []
        self.said: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        self.url = path.as_uri()
        page.goto(self.url)

    def is_quiet(self) -> bool:
        """Whether nothing but the page itself was asked for, and nothing complained of."""
        return [url for url in self.asked if not url.startswith("data:")] == [self.url] and not self.said


def opened(browser: Browser, tmp_path: Path, made: Report, *, width: int = 1240) -> Opened:
    path = tmp_path / "report.html"
    path.write_text(as_html(made), encoding="utf-8")
    return Opened(browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark"), path)


def test_the_picture_shows_who_reached_whose_data(browser: Browser, tmp_path: Path) -> None:
    found = opened(browser, tmp_path, report([dashboard(), dashboard(channel="header")], after=[]))

    pictures = found.page.get_by_role("img", name="Who reached whose data")
    expect(pictures).to_have_count(2)
    expect(pictures.nth(0)).to_contain_text("B 1,018")
    expect(pictures.nth(0).locator("path.arrow")).to_have_count(2)
    expect(pictures.nth(1).locator("path.arrow")).to_have_count(0)
    assert pictures.nth(0).get_attribute("aria-labelledby") == "plain-title plain-desc"
    side_by_side = [pictures.nth(at).bounding_box() for at in range(2)]
    assert side_by_side[0] is not None
    assert side_by_side[1] is not None
    assert side_by_side[0]["y"] == side_by_side[1]["y"]
    assert found.is_quiet()


def test_the_steps_are_drawn_with_the_connection_that_is_shared(browser: Browser, tmp_path: Path) -> None:
    found = opened(browser, tmp_path, report([dashboard()]))

    drawn = found.page.locator("svg.sequence")
    expect(drawn).to_contain_text("connection proxy-1")
    expect(drawn.locator("circle.via")).to_have_count(2)
    expect(drawn).to_contain_text("something of alice's, in the body")


@pytest.mark.parametrize("width", [360, 1240])
@pytest.mark.parametrize("size", [2, 8, 50])
def test_no_page_is_wider_than_the_screen(browser: Browser, tmp_path: Path, width: int, size: int) -> None:
    names, findings = crowd(size)

    found = opened(browser, tmp_path, report(findings, names), width=width)

    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.is_quiet()


def test_fifty_users_are_in_sight_at_once(browser: Browser, tmp_path: Path) -> None:
    names, findings = crowd(50)

    found = opened(browser, tmp_path, report(findings, names))

    region = found.page.get_by_role("region", name="Picture")
    assert region.evaluate("element => element.scrollWidth <= element.clientWidth")
    expect(region).to_contain_text("user-49")


def test_what_the_application_says_is_text(browser: Browser, tmp_path: Path) -> None:
    names = (HOSTILE, "bob")
    place = Place("header", f"GET /{HOSTILE}", HOSTILE)
    made = report([shown(place, {("bob", HOSTILE): 1})], names, routes=[RouteCoverage(place.route, "schema", HOSTILE)])

    found = opened(browser, tmp_path, made)

    expect(found.page).to_have_title("ucm certify: shop:app")
    expect(found.page.locator("img, script")).to_have_count(0)
    expect(found.page.locator("article h3")).to_contain_text(HOSTILE)
    assert found.is_quiet()


def test_the_policy_forbids_scripts(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page = as_html(report([dashboard()]))
    path.write_text(page.replace("</main>", "<script>document.title = 'x'</script></main>"), encoding="utf-8")

    found = Opened(browser.new_page(), path)

    expect(found.page).to_have_title("ucm certify: shop:app")
    assert "Content Security Policy" in found.said[0]
