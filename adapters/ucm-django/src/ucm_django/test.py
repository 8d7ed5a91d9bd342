"""For a project's tests: ``TEST_RUNNER = "ucm_django.test.Runner"``."""

from typing import Any

from django.test.runner import DiscoverRunner

from ucm_django.identity import unbound


class Runner(DiscoverRunner):
    """Django's own, which makes and drops the test databases, and migrates them, in an ``unbound`` block.

    In a ``django.test.TestCase`` all tests of a class share one transaction, also those of other users: there each
    statement is tied anew to the context that it runs in.
    """

    def setup_databases(self, **kwargs: Any) -> Any:
        with unbound(reason="test databases are made"):
            return super().setup_databases(**kwargs)

    def teardown_databases(self, old_config: Any, **kwargs: Any) -> None:
        with unbound(reason="test databases are dropped"):
            super().teardown_databases(old_config, **kwargs)
