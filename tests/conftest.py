"""What holds for every test: the environment is called testing, hypothesis is not on the clock, managers are closed."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.contexts import MakeManager

pytest_plugins = "pytester"
# What needs Chromium and playwright, a framework, or a store and its adapter is asked for by its path, as tox's
# environments do.
collect_ignore = ["browser", "certify/gallery", "cluster/real", "frameworks", "test_chat_example.py", "web_frameworks"]

settings.register_profile("ucm", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("soak", settings.get_profile("ucm"), derandomize=False)  # see tests/test_state_machine.py
# At import, so that --hypothesis-profile can still choose another one.
settings.load_profile("ucm")


def pytest_configure(config: pytest.Config) -> None:
    # Before collection, so that it also holds for what test modules make when they are imported.
    patch = pytest.MonkeyPatch()
    patch.setenv("UCM_ENVIRONMENT", "testing")
    config.add_cleanup(patch.undo)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many more than there are processors: for a quarter of the time, two of them wait for servers."""
    processors = len(os.sched_getaffinity(0))
    return processors + (processors + 1) // 2


def pytest_report_header() -> list[str]:
    from support.matrices import STEP
    from support.servers import ALL_SERVER_KINDS, SERVER_KINDS

    left_out = [kind for kind in ALL_SERVER_KINDS if kind not in SERVER_KINDS]
    return [
        f"servers: {', '.join(SERVER_KINDS)}" + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        "matrices: in full" if STEP == 1 else f"matrices: one case in {STEP}; the others are left out",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from support.matrices import STEP, part_of

    kept = part_of(items, STEP)
    left_out = [item for item in items if item not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = filter(kept.__contains__, items)


@pytest.fixture
def threads_switch_often() -> Iterator[None]:
    """The interpreter goes to another thread wherever it may."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def make_manager() -> "Iterator[MakeManager]":
    """Managers with settings of the test's own. Their contexts are closed after it."""
    from ucm_middleware import UserContextManager
    from ucm_middleware.testing import closing_contexts

    with ExitStack() as managers:

        def make(**settings: Any) -> UserContextManager:
            return managers.enter_context(closing_contexts(UserContextManager(**settings)))

        yield make
