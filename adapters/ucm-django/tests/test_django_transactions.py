"""How the transactions of one of Django's connections are tied to users, in one process and one thread."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import Client, override_settings

from django_notebook import Note, bodies, owners, try_everything, write
from django_project import PLAIN, all_notes, on_database, seed, told
from support.contexts import events, running_as
from support.postgres import Database
from ucm_middleware import (
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextManager,
    managed_user_context,
)

EXPECTED = ("orm", "after a savepoint", "locked", "raw", "two statements", "iterator", "iterator in atomic", "copy")
"""What ``try_everything`` sees of whose notes."""


def test_without_it_what_a_session_was_told_is_there_for_the_next_user(
    database: Database, manager: UserContextManager
) -> None:
    seed(database, "alice", "bob")
    with override_settings(UCM_UNBOUND_DATABASES=["default"]), on_database(database.app, ENGINE=PLAIN):
        with running_as(manager, "alice"), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.user_id', 'alice', false)")
        with running_as(manager, "bob"):
            assert bodies() == ["secret of alice"]


def test_with_it_each_sees_and_changes_their_own_on_one_connection(
    notebook: Database, manager: UserContextManager
) -> None:
    seed(notebook, "victim")
    for user in ("alice", "bob", "alice"):
        with running_as(manager, user):
            with connection.cursor() as cursor:
                cursor.execute("SELECT set_config('app.user_id', %s, false)", [user])  # as careless code does
            seen = try_everything()
        for way in EXPECTED:
            assert seen[way] == [user], way
        assert (seen["forged"], seen["updated"], seen["deleted"]) == ("ProgrammingError", 0, 0)
        assert (seen["retry"], seen["on_commit"]) == ([user], [user])
    assert [row for row in all_notes(notebook) if row[0] == "victim"] == [("victim", "secret of victim")]
    assert {user for user, _ in all_notes(notebook)} == {"victim", "alice", "bob"}


@pytest.fixture
def in_tokyo(database: Database) -> Iterator[None]:
    """Django sets its own time zone when it connects."""
    with on_database(database.app, TIME_ZONE="Asia/Tokyo"):
        yield


@pytest.mark.usefixtures("in_tokyo")
def test_a_connection_that_changes_hands_is_clean_and_keeps_what_django_has_set(manager: UserContextManager) -> None:
    with running_as(manager, "alice"), connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = 12345")
        cursor.execute("SET app.user_id = 'alice'")
        cursor.execute("CREATE TEMPORARY TABLE mine AS SELECT 1 AS one")
        cursor.execute("SELECT pg_advisory_lock(7)")
        cursor.execute("LISTEN mine")
        cursor.execute("SELECT pg_backend_pid()")
        before = cursor.fetchone()
    with running_as(manager, "alice"), connection.cursor() as cursor:  # her next request may rely on it
        cursor.execute("SELECT one FROM mine")
    with running_as(manager, "bob"), connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('statement_timeout'), to_regclass('pg_temp.mine'), current_setting('TimeZone'), "
            "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'), "
            "(SELECT count(*) FROM pg_listening_channels())"
        )
        assert cursor.fetchone() == ("0", None, "Asia/Tokyo", 0, 0)
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone() == before  # it is the same connection


def test_a_request_is_one_transaction_where_the_project_wants_it(
    database: Database, manager: UserContextManager
) -> None:
    client = Client(raise_request_exception=False)
    with on_database(database.app, ATOMIC_REQUESTS=True), running_as(manager, "alice"):
        assert client.get("/failing").status_code == 500
        found = [event["phase"] for event in events(manager, "alice", "transaction")]
    assert found == ["begin", "rollback"]
    assert all_notes(database) == []


def test_nothing_of_a_binding_stays_with_the_connection(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"):
        for work in (owners, transaction.atomic(owners)):
            work()
            found = connection.connection.execute("SELECT current_setting('app.user_id', true)").fetchone()
            assert found in [("",), (None,)]


def test_a_transaction_is_of_one_user(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"), transaction.atomic():
        write("hers")
        bob = manager.privileged(reason="the test crosses users", users=["bob"])
        with bob, running_as(manager, "bob"), pytest.raises(CrossUserAccessError, match="begun for somebody else"):
            bodies()
        assert bodies() == ["hers"]
    assert all_notes(notebook) == [("alice", "hers")]


def test_a_savepoint_that_is_rolled_back_takes_no_binding_back(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"), transaction.atomic():
        try:
            with transaction.atomic():  # the first statement is SAVEPOINT
                write("gone")
                raise KeyError
        except KeyError:
            assert told() == "alice"
            write("kept")
    assert all_notes(notebook) == [("alice", "kept")]


def test_a_transaction_of_an_ended_context_is_not_committed(notebook: Database, manager: UserContextManager) -> None:
    context = manager.create_isolated_context("alice")
    with managed_user_context(context), pytest.raises(ContextClosedError), transaction.atomic():
        write("too late")
        context.close()
    assert all_notes(notebook) == []
    with running_as(manager, "bob"):
        assert bodies() == []


def test_what_a_context_leaves_open_is_rolled_back_for_the_next(
    notebook: Database, manager: UserContextManager
) -> None:
    with running_as(manager, "alice"):
        transaction.set_autocommit(False)
        write("left open")
    with running_as(manager, "bob"):
        write("his")
        transaction.commit()
        assert told() == "bob"
        transaction.rollback()
    transaction.set_autocommit(True)
    assert all_notes(notebook) == [("bob", "his")]


@pytest.mark.parametrize("reset", ["change", "begin"])
def test_transactions_by_hand_are_tied_each(notebook: Database, manager: UserContextManager, reset: str) -> None:
    with override_settings(UCM_RESET=reset), running_as(manager, "alice"), connection.cursor() as cursor:
        transaction.set_autocommit(False)
        write("one")
        transaction.commit()
        assert bodies() == ["one"]
        write("two")
        transaction.rollback()
        assert bodies() == ["one"]
        transaction.rollback()
        transaction.set_autocommit(True)
        cursor.execute("BEGIN")
        write("three")
        cursor.execute("ROLLBACK")
        cursor.execute("BEGIN")
        write("four")
        cursor.execute("COMMIT")
        with transaction.atomic():
            write("five")
            cursor.execute("COMMIT")
            assert bodies() == ["one", "four", "five"]
    assert [body for _, body in all_notes(notebook)] == ["one", "four", "five"]


def test_an_isolation_level_may_come_first(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert told() == "alice"
        cursor.execute("SHOW transaction_isolation")
        assert cursor.fetchone() == ("serializable",)
    with pytest.raises(ContextNotFoundError), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")


def test_transactions_are_on_record(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"):
        write("one")
        with pytest.raises(KeyError), transaction.atomic():
            write("two")
            write("three")
            raise KeyError
        try:
            Note.objects.create(user_id="bob", body="forged")
        except DatabaseError:
            owners()  # well, while an error is being handled
        found = [
            (event["outcome"], event["phase"], event.get("statements"), event.get("error"))
            for event in events(manager, "alice", "transaction")
        ]
    assert found == [
        ("ok", "begin", None, None),
        ("ok", "commit", 1, None),
        ("ok", "begin", None, None),
        ("failed", "rollback", 2, "KeyError"),
        ("ok", "begin", None, None),
        ("failed", "rollback", 1, "ProgrammingError"),
        ("ok", "begin", None, None),
        ("ok", "commit", 1, None),
    ]
    assert "forged" not in repr(events(manager, "alice", "transaction"))


def test_a_statement_that_is_interrupted_may_have_been_committed(
    notebook: Database, manager: UserContextManager
) -> None:
    def interrupted(execute: Callable[..., Any], *args: Any) -> None:
        execute(*args)
        raise KeyboardInterrupt

    with running_as(manager, "alice"):
        with pytest.raises(KeyboardInterrupt), connection.execute_wrapper(interrupted):
            write("kept")
        assert [each["phase"] for each in events(manager, "alice", "transaction")] == ["begin", "unknown"]
    assert all_notes(notebook) == [("alice", "kept")]


def test_a_transaction_that_passes_over_a_failed_statement_is_not_taken_for_committed(
    notebook: Database, manager: UserContextManager
) -> None:
    """The server answers its COMMIT with a rollback, and the driver does not tell."""
    hooks: list[str] = []
    with running_as(manager, "alice"):
        with pytest.raises(TransactionManagementError, match="failed"), transaction.atomic():
            transaction.on_commit(lambda: hooks.append("kept"))
            write("lost")
            with pytest.raises(DatabaseError), connection.cursor() as cursor:
                cursor.execute("SELECT 1/0")
        assert [each["phase"] for each in events(manager, "alice", "transaction")] == ["begin", "rollback"]
        with transaction.atomic():
            write("kept")
            with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SELECT 1/0")
        assert bodies() == ["kept"]
    assert hooks == []


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.usefixtures("notebook")
def test_a_cursor_on_the_server_is_read_by_those_who_opened_it(manager: UserContextManager, autocommit: bool) -> None:
    with running_as(manager, "alice"):
        for _ in range(3):
            write("alice's")
        transaction.set_autocommit(autocommit)
        notes = Note.objects.iterator(chunk_size=1)
        assert next(notes).body == "alice's"
    with running_as(manager, "bob"):
        with pytest.raises(CrossUserAccessError, match="opened for somebody else"):
            next(notes)
        connection.close()
        assert bodies() == []
