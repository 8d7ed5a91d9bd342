"""What holds for every test: the environment is called testing, and hypothesis is not on the clock."""

import os

import pytest
from hypothesis import settings

pytest_plugins = "pytester"

settings.register_profile("ucm", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("soak", settings.get_profile("ucm"), derandomize=False)  # see tests/test_state_machine.py
# At import, so that --hypothesis-profile can still choose another one.
settings.load_profile("ucm")


def pytest_configure(config: pytest.Config) -> None:
    # Before collection, so that it also holds for what test modules make when they are imported.
    patch = pytest.MonkeyPatch()
    patch.setenv("UCM_ENVIRONMENT", "testing")
    config.add_cleanup(patch.undo)
