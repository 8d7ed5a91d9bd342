"""What ``--ucm-strict`` adds to pytest: a test fails that leaves a context, a resource, a changed environment, or
something that runs in a closed context behind.

pytest is imported in here and nowhere else in the package.
"""

from collections.abc import Generator
from typing import Any

import pytest

from ucm_middleware.testing.context_watch import ContextWatch
from ucm_middleware.testing.environment_watch import EnvironmentWatch
from ucm_middleware.testing.held_watch import HeldWatch
from ucm_middleware.testing.leaks import Owner

HINT = (
    "Close contexts in the test or fixture that opens them, after what was started in them; set variables with the "
    "monkeypatch fixture."
)


class StrictMode:
    """The hooks. Each look comes after all other teardown of the test, so that its fixtures had their turn.

    What a fixture of a wider scope sets up is its own until it is torn down, and is then put down to the test that ran
    last. What was there before the first test is nobody's.
    """

    def __init__(self) -> None:
        self._contexts = ContextWatch()
        self._environment = EnvironmentWatch()
        self._held = HeldWatch()
        self._owners: dict[pytest.FixtureDef[Any], Owner] = {}

    def start(self) -> None:
        """Begin to watch."""
        self._contexts.start()
        self._held.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._held.stop()
        self._contexts.stop()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        self._contexts.forgive()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        self._environment.begin()
        result = yield
        # Not before: pytest tears down what it has not set up, and fails. And not after the collection: in a worker of
        # xdist that ends the session with an internal error.
        marker = item.get_closest_marker("ucm_leaks")
        if marker is not None and not (marker.args or marker.kwargs.get("reason")):
            raise pytest.UsageError(f"{item.nodeid}: ucm_leaks wants a reason, such as ucm_leaks('its pool is gone')")
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        self._owners[fixturedef] = owner = Owner(f"the {fixturedef.scope}-scoped fixture {fixturedef.argname!r}")
        with self._contexts.owned_by(owner), self._environment.owned_by(owner):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        if (owner := self._owners.pop(fixturedef, None)) is not None:
            owner.ended = True
            self._environment.disown(owner)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        error: BaseException | None = None
        result: object = None
        try:
            result = yield
        except (pytest.exit.Exception, KeyboardInterrupt):
            raise
        except BaseException as raised:  # noqa: BLE001 - whatever the teardown raised, it is raised again below
            error = raised
        # pytest drops what fixtures returned as well, only later; unittest's tests have none.
        returned: dict[str, object] = getattr(item, "funcargs", {})
        if item.get_closest_marker("ucm_leaks") is None:
            findings = self._contexts.findings(returned.clear) + self._held.findings()
        else:
            findings = []
            self._contexts.overlook()
            self._held.overlook()
        findings += self._environment.findings()
        if not findings:
            if error is not None:
                raise error
            return result
        left = "".join(f"\n  {finding}" for finding in findings)
        leak = pytest.fail.Exception(f"--ucm-strict: {item.name} left behind{left}\n{HINT}", pytrace=False)
        if error is None:
            raise leak
        raise BaseExceptionGroup("the teardown failed, and --ucm-strict found something left behind", [error, leak])
