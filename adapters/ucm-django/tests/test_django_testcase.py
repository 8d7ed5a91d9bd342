"""Django's TestCase and its runner, with the adapter in place."""

import io
import unittest

import pytest
from django.conf import settings
from django.db import DatabaseError, connection, transaction
from django.test import TestCase, override_settings
from django.test.utils import get_runner

from django_notebook import Note, bodies, write
from django_project import on_database
from support.contexts import running_as
from support.postgres import Database
from ucm_django import unbound
from ucm_middleware import ContextNotFoundError, UserContextManager

scripts = UserContextManager()


class NotesTest(TestCase):
    """Run by a test below, on its database."""

    __test__ = False  # not by pytest

    @classmethod
    def setUpTestData(cls) -> None:
        for user in ("alice", "bob"):
            with running_as(scripts, user):
                write(f"of {user}")

    def test_users_take_turns(self) -> None:
        for user in ("alice", "bob", "alice"):
            with running_as(scripts, user):
                assert bodies() == [f"of {user}"]
                with pytest.raises(DatabaseError, match="row-level security"), transaction.atomic():
                    Note.objects.create(user_id="somebody else", body="forged")

    def test_nobody_is_refused(self) -> None:
        with pytest.raises(ContextNotFoundError):
            bodies()

    def test_a_client_s_request(self) -> None:
        with running_as(scripts, "bob"):
            write("more")
            assert self.client.get("/listing").json() == {"user": "bob", "notes": ["of bob", "more"]}


def test_the_tests_of_a_class_share_a_transaction_and_no_rows(notebook: Database) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(NotesTest)
    output = io.StringIO()
    assert unittest.TextTestRunner(output).run(suite).wasSuccessful(), output.getvalue()
    assert suite.countTestCases() == 3
    with running_as(scripts, "alice"):
        assert bodies() == []


def test_the_runner_makes_databases_without_a_context(database: Database) -> None:
    with override_settings(TEST_RUNNER="ucm_django.test.Runner"):
        runner = get_runner(settings)(verbosity=0, interactive=False)
    with on_database(database.superuser):
        config = runner.setup_databases()
        try:
            with unbound(reason="the test looks"), connection.cursor() as cursor:
                cursor.execute("SELECT current_database(), count(*) FROM django_migrations")
                name, migrations = cursor.fetchone()
                assert (name, migrations > 0) == (f"test_{database.name}", True)
            with pytest.raises(ContextNotFoundError):
                bodies()
        finally:
            runner.teardown_databases(config)
