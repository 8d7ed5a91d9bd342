"""Sessions of pytest inside of tests."""

import pytest


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Without the plugin of `ucm certify`'s generator, for which each session would wait, and as outside of CI, where
    pytest says the whole of an error twice.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:schemathesis")
    monkeypatch.delenv("CI", raising=False)
    return pytester
