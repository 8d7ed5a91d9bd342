"""The guard is proved on real servers: on apps that report, and on apps that block."""

from collections.abc import Callable
from typing import Any

import pytest

from support.fixtures import module_server_factory, server_factory, server_kind

__all__ = ["module_server_factory", "server_factory", "server_kind"]

OpenSite = Callable[[str], Any]
"""Opens a module's site in a mode; the module has a fixture `open_site` for it, which closes what it opened."""


@pytest.fixture
def reporting(open_site: OpenSite) -> Any:
    return open_site("report")


@pytest.fixture
def blocking(open_site: OpenSite) -> Any:
    return open_site("block")


@pytest.fixture(params=["report", "block"])
def either(request: pytest.FixtureRequest, open_site: OpenSite) -> Any:
    return open_site(request.param)
