"""The pytest plugin of ucm-middleware: its options and fixtures.

It stands beside the package and not inside of it, and imports nothing of it until a fixture is used: pytest loads
plugins before coverage starts to measure, so that every line run by an import in here would count as not run, and in
every session of an environment that has ucm-middleware installed, also where nothing uses it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from ucm_middleware import UserContextManager
    from ucm_middleware.testing import Drive, FakeClock, RecordingLedger, Server, Users
    from ucm_middleware.testing.server import ServerKind


class ServerFactory(Protocol):
    """What ``ucm_server`` is: starts a server that ends with the test. Servers end in reverse order."""

    def __call__(
        self,
        app: str,
        *,
        kind: "ServerKind" = "uvicorn",
        app_dir: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        options: Sequence[str] = (),
    ) -> "Server":
        """As ``start_server``; ``app_dir`` is the test's own folder unless it is given."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "fail each test that leaves an open user context, an unreleased resource or a changed os.environ behind"
    parser.getgroup("ucm", "ucm-middleware").addoption("--ucm-strict", action="store_true", default=False, help=text)
    parser.addini("ucm_strict", text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "ucm_leaks(reason): the test leaves contexts or resources behind on purpose; strict mode lets it"
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    # Only now, when coverage has started in the workers of xdist as well.
    config = session.config
    if not config.getoption("ucm_strict") and not config.getini("ucm_strict"):
        return
    from ucm_middleware.testing.strict import StrictMode

    strict = StrictMode()
    config.pluginmanager.register(strict, "ucm-strict")
    strict.start()
    config.add_cleanup(strict.stop)


@pytest.fixture
def ucm_clock() -> "FakeClock":
    """A monotonic clock that stands still until the test calls ``ucm_clock.advance(seconds)``."""
    from ucm_middleware.testing import FakeClock

    return FakeClock()


@pytest.fixture
def ucm_ledger() -> "RecordingLedger":
    """A ledger that keeps every record of ``ucm_manager``, in order."""
    from ucm_middleware.testing import RecordingLedger

    return RecordingLedger()


@pytest.fixture
def ucm_manager(ucm_clock: "FakeClock", ucm_ledger: "RecordingLedger") -> "Iterator[UserContextManager]":
    """A manager on ``ucm_clock`` that writes into ``ucm_ledger``. Its contexts are closed after the test.

    Override it, in a conftest, for a manager with settings of your own.
    """
    from ucm_middleware import UserContextManager
    from ucm_middleware.testing import closing_contexts

    with closing_contexts(UserContextManager(clock=ucm_clock, ledger=ucm_ledger)) as manager:
        yield ucm_clock.attach(manager)


@pytest.fixture
def ucm_users(ucm_manager: "UserContextManager") -> "Users":
    """Distinct users, and contexts for them in ``ucm_manager``."""
    from ucm_middleware.testing import Users

    return Users(ucm_manager)


@pytest.fixture
def ucm_drive() -> "type[Drive]":
    """Runs an app in this process, each request in an empty Context: ``await ucm_drive(app).get("/")``."""
    from ucm_middleware.testing import Drive

    return Drive


@pytest.fixture
def ucm_server(request: pytest.FixtureRequest) -> "Iterator[ServerFactory]":
    """Starts real servers: ``ucm_server("module:app").url``; uvicorn, or ``kind="hypercorn"`` or ``"granian"``."""
    from ucm_middleware.testing import start_server

    with ExitStack() as servers:

        def start(
            app: str,
            *,
            kind: "ServerKind" = "uvicorn",
            app_dir: Path | None = None,
            env: Mapping[str, str | None] | None = None,
            options: Sequence[str] = (),
        ) -> "Server":
            folder = request.path.parent if app_dir is None else app_dir
            return servers.enter_context(start_server(app, app_dir=folder, kind=kind, env=env, options=options))

        yield start
