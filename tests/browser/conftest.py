"""A headless Chromium, of the system: `apt-get install chromium`. Without one the run fails."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from support.waiting import PATIENCE
from ucm_middleware.testing.server import Server, start_server

ROOT = Path(__file__).parents[2]
APP = "examples.live_events.app:app"

NAMES = "chromium", "chromium-browser", "google-chrome"
MISSING = (
    f"Chromium is not installed: there is no {', '.join(NAMES)} on the PATH. Install it, on Debian with "
    "`apt-get install chromium`, or give its path in UCM_TEST_CHROMIUM."
)
MILLISECONDS = 1000

expect.set_options(timeout=PATIENCE * MILLISECONDS)


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, page in (("--write-screenshot", "live events"), ("--write-chat-screenshot", "the chat")):
        parser.addoption(option, type=Path, metavar="PATH", help=f"where the page of {page} is pictured for the docs")


def chromium() -> str:
    """The path of the browser. Ends the run without one."""
    named = os.environ.get("UCM_TEST_CHROMIUM")
    if named is not None and not os.access(named, os.X_OK):
        pytest.exit(f"UCM_TEST_CHROMIUM is {named!r}, which is no program.", returncode=1)
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.exit(MISSING, returncode=1)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    # The sandbox of Chromium refuses to start as root, which is what containers are.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A profile of its own, without cookies. An error in any script of a page fails the test."""
    context = browser.new_context(viewport={"width": 1160, "height": 640})
    context.set_default_timeout(PATIENCE * MILLISECONDS)
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert not errors


@pytest.fixture
def server() -> Iterator[Server]:
    """The example, without anybody signed in."""
    with start_server(APP, app_dir=ROOT) as server:
        yield server


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Page:
    """The example's page, with its clock at a standstill: nothing reconnects before the test lets time pass."""
    page = context.new_page()
    page.clock.install(time=0)
    page.clock.pause_at(1)
    page.goto(server.url)
    return page


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    """Another server on the same host: its pages are of another origin."""
    with start_server(APP, app_dir=ROOT) as server:
        yield server
