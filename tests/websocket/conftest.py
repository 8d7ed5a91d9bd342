"""What holds for all tests of WebSockets."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _handlers_assertions_hold(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a test asserts inside of a handler fails the test, and not only the handler."""
    yield
    for record in caplog.get_records("call"):
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AssertionError | pytest.fail.Exception):
            raise error
