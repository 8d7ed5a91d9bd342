"""One OpenTelemetry SDK for all tests of this folder: some frameworks keep the first tracer that they find."""

from collections.abc import Iterator

import pytest

from support.tracing import Sdk, installed


@pytest.fixture(scope="session", autouse=True)
def sdk() -> Iterator[Sdk]:
    with installed(Sdk()) as one:
        yield one
