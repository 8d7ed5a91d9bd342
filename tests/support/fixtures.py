"""Fixtures around `start_server`. A conftest makes them available by importing them by name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from .servers import SERVER_KINDS, Server, start_server


class ServerFactory(Protocol):
    """Starts servers; they end with the fixture's scope, in reverse order."""

    def __call__(
        self, kind: str, app: str, *, env: Mapping[str, str | None] | None = None, options: Sequence[str] = ()
    ) -> Server:
        """Start `app` ("module:attribute", a module in the `apps` folder beside the test) on a server of `kind`."""
        ...


@pytest.fixture(params=SERVER_KINDS, scope="module")
def server_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server in turn."""
    kind: str = request.param
    return kind


@pytest.fixture
def server_factory(request: pytest.FixtureRequest) -> Iterator[ServerFactory]:
    """Start servers that end with the test."""
    yield from _factory(request.path)


@pytest.fixture(scope="module")
def module_server_factory(request: pytest.FixtureRequest) -> Iterator[ServerFactory]:
    """Start servers that the tests of a module share."""
    yield from _factory(request.path)


def _factory(test_module: Path) -> Iterator[ServerFactory]:
    with ExitStack() as servers:

        def start(
            kind: str, app: str, *, env: Mapping[str, str | None] | None = None, options: Sequence[str] = ()
        ) -> Server:
            app_dir = test_module.parent / "apps"
            return servers.enter_context(start_server(kind, app, app_dir=app_dir, env=env, options=options))

        yield start
