"""How the transactions of one of Django's connections are tied to users, in one process and one thread."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import Client, override_settings
from django_notebook import Note, bodies, owners, try_everything, write
from django_project import PLAIN, fresh_connection, on_database

from support.contexts import events, running_as, visitor
from support.postgres import Database
from support.tcp_proxy import TcpProxy
from ucm_middleware import (
    ConfigurationError,
    ContextClosedError,
    ContextNotFoundError,
    CrossUserAccessError,
    UnauthenticatedError,
    UserContextManager,
    UserExecutionContext,
    hookimpl,
    managed_user_context,
)

EXPECTED = ("orm", "after a savepoint", "locked", "raw", "two statements", "iterator", "iterator in atomic", "copy")
"""What ``try_everything`` sees of whose notes."""


def seed(database: Database, *users: str) -> None:
    for user in users:
        database.execute(
            f"insert into notes (user_id, body) values ('{user}', 'secret of {user}')", as_=database.superuser
        )


def all_notes(database: Database) -> list[tuple[str, str]]:
    with psycopg.connect(database.superuser.dsn) as admin:
        return admin.execute("select user_id, body from notes order by id").fetchall()


def told() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('app.user_id', true)")
        (value,) = cursor.fetchone()
    return str(value)


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


@pytest.mark.parametrize("in_atomic", [False, True])
def test_no_statement_reaches_the_server_for_nobody(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager, in_atomic: bool
) -> None:
    closed = manager.create_isolated_context("alice")
    with on_database(database.app.at(postgres_proxy.port)):
        with running_as(manager, "alice"):
            write("hers")
        before = postgres_proxy.round_trips

        def ask() -> None:
            if in_atomic:
                with transaction.atomic():
                    bodies()
            else:
                bodies()

        with pytest.raises(ContextNotFoundError):
            ask()
        with managed_user_context(visitor(manager)), pytest.raises(UnauthenticatedError):
            ask()
        with managed_user_context(closed):
            closed.close()
            with pytest.raises(ContextClosedError):
                ask()
        assert postgres_proxy.round_trips == before
        with running_as(manager, "alice"):
            assert bodies() == ["hers"]  # and nothing is left of it


def alone() -> None:
    owners()


def in_atomic() -> None:
    with transaction.atomic():
        owners()
        owners()


def many() -> None:
    with connection.cursor() as cursor:
        cursor.executemany("SELECT %s", [(1,), (2,)])


def two_in_one() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1; SELECT 2")


def on_the_server() -> None:
    list(Note.objects.iterator(chunk_size=10))


@pytest.mark.parametrize(("work", "more"), [(alone, 0), (in_atomic, 0), (many, 3), (two_in_one, 3), (on_the_server, 3)])
def test_what_binding_costs_in_round_trips(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager, work: Callable[[], None], more: int
) -> None:
    def round_trips() -> int:
        work()
        before = postgres_proxy.round_trips
        work()
        return postgres_proxy.round_trips - before

    login = database.app.at(postgres_proxy.port)
    with override_settings(UCM_UNBOUND_DATABASES=["default"]), on_database(login, ENGINE=PLAIN):
        unbound = round_trips()
    with on_database(login), running_as(manager, "alice"):
        bound = round_trips()
    assert bound - unbound == more


def test_a_connection_that_changes_hands_costs_one(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager
) -> None:
    with on_database(database.app.at(postgres_proxy.port)):
        for user, more in (("alice", None), ("alice", 0), ("bob", 1), ("bob", 0)):
            before = postgres_proxy.round_trips
            with running_as(manager, user):
                owners()
            assert more is None or postgres_proxy.round_trips - before == 1 + more


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


def test_transactions_by_hand_are_tied_each(notebook: Database, manager: UserContextManager) -> None:
    with running_as(manager, "alice"), connection.cursor() as cursor:
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


def test_what_the_driver_is_given_directly_is_tied_too(notebook: Database, manager: UserContextManager) -> None:
    seed(notebook, "bob")
    notebook.execute(
        "create function whoami(text) returns text language sql as $$ select current_setting('app.user_id', true) $$"
    )
    with connection.cursor() as cursor:
        with pytest.raises(ContextNotFoundError):
            cursor.callproc("whoami", ["x"])
        with pytest.raises(ContextNotFoundError), cursor.copy("COPY notes TO STDOUT"):
            pass
    with running_as(manager, "alice"), connection.cursor() as cursor:
        cursor.callproc("whoami", ["x"])
        assert cursor.fetchone() == ("alice",)
        for name in ("copy", "stream"):
            with pytest.raises(TransactionManagementError, match=r"transaction\.atomic"):
                getattr(cursor, name)("COPY notes TO STDOUT")
        with transaction.atomic():
            with cursor.copy("COPY (SELECT current_setting('app.user_id'), count(*) FROM notes) TO STDOUT") as copy:
                assert list(copy.rows()) == [("alice", "0")]
            assert list(cursor.stream("SELECT user_id FROM notes")) == []
        with connection.chunked_cursor() as chunked:
            chunked.execute("SELECT current_setting('app.user_id', true)")
            assert chunked.fetchone() == ("alice",)


def test_a_transaction_on_the_driver_s_own_connection_is_refused(
    notebook: Database, manager: UserContextManager
) -> None:
    with running_as(manager, "alice"):
        connection.ensure_connection()
        connection.connection.execute("BEGIN")
        with pytest.raises(ConfigurationError, match="driver's own connection"):
            bodies()
        connection.connection.execute("ROLLBACK")
        assert bodies() == []


@pytest.mark.parametrize("user", ["o'brien", 'a"b', "back\\slash", "%s", "$1; drop table notes", "é" * 100])
def test_a_user_id_is_a_value_and_never_sql(notebook: Database, manager: UserContextManager, user: str) -> None:
    with running_as(manager, user):
        write("mine")
        assert told() == user
        with transaction.atomic(), connection.cursor() as cursor:
            assert owners() == [user]
            cursor.execute("SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()")
            assert user not in cursor.fetchone()[0]


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


def test_other_plugins_tie_the_connection_too_and_an_error_of_theirs_lets_nothing_through(
    notebook: Database,
) -> None:
    class Plugin:
        fails = False

        @hookimpl
        def ucm_bind_session(self, context: UserExecutionContext, session: Any) -> None:
            if self.fails:
                raise OSError("no")
            with session.cursor() as cursor:
                cursor.execute("SELECT set_config('app.tenant', %s, true)", [context.user_id + "'s"])

    plugin = Plugin()
    manager = UserContextManager(plugins=[plugin])
    with running_as(manager, "alice"):
        for block in (transaction.atomic, transaction.atomic):
            with block(), connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('app.tenant')")
                assert cursor.fetchone() == ("alice's",)
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('app.tenant')")
            assert cursor.fetchone() == ("alice's",)
        plugin.fails = True
        with pytest.raises(OSError, match="no"):
            write("not written")
        with transaction.atomic():
            with pytest.raises(OSError, match="no"):
                write("not written")
            with pytest.raises(TransactionManagementError, match="could not be tied"):
                write("not written either")
    assert all_notes(notebook) == []


def test_each_transaction_may_take_on_a_role(database: Database, manager: UserContextManager) -> None:
    reader = database.login("reader", "nologin")
    database.execute(f'grant select on notes to "{reader.user}"')
    database.execute(f'grant "{reader.user}" to {{app}}', as_=database.superuser)
    with override_settings(UCM_BINDING={"role": reader.user}), on_database(database.app), running_as(manager, "alice"):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_user, session_user")
            assert cursor.fetchone() == (reader.user, database.app.user)
        with pytest.raises(DatabaseError, match="permission denied"):
            write("it may only read")
    with override_settings(UCM_BINDING={"role": "nobody_knows"}), on_database(database.app):
        for work in (bodies, transaction.atomic()(bodies)):
            with running_as(manager, "alice"), pytest.raises(DatabaseError, match="nobody_knows"):
                work()
    fresh_connection()


def test_a_database_that_is_read_only_or_gone_says_so(
    database: Database, postgres_proxy: TcpProxy, manager: UserContextManager
) -> None:
    with on_database(database.app.at(postgres_proxy.port)), running_as(manager, "alice"):
        with transaction.atomic(), connection.cursor() as cursor, pytest.raises(DatabaseError, match="read-only"):
            cursor.execute("SET TRANSACTION READ ONLY")
            write("refused")
        for work in (bodies, transaction.atomic()(bodies)):
            assert bodies() == []
            postgres_proxy.cut()
            with pytest.raises(DatabaseError):
                work()
            connection.close()
        postgres_proxy.refuse()
        with pytest.raises(DatabaseError):
            bodies()
        postgres_proxy.refuse(False)
        assert bodies() == []
    assert all_notes(database) == []
